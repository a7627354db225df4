"""A gateway before real services of a tiny model, and a client of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

from foundry.client import FoundryClient
from tests.services import Process, Stack

DOCUMENT = "The treaty was signed in the spring. " * 8


@dataclass
class Site:
    stack: Stack
    rollout: Process
    gateway: Process
    client: FoundryClient

    def http(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        return httpx.request(method, f"http://{self.gateway.address}{path}", trust_env=False, timeout=60, **arguments)


def specification(**changes: Any) -> dict[str, Any]:
    prompts = {"kind": "selfstudy", "num_prompts": 4}
    return {"name": "handbook", "num_tokens": 16, "num_steps": 2, "max_new_tokens": 8, "prompts": prompts} | changes
