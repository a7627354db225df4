"""One stack for all of these tests: it takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from foundry.model.template import ChatTemplate
from tests.contract.openai_api.served import BASE, Served
from tests.services import open_stack, openai_client, wait_ready, wait_serving
from tests.tiny import CLOCK


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One stack with versions 1 and 2 of `handbook`, of which 1 is tagged `good`, and `acme/manual`."""
    directory: Path = tmp_path_factory.mktemp("gateway")
    with open_stack(directory) as stack:
        rollout = stack.rollout("--model-name", BASE)
        tokenizer = str(stack.model / "tokenizer.json")
        gateway = stack.gateway([rollout], "--tokenizer", tokenizer, "--max-choices", "8")
        cartridges = [stack.cartridge(seed=1), stack.cartridge(seed=2, num_tokens=7)]
        manifests = stack.publish("handbook", *cartridges)
        (tenant,) = stack.publish("acme/manual", stack.cartridge(seed=3))
        stack.with_store(lambda store: store.tag("handbook", "good", 1))
        wait_serving(rollout)
        wait_ready(gateway)
        with openai_client(gateway) as client:
            yield Served(stack, client, cartridges, manifests, tenant, ChatTemplate(stack.lm.tokenizer, CLOCK))
