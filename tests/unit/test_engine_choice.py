"""Which engine `auto` is, by what is installed and what the model is."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from transformers import BloomConfig, LlamaConfig

from foundry.store import StoreSettings
from services.rollout.engine_choice import choose_engine
from services.rollout.settings import RolloutSettings

STORE = StoreSettings.model_validate({"redis_url": "redis://127.0.0.1:1/0", "objects_url": "memory://"})


def settings(model: Path, **values: Any) -> RolloutSettings:
    return RolloutSettings(model=model, store=STORE, **values)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts packages where they are found, or lets them be absent whatever is installed."""

    def install(**packages: bool) -> None:
        for name, there in packages.items():
            if not there:
                monkeypatch.setitem(sys.modules, name, None)
            elif find_spec(name) is None:
                (tmp_path / "packages" / name).mkdir(parents=True)
                (tmp_path / "packages" / name / "__init__.py").touch()
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))

    return install


@pytest.mark.parametrize(
    ("family", "triton", "vllm", "engine", "why"),
    [
        (LlamaConfig, True, True, "torch", "CUDA graphs"),
        (LlamaConfig, False, True, "vllm", "Triton, which .* is not installed$"),
        (LlamaConfig, False, False, "torch", "Triton, which .* is not installed; nor is vLLM installed"),
        (BloomConfig, True, True, "vllm", "no attention interface for bloom"),
        (BloomConfig, True, False, "torch", "no attention interface for bloom.*; nor is vLLM"),
    ],
)
def test_on_cuda_it_is_the_built_in_one_unless_that_cannot_run_the_model(
    tmp_path: Path, install: Any, family: Any, triton: bool, vllm: bool, engine: str, why: str
) -> None:
    family().save_pretrained(tmp_path)
    install(triton=triton, vllm=vllm)
    with capture_logs() as logs:
        assert choose_engine(settings(tmp_path, device="cuda:1")).engine == engine
    (line,) = logs
    assert line["engine"] == engine
    assert re.search(why, line["why"])


def test_without_cuda_it_is_the_built_in_one(tmp_path: Path, install: Any) -> None:
    install(triton=True, vllm=True)
    assert choose_engine(settings(tmp_path)).engine == "torch"


def test_what_is_named_is_taken(tmp_path: Path) -> None:
    for name in ("torch", "vllm"):
        assert choose_engine(settings(tmp_path, engine=name, device="cuda")).engine == name


def test_a_model_that_is_not_there_is_left_to_who_loads_it(tmp_path: Path, install: Any) -> None:
    install(triton=True, vllm=True)
    assert choose_engine(settings(tmp_path / "no", device="cuda")).engine == "torch"
