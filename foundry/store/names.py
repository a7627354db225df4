"""Names of cartridges and references to versions: `name`, `name@17`, `name@latest`, `name@tag`, `name@blake3:HEX`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from foundry.errors import InvalidArgument
from foundry.identity import check_digest
from foundry.tenants import TENANT, check_tenant
from foundry.untrusted import parse_count

LATEST = "latest"
# 2**53: versions pass through Lua, whose numbers are doubles.
MAX_VERSION = 2**53 - 1

NAME = rf"{TENANT}(?:/{TENANT})?"
_NAME = re.compile(NAME)
_TAG = re.compile(TENANT)
# What the gateway's paths have behind a name: `team/versions` would be the versions of `team` there.
RESERVED = frozenset({"compare", "file", "grants", "rollback", "tags", "versions"})
RUN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_RUN = re.compile(RUN)
_VERSION = re.compile(r"[0-9]{1,16}")


@dataclass(frozen=True, slots=True)
class CartridgeId:
    """One immutable version. The digest alone decides which bytes are meant."""

    name: str
    version: int
    digest: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Reference:
    """What a caller wrote: a name and how to choose among its versions.

    `selector` is a version (int), a digest (`blake3:…`) or a pointer (`latest` or a tag).
    """

    name: str
    selector: int | str

    @classmethod
    def parse(cls, text: str, *, field: str = "model") -> Reference:
        """Raises InvalidArgument (naming `field`) on anything that is not a reference."""
        name, at, selector = text.partition("@")
        check_name(name, field=field)
        if not at:
            return cls(name, LATEST)
        if _VERSION.fullmatch(selector):
            return cls(name, check_version(int(selector), field=field))
        if ":" in selector:
            return cls(name, check_digest(selector, field=field))
        if selector == LATEST:
            return cls(name, LATEST)
        return cls(name, check_tag(selector, field=field))

    @property
    def immutable(self) -> bool:
        """True if it can never come to mean another digest."""
        return isinstance(self.selector, int) or self.selector.startswith("blake3:")

    def __str__(self) -> str:
        return f"{self.name}@{self.selector}"


def check_name(name: str, *, field: str = "name") -> str:
    """Raises InvalidArgument unless `name` is `part` or `tenant/part`."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"{name[:100]!r} is not a cartridge name: expected lower-case letters, digits and '._-', starting with a "
            "letter or digit, at most 63 characters, optionally with 'tenant/' before it",
            field=field,
        )
    return name


def check_new_name(name: str, *, field: str = "name") -> str:
    """Raises InvalidArgument unless a cartridge of that name can be made: each has a path of its own at the gateway."""
    if tenant_of(check_name(name, field=field)) and name.rpartition("/")[2] in RESERVED:
        raise InvalidArgument(
            f"{name!r} can't be a cartridge's name: behind a slash {', '.join(sorted(RESERVED))} are words of the "
            "gateway's paths; choose another",
            field=field,
        )
    return name


def tenant_of(name: str) -> str:
    """Whose a cartridge of that name is."""
    return name.rpartition("/")[0]


def check_tenant_of(tenant: str, name: str) -> str:
    """Raises InvalidArgument unless a run of `tenant` may publish under `name`: one of "" may under any."""
    if check_tenant(tenant) not in ("", tenant_of(name)):
        raise InvalidArgument(
            f"cartridge {name} is not tenant {tenant}'s: its names begin with {tenant}/", field="name"
        )
    return tenant


def check_tag(tag: str, *, field: str = "tag") -> str:
    """Raises InvalidArgument unless `tag` can be told from a version, from `latest` and from a digest."""
    if tag == LATEST:
        raise InvalidArgument("'latest' follows the versions by itself and can't be set as a tag", field=field)
    if not _TAG.fullmatch(tag) or tag.isdigit():
        raise InvalidArgument(
            f"{tag[:100]!r} is not a tag: expected lower-case letters, digits and '._-', at most 63 characters, "
            "not digits only",
            field=field,
        )
    return tag


def check_version(version: int, *, field: str = "version") -> int:
    """Raises InvalidArgument unless `version` is within 1..2**53-1."""
    if not 1 <= version <= MAX_VERSION:
        raise InvalidArgument(f"{version} is not a version: expected 1..{MAX_VERSION}", field=field)
    return version


def parse_version(text: str) -> int:
    """Raises InvalidArgument."""
    return check_version(parse_count(text))


def check_run(run: str, *, field: str = "run") -> str:
    """Raises InvalidArgument unless `run` is spelt as the id of a run or importer."""
    if not _RUN.fullmatch(run):
        raise InvalidArgument(
            f"{run[:100]!r} is not a run id: expected letters, digits and '._-', at most 128 characters", field=field
        )
    return run
