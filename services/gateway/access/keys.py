"""All keys of the store in memory."""

from __future__ import annotations

from foundry.errors import StoreUnavailable
from foundry.store import ApiKey, KeyStore
from foundry.store.objects import layout
from services.gateway.access.remembered import Remembered


class Keys(Remembered[ApiKey]):
    def __init__(self, store: KeyStore) -> None:
        super().__init__("API keys", store)

    async def find(self, key_id: str) -> ApiKey | None:
        """None if there is no such key, or its record is damaged. Looks at the store for an unknown id, at most once a
        second for all of them. Raises StoreUnavailable if that can't be known now."""
        record = layout.api_key(key_id)
        if record not in self._known:
            await self._look()
            if record not in self._known and self._failed:
                raise StoreUnavailable("the API keys can't be read now: the gateway's log says why")
        known = self._known.get(record)
        return None if known is None else known.value
