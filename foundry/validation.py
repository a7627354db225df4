"""Pydantic models whose refusals are ours: InvalidArgument with the field and a plain message."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    FailFast,
    ModelWrapValidatorHandler,
    PlainSerializer,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from foundry.errors import InvalidArgument

# More than any object of ours has.
_MAX_KEYS = 256
_OF_FIELD = "of_field"
OWN_ERRORS = frozenset({"value_error", _OF_FIELD})
"""Types of the errors that validators of ours make, whose words are for people."""


class Strict(BaseModel):
    """Frozen; takes no unknown key, no value of another type, no NaN. A part of a `Checked`, or built by ourselves."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _count_keys(cls, values: Any) -> Any:
        # Pydantic makes an error of each unknown one.
        if isinstance(values, dict) and len(values) > _MAX_KEYS:
            raise ValueError(f"an object has {len(values)} keys, at most {_MAX_KEYS} are read")
        return values


class FirstError(FailFast):
    """Of a list's errors pydantic makes the first one only. Stands right behind the list; hashable, as unions want."""

    def __hash__(self) -> int:
        return hash(type(self))


class Checked(Strict):
    """Raises InvalidArgument, naming the field, where pydantic would raise an error of its own."""

    # What tells the members of a union apart: pydantic writes it between the names of fields.
    tags: ClassVar[Collection[str]] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            raise invalid_argument(error.errors()[0], tags=cls.tags) from error


def invalid_argument(error: ErrorDetails, *, tags: Collection[str] = ()) -> InvalidArgument:
    """One of pydantic's errors as ours; its field is written with dots, as in `prompts.num_prompts`.

    It says what is wanted, never what came: that may be large or nobody else's business.
    """
    path, message = error["loc"], error["msg"].removeprefix("Value error, ")
    if error["type"] == _OF_FIELD:
        path = (*path, error["ctx"]["field"])
    if not path:
        return InvalidArgument(message if error["type"] in OWN_ERRORS else "expected a JSON object")
    field = ".".join(str(part) for place, part in enumerate(path) if not (place and part in tags))
    if error["type"] == _OF_FIELD:
        return InvalidArgument(f"{field} {message}", field=field)
    if error["type"].startswith("union_tag"):
        field += "." + error["ctx"]["discriminator"].strip("'")
        known = error["ctx"].get("expected_tags", ", ".join(map(repr, tags)))
        return InvalidArgument(f"{field} must be one of {known}", field=field)
    if error["type"] == "missing":
        return InvalidArgument(f"{field} is missing", field=field)
    if error["type"] == "extra_forbidden":
        return InvalidArgument(f"unknown parameter {field!r}", field=field)
    if message.startswith("Input should be "):
        # Pydantic's own words for an object name the class.
        wanted = "an object" if error["type"].startswith("model_") else message.removeprefix("Input should be ")
        return InvalidArgument(f"{field} must be {wanted}", field=field)
    return InvalidArgument(f"{field}: {message[:1].lower()}{message[1:]}", field=field)


def of_field(field: str, message: str) -> PydanticCustomError:
    """For validators of a whole object: `message`, which goes on after the field's name, about one of its fields. It is
    named as it stands in the request, where an InvalidArgument would know its last part only."""
    return PydanticCustomError(_OF_FIELD, "{message}", {"field": field, "message": message})


def checked(check: Callable[[str], str]) -> AfterValidator:
    """`check` may raise InvalidArgument; the field that is named is where the value stands."""

    def run(value: str) -> str:
        try:
            return check(value)
        except InvalidArgument as error:
            raise ValueError(error.message) from error

    return AfterValidator(run)


def _as_given(value: Any, handler: Callable[[Any], float]) -> Any:
    handler(value)
    if isinstance(value, int) and abs(value) >= 2**63:
        # It would be written down as it is, and not be read again.
        raise ValueError("an integer of more than 64 bits: write it as 1e30")
    return value


def _utc(value: str) -> str:
    # A time without a zone has no offset, and can't be compared with one that has.
    if datetime.fromisoformat(value).utcoffset() != timedelta(0):
        raise ValueError(f"{value!r} is not a time in UTC")
    return value


# RFC 3339, UTC.
Time = Annotated[str, AfterValidator(_utc)]
# A float that stays an integer where one was written, so that its JSON, of which there are digests, does too.
Number = Annotated[float, WrapValidator(_as_given), PlainSerializer(lambda number: number, return_type=int | float)]
