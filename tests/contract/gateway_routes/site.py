"""A gateway before real services of a tiny model, and a client of it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import httpx

from foundry.client import FoundryClient
from foundry.store import ApiKey, CartridgeStore
from foundry.store.api_keys import Scope
from tests.process import Process
from tests.services import Stack

DOCUMENT = "The treaty was signed in the spring. " * 8


@dataclass
class Site:
    stack: Stack
    rollout: Process
    gateway: Process
    client: FoundryClient

    def http(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return httpx.request(method, f"http://{self.gateway.address}{path}", trust_env=False, timeout=60, **arguments)


ADMIN_KEY = "fdy_bootstrapkey_" + "a" * 43


@dataclass
class Guarded:
    """A gateway that asks for keys, and the store in which they are."""

    stack: Stack
    gateway: Process

    def key(
        self, *scopes: Scope, tenant: str = "", expires_at: datetime | None = None, revoked: bool = False
    ) -> tuple[ApiKey, str]:
        async def make(store: CartridgeStore) -> tuple[ApiKey, str]:
            key, text = await store.api_keys.create(tenant=tenant, scopes=scopes, expires_at=expires_at)
            if revoked:
                await store.api_keys.revoke(key.key_id)
            return key, text

        return self.stack.with_store(make)

    def http(self, method: str, path: str, key: str | None, **arguments: Any) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        headers |= arguments.pop("headers", {})
        return httpx.request(
            method, f"http://{self.gateway.address}{path}", trust_env=False, timeout=60, headers=headers, **arguments
        )


def specification(**changes: Any) -> dict[str, Any]:
    prompts = {"kind": "selfstudy", "num_prompts": 4}
    return {"name": "handbook", "num_tokens": 16, "num_steps": 2, "max_new_tokens": 8, "prompts": prompts} | changes
