"""The manifest of a version: what it is, where it came from. Written once, last, and never changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, WrapValidator

from foundry.errors import InvalidArgument
from foundry.identity import CartridgeHeader
from foundry.store.names import MAX_VERSION, CartridgeId, check_name, check_run
from foundry.store.sealed import seal, unseal
from foundry.store.spec import Digest
from foundry.validation import Checked, Number, Time, checked

# Counts pass through Lua, as versions do.
MAX_COUNT = MAX_VERSION


class ManifestDraft(Checked):
    """What a publisher says about a version before the store gives it a number."""

    name: Annotated[str, checked(check_name)]
    """Name of the cartridge."""

    run: Annotated[str, checked(check_run)]
    """Who publishes. Importers use a run of their own, such as `import-8a1f`."""

    attempt: int = Field(ge=0, le=MAX_COUNT)
    """The run's attempt: the fencing token."""

    step: int = Field(ge=0, le=MAX_COUNT)
    """Optimiser steps before this version."""

    parent: Digest | None = None
    """Digest of the version that it was trained from."""

    document: Digest | None = None
    """Digest of the document that it stands in for."""

    init: str = ""
    """How the first version was made."""

    objective: str = ""
    """The loss it was trained with."""

    tokens_seen: int = Field(default=0, ge=0, le=MAX_COUNT)
    """Tokens of answers that it was trained on."""

    metrics: Mapping[str, Number] = {}
    """What was measured at its step."""


def _header(value: Any, read: Any) -> CartridgeHeader:
    # Not pydantic's reading of a dataclass: a header checks itself.
    if isinstance(value, CartridgeHeader):
        return value
    return CartridgeHeader.from_dict(value)


class Manifest(ManifestDraft):
    """One version of a cartridge."""

    header: Annotated[CartridgeHeader, WrapValidator(_header)]
    """What its bytes are, besides themselves."""

    digest: Digest
    """Of header and bytes."""

    version: int = Field(ge=1, le=MAX_VERSION)
    """Its number."""

    created_at: Time
    """RFC 3339, UTC."""

    @classmethod
    def of(
        cls, draft: ManifestDraft, *, header: CartridgeHeader, digest: str, version: int, created_at: str
    ) -> Manifest:
        return cls(**dict(draft), header=header, digest=digest, version=version, created_at=created_at)

    @property
    def id(self) -> CartridgeId:
        return CartridgeId(self.name, self.version, self.digest)

    def to_json(self) -> str:
        return seal(self.model_dump())

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Raises InvalidArgument on unknown or missing keys, wrong types, and on anything that is not a manifest."""
        values = unseal(text)
        if wrong := (set(values) ^ set(cls.model_fields)):
            raise InvalidArgument(f"manifest has unknown fields or lacks some: {sorted(wrong)}", field=min(wrong))
        return cls(**values)
