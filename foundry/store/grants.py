"""Grants: another tenant may query a cartridge."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from foundry.errors import GrantNotFound, InvalidArgument, NotFound
from foundry.store.names import check_name
from foundry.store.objects import layout
from foundry.store.objects.known import Known, refreshed
from foundry.store.objects.objects import Objects
from foundry.store.paging import Page, cut
from foundry.store.sealed import seal, unseal
from foundry.tenants import check_tenant
from foundry.validation import Checked, Time, checked


class Grant(Checked):
    """`tenant` may query the cartridge `name`, which is another tenant's."""

    name: Annotated[str, checked(check_name)]
    tenant: Annotated[str, checked(check_tenant)]
    granted_at: Time


class GrantStore:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    async def put(self, name: str, tenant: str) -> Grant:
        """A grant that stands already stays as it is; a damaged one is written anew.

        Raises InvalidArgument for a name without a tenant, which within any other tenant means a cartridge of its own,
        and for the tenant whose the name is.
        """
        record = layout.grant(name, tenant)
        owner, slash, _ = name.partition("/")
        if not slash or not tenant or owner == tenant:
            raise InvalidArgument(
                "only a cartridge with a tenant's name before the slash can be granted, and only to another tenant "
                f"that has a name: not {name} to {tenant or 'the one without'}",
                field="tenant",
            )
        granted_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        content = seal(Grant(name=name, tenant=tenant, granted_at=granted_at).model_dump()).encode()
        if not await self._objects.put_if_absent(record, content):
            for standing in await self._read([record]):
                return standing
            await self._objects.put(record, [content])
        return _parse(record, content)

    async def get(self, name: str, tenant: str) -> Grant:
        """Raises GrantNotFound, DigestMismatch if the record is damaged: then it grants nothing."""
        record = layout.grant(name, tenant)
        try:
            return await self._objects.record(record, partial(_parse, record))
        except NotFound as error:
            raise _missing(name, tenant) from error

    async def delete(self, name: str, tenant: str) -> None:
        """Raises GrantNotFound."""
        record = layout.grant(name, tenant)
        if not await self._objects.exists(record):
            raise _missing(name, tenant)
        await self._objects.delete(record)

    async def delete_name(self, name: str) -> None:
        """All of a cartridge that is deleted: whoever takes its name later has granted nothing."""
        for record in await self._objects.keys_here(layout.grants(name)):
            await self._objects.delete(record)

    async def of_name(self, name: str) -> list[Grant]:
        """By tenant; damaged ones are left out."""
        return (await self.page(name, limit=sys.maxsize)).items

    async def page(self, name: str, *, after: str = "", limit: int) -> Page[Grant]:
        """Some of them, behind the tenant `after`. Raises InvalidArgument."""
        records = await self._objects.keys_here(layout.grants(check_name(name)))
        tenants, next_after = cut(
            [match["tenant"] for match in map(layout.GRANT.fullmatch, records) if match], after, limit
        )
        return Page(await self._read(layout.grant(name, tenant) for tenant in tenants), next_after)

    async def for_tenant(self, tenant: str) -> list[Grant]:
        """By name; damaged ones are left out."""
        return await self._read(
            [
                record
                for record in await self._objects.keys(layout.GRANTS)
                if (match := layout.GRANT.fullmatch(record)) and match["tenant"] == tenant
            ]
        )

    async def refreshed(self, known: Mapping[str, Known[Grant]]) -> dict[str, Known[Grant]]:
        """All grants by record. Read are only those that changed since `known`."""
        return await refreshed(self._objects, "grant", layout.GRANTS, layout.GRANT, _parse, known)

    async def _read(self, records: Iterable[str]) -> list[Grant]:
        return [*(await self._objects.records("grant", records, _parse)).values()]


def _parse(record: str, content: bytes) -> Grant:
    grant = Grant.model_validate(unseal(content))
    if layout.grant(grant.name, grant.tenant) != record:
        raise InvalidArgument(f"it is the record of {grant.name} for {grant.tenant}")
    return grant


def _missing(name: str, tenant: str) -> GrantNotFound:
    return GrantNotFound(f"{name} is not granted to {tenant or 'the tenant without a name'}", field="tenant")
