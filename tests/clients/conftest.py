"""A gateway before a tiny model and a cartridge of it, as clients of other people meet it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from foundry.model.cartridge import Cartridge
from tests.services import Stack, open_stack, wait_ready, wait_serving
from tests.tiny import TOOLS_CHATML

BASE = "tiny"
CARTRIDGE = "handbook"
TIDE = {
    "type": "function",
    "function": {
        "name": "tide",
        "description": "When the tide is high in a harbour.",
        "parameters": {
            "type": "object",
            "properties": {"harbour": {"type": "string", "enum": ["Bergen", "Vardø"]}},
            "required": ["harbour"],
            "additionalProperties": False,
        },
    },
}


@dataclass
class Site:
    stack: Stack
    # Of the OpenAI routes.
    url: str
    cartridge: Cartridge


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The base model and version 1 of `handbook`."""
    with open_stack(tmp_path_factory.mktemp("clients"), chat_template=TOOLS_CHATML) as stack:
        rollout = stack.rollout("--model-name", BASE)
        gateway = stack.gateway([rollout], "--tokenizer", str(stack.model / "tokenizer.json"))
        cartridge = stack.cartridge(seed=1)
        stack.publish(CARTRIDGE, cartridge)
        wait_serving(rollout)
        wait_ready(gateway)
        yield Site(stack, f"http://{gateway.address}/v1", cartridge)
