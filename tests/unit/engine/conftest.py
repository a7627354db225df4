"""The tiny models that engines run."""

from __future__ import annotations

import pytest

from foundry.model.lm import FrozenLM
from tests.tiny import build_tiny_model


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def any_lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp(request.param), request.param))


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp("model")))
