"""Data sets: what runs train on, kept in shards that are written once and never changed.

A data set is named by the digest of all that decides what is in it, so that equal runs of a tenant share one, and an
attempt that was killed while it wrote goes on behind the last shard that stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from foundry.errors import DigestMismatch, InvalidArgument, NotFound
from foundry.store.objects import layout
from foundry.store.objects.objects import Objects
from foundry.store.sealed import seal, unseal
from foundry.store.spec import Digest
from foundry.tenants import check_tenant
from foundry.validation import Checked, Number

Json = dict[str, Any]


class DatasetSummary(Checked):
    """What a whole data set holds: the digest of its content, and counts and coverage by family."""

    digest: Digest
    families: Mapping[str, Mapping[str, Number]]


class _Shard(Checked):
    family: str
    number: int
    rows: list[Json]


class DatasetStore:
    """The data sets of one tenant."""

    def __init__(self, objects: Objects, *, tenant: str = "") -> None:
        self._objects, self._tenant = objects, check_tenant(tenant)

    def of(self, tenant: str) -> Self:
        """Those of another tenant. Raises InvalidArgument unless it is spelt as one."""
        return type(self)(self._objects, tenant=tenant)

    async def shard(self, dataset: str, family: str, number: int) -> list[Json] | None:
        """The rows of a shard; None if it is not written yet. Raises DigestMismatch if it is damaged."""

        def parse(content: bytes) -> list[Json]:
            shard = _Shard.model_validate(unseal(content))
            if (shard.family, shard.number) != (family, number):
                raise InvalidArgument(f"it is shard {shard.number} of {shard.family}")
            return shard.rows

        try:
            return await self._objects.record(layout.dataset_shard(self._tenant, dataset, family, number), parse)
        except NotFound:
            return None

    async def following(
        self, dataset: str, parts: Sequence[str], after: tuple[str, int] | None = None
    ) -> tuple[str, int, list[Json]] | None:
        """The shard behind `after`, or the first one, going through `parts` in their order, with what it is of and its
        number; None behind the last. Raises InvalidArgument for an `after` of no such part, DigestMismatch."""
        if after is not None:
            family, number = after
            if family not in parts:
                raise InvalidArgument(f"{family[:100]!r} is no part of the data set", field="after")
            if (rows := await self.shard(dataset, family, number + 1)) is not None:
                return family, number + 1, rows
            parts = parts[parts.index(family) + 1 :]
        for family in parts:
            if (rows := await self.shard(dataset, family, 0)) is not None:
                return family, 0, rows
        return None

    async def append(self, dataset: str, family: str, number: int, rows: Sequence[Mapping[str, Any]]) -> list[Json]:
        """Write a shard, unless another has written it; returns what stands then."""
        content = seal({"family": family, "number": number, "rows": list(rows)}).encode()
        await self._objects.put_if_absent(layout.dataset_shard(self._tenant, dataset, family, number), content)
        written = await self.shard(dataset, family, number)
        if written is None:
            raise DigestMismatch(f"shard {number} of {family} of data set {dataset} is gone")
        return written

    async def finish(self, dataset: str, summary: DatasetSummary) -> DatasetSummary:
        """Say that all shards are there. Raises DigestMismatch if another said so of other content."""
        key = layout.dataset_summary(self._tenant, dataset)
        await self._objects.put_if_absent(key, seal(summary.model_dump()).encode())
        stands = await self.summary(dataset)
        if stands.digest != summary.digest:
            raise DigestMismatch(f"data set {dataset} holds {summary.digest}, its record says {stands.digest}")
        return stands

    async def delete(self, dataset: str) -> None:
        """Nothing to delete is no error."""
        # What says that it is whole goes first.
        whole = layout.dataset_summary(self._tenant, dataset)
        for key in [whole, *await self._objects.keys(layout.dataset(self._tenant, dataset))]:
            await self._objects.delete(key)

    async def summary(self, dataset: str) -> DatasetSummary:
        """Raises NotFound while the data set is not whole, DigestMismatch if its record is damaged."""
        return await self._objects.record(
            layout.dataset_summary(self._tenant, dataset),
            lambda content: DatasetSummary.model_validate(unseal(content)),
        )
