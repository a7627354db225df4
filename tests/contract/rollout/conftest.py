"""The tiny model that the servers serve, and a server of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from foundry.model.lm import FrozenLM
from tests.contract.rollout.server import Rollout, serving
from tests.tiny import build_tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def lm(directory: Path) -> FrozenLM:
    return FrozenLM.load(directory)


@pytest.fixture
async def rollout(lm: FrozenLM, directory: Path) -> AsyncIterator[Rollout]:
    async with serving(lm, directory) as running:
        yield running
