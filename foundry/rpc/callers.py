"""For whom a call is made, as it stands in the call: checked before anything is kept or counted under it."""

from __future__ import annotations

from foundry.errors import InvalidArgument
from foundry.tenants import check_tenant
from foundry.v1 import common_pb2

_MAX_CLIENT_CHARACTERS = 128


def check_caller(caller: common_pb2.Caller) -> common_pb2.Caller:
    """Raises InvalidArgument. One that is not set is a client as others, of the tenant ""."""
    check_tenant(caller.tenant, field="caller.tenant")
    if len(caller.client) > _MAX_CLIENT_CHARACTERS:
        raise InvalidArgument(
            f"the client has {len(caller.client)} characters, at most {_MAX_CLIENT_CHARACTERS} are taken",
            field="caller.client",
        )
    return caller
