"""Who asks: the tenant that what is named belongs to, and what may be done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from foundry.store.api_keys import KeyLimits, Scope


@dataclass(frozen=True, slots=True)
class Principal:
    """`client` tells callers apart, within and across tenants: the id of a key. Where there are no keys it is "", and
    `tenant` None: everybody sees and may do everything. The tenant "" has the names without a slash."""

    client: str = ""
    tenant: str | None = None
    scopes: frozenset[Scope] = frozenset(get_args(Scope))
    limits: KeyLimits = field(default_factory=KeyLimits)
