"""What references mean: by Redis; while it is away by what they last meant to this process, else by object storage."""

from __future__ import annotations

import time
from collections import OrderedDict

import structlog

from foundry.errors import CartridgeNotFound, StoreUnavailable
from foundry.store.names import CartridgeId, Reference
from foundry.store.objects.versions import Durable
from foundry.store.redis.pointers import Pointers

log = structlog.get_logger(__name__)

_LAST_KNOWN_REFERENCES = 1024


class Resolver:
    """See `CartridgeStore.resolve`."""

    def __init__(self, pointers: Pointers, durable: Durable) -> None:
        self._pointers, self._durable = pointers, durable
        # Reference -> what it meant and when (monotonic seconds). Used only while Redis is gone.
        self._last_known: OrderedDict[Reference, tuple[CartridgeId, float]] = OrderedDict()

    async def resolve(self, reference: Reference) -> CartridgeId:
        try:
            found = await self._pointers.lookup(reference)
        except StoreUnavailable as unavailable:
            return self._from_memory(reference) or await self._from_objects(reference, unavailable)
        self._last_known[reference] = (found, time.monotonic())
        self._last_known.move_to_end(reference)
        if len(self._last_known) > _LAST_KNOWN_REFERENCES:
            self._last_known.popitem(last=False)
        return found

    def forget(self, name: str) -> None:
        for reference in [known for known in self._last_known if known.name == name]:
            del self._last_known[reference]

    def _from_memory(self, reference: Reference) -> CartridgeId | None:
        if (known := self._last_known.get(reference)) is None:
            return None
        found, since = known
        if not reference.immutable:
            age = time.monotonic() - since
            log.warning("resolved_from_memory", reference=str(reference), found=str(found), age_seconds=round(age, 1))
        return found

    async def _from_objects(self, reference: Reference, unavailable: StoreUnavailable) -> CartridgeId:
        try:
            found = await self._durable.resolve(reference)
        except CartridgeNotFound:
            # It may have been hot.
            raise unavailable from None
        log.warning("resolved_from_object_storage", reference=str(reference), found=str(found))
        return found
