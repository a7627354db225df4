"""What every body of a request has in common, and the types of its values."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from foundry.validation import FirstError, Strict, of_field

MAX_REFERENCE_CHARACTERS = 512


class Parameters(Strict):
    """Null stands for unset."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, value in values.items():
            if name in cls.neutral and value is not None and value not in cls.neutral[name]:
                taken = ", ".join(json.dumps(each) for each in (None, *cls.neutral[name]))
                raise of_field(name, f"is not supported: only {taken} can be taken")
        return {name: value for name, value in values.items() if name not in cls.neutral and name not in cls.ignored}


def check_text(value: str) -> str:
    # JSON can spell half a surrogate pair, which is no character and travels nowhere.
    value.encode()
    return value


def is_ids(value: Any) -> bool:
    """Whether these may be token ids."""
    return isinstance(value, list) and all(type(token) is int and 0 <= token < 2**32 for token in value)


Text = Annotated[str, AfterValidator(check_text)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
ModelReference = Annotated[Text, Field(max_length=MAX_REFERENCE_CHARACTERS)]
Cartridges = Annotated[list[ModelReference], FirstError(), Field(min_length=1, max_length=16)]
Rope = Literal["keep", "shift"]
