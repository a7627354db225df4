"""Names of cartridges as a tenant writes them: `handbook` of the tenant `acme` is `acme/handbook`.

What belongs to somebody else is answered like what does not exist, without a look at the store.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from foundry.errors import CartridgeNotFound, FoundryError
from foundry.store import Reference, check_name
from services.gateway.access.principal import Principal


def full_name(principal: Principal, name: str, *, missing: FoundryError | None = None) -> str:
    """Raises InvalidArgument; and for another tenant's name `missing`, which is what the caller says of a name that
    does not exist."""
    check_name(name)
    if (whole := _within(principal.tenant, name)) is None:
        raise missing or CartridgeNotFound(f"there is no cartridge {name}", field="name")
    return whole


def full_reference(principal: Principal, text: str, *, field: str, to_query: bool = False) -> Reference:
    """`to_query` takes those too that others granted. Raises InvalidArgument, CartridgeNotFound; both name `field`."""
    reference = Reference.parse(text, field=field)
    if to_query and reference.name in principal.granted:
        return reference
    if (whole := _within(principal.tenant, reference.name)) is None:
        raise CartridgeNotFound(f"there is no cartridge {reference}", field=field)
    return replace(reference, name=whole)


def full_text(principal: Principal, text: str, *, field: str, to_query: bool = False) -> str:
    """A reference with its whole name, otherwise as it was written. Raises as `full_reference` does."""
    _, at, selector = text.partition("@")
    return full_reference(principal, text, field=field, to_query=to_query).name + at + selector


def visible(principal: Principal, names: Iterable[str]) -> list[str]:
    """Those that the principal may know of: its tenant's, and what others granted."""
    # Of a whole name a tenant's own stays as it is, and one without a tenant does not.
    return [name for name in names if name in principal.granted or _within(principal.tenant, name) == name]


def _within(tenant: str | None, name: str) -> str | None:
    """The whole name; None if it is another tenant's."""
    owner, slash, _ = name.partition("/")
    if tenant is None or (slash and owner == tenant):
        return name
    if slash:
        return None
    return f"{tenant}/{name}" if tenant else name
