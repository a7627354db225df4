"""The manifest of a version: what it is, where it came from. Written once, last, and never changed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from foundry.errors import InvalidArgument
from foundry.identity import CartridgeHeader, check_digest
from foundry.store.names import CartridgeId, check_name, check_run, check_version
from foundry.store.sealed import seal, unseal

_TEXTS = ("run", "document", "init", "objective", "created_at")
_COUNTS = ("attempt", "step", "tokens_seen")


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestDraft:
    """What a publisher says about a version before the store gives it a number."""

    name: str
    # Who publishes; `attempt` is the fencing token. Importers use a run of their own, such as "import-8a1f".
    run: str
    attempt: int
    step: int
    # Digests of the version it was trained from and of the document it stands in for, where there are such.
    parent: str | None = None
    document: str | None = None
    init: str = ""
    objective: str = ""
    tokens_seen: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        check_run(self.run)
        for name in _COUNTS:
            if getattr(self, name) < 0:
                raise InvalidArgument(f"manifest {name} is {getattr(self, name)}, must not be negative", field=name)
        for name in ("parent", "document"):
            if (digest := getattr(self, name)) is not None:
                check_digest(digest, field=name)
        for metric, value in self.metrics.items():
            # JSON has no NaN: a reader in another language would refuse the manifest.
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise InvalidArgument(f"metric {metric!r} is {value!r}, not a finite number", field="metrics")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(ManifestDraft):
    """One version of a cartridge. `created_at` is RFC 3339, UTC."""

    header: CartridgeHeader
    digest: str
    version: int
    created_at: str

    def __post_init__(self) -> None:
        # super() without arguments does not work in a dataclass with slots: the class is made twice.
        ManifestDraft.__post_init__(self)
        check_digest(self.digest)
        check_version(self.version)

    @classmethod
    def of(
        cls, draft: ManifestDraft, *, header: CartridgeHeader, digest: str, version: int, created_at: str
    ) -> Manifest:
        values = {entry.name: getattr(draft, entry.name) for entry in fields(ManifestDraft)}
        return cls(**values, header=header, digest=digest, version=version, created_at=created_at)

    @property
    def id(self) -> CartridgeId:
        return CartridgeId(self.name, self.version, self.digest)

    def to_json(self) -> str:
        return seal(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Raises InvalidArgument on unknown or missing keys, wrong types, and on anything that is not a manifest."""
        values = unseal(text, "manifest")
        known = {entry.name for entry in fields(cls)}
        if wrong := (set(values) ^ known):
            raise InvalidArgument(f"manifest has unknown fields or lacks some: {sorted(wrong)}", field=min(wrong))
        for name in (*_COUNTS, "version"):
            if type(values[name]) is not int:
                raise InvalidArgument(f"manifest {name} is {values[name]!r}, not an integer", field=name)
        for name in ("name", "run", "digest", "init", "objective", "created_at"):
            if not isinstance(values[name], str):
                raise InvalidArgument(f"manifest {name} is {values[name]!r}, not a string", field=name)
        for name in ("parent", "document"):
            if not isinstance(values[name], str | None):
                raise InvalidArgument(f"manifest {name} is {values[name]!r}, not a string or null", field=name)
        for name in ("header", "metrics"):
            if not isinstance(values[name], dict):
                raise InvalidArgument(f"manifest {name} is {values[name]!r}, not an object", field=name)
        values["header"] = CartridgeHeader.from_dict(values["header"])
        return cls(**values)
