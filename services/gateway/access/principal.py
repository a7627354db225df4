"""Who asks: the tenant that what is named belongs to, and what may be done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, get_args

from fastapi import Depends, Request

from foundry.store.api_keys import KeyLimits, Scope
from foundry.v1 import common_pb2


@dataclass(frozen=True, slots=True)
class Principal:
    """`client` tells callers apart, within and across tenants: the id of a key. Where there are no keys it is "", and
    `tenant` None: everybody sees and may do everything. The tenant "" has the names without a slash."""

    client: str = ""
    tenant: str | None = None
    scopes: frozenset[Scope] = frozenset(get_args(Scope))
    limits: KeyLimits = field(default_factory=KeyLimits)
    # Names of other tenants' cartridges that may be queried.
    granted: frozenset[str] = frozenset()

    def caller(self, request_id: str) -> common_pb2.Caller:
        """To whom rollout servers and teachers give a turn. Where there are no keys, to each request."""
        return common_pb2.Caller(tenant=self.tenant or "", client=self.client or request_id)


async def _of_request(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


PrincipalDep = Annotated[Principal, Depends(_of_request)]
