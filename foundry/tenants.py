"""Whose something is: the part of a name before its slash. The tenant "" has the names without one."""

from __future__ import annotations

import re

from foundry.errors import InvalidArgument

# The other parts of names are spelt so too.
TENANT = r"[a-z0-9][a-z0-9._-]{0,62}"
_TENANT = re.compile(TENANT)


def check_tenant(tenant: str, *, field: str = "tenant") -> str:
    """Raises InvalidArgument unless `tenant` may stand before the slash of a name, or is "" for names without one."""
    if tenant and not _TENANT.fullmatch(tenant):
        raise InvalidArgument(
            f"{tenant[:100]!r} is not a tenant: expected lower-case letters, digits and '._-', starting with a letter "
            "or digit, at most 63 characters, or nothing for names without a tenant",
            field=field,
        )
    return tenant
