"""Commands find a home of their own, and no gateway that the environment names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOUNDRY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FOUNDRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FOUNDRY_GATEWAY", raising=False)
    monkeypatch.delenv("FOUNDRY_API_KEY", raising=False)
    for variable in [name for name in os.environ if name.startswith("FOUNDRY_STORE__")]:
        monkeypatch.delenv(variable)
