"""llm: a model by its address in a file, asked at the command line, whole and streamed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.conftest import BASE, CARTRIDGE, Site


@pytest.mark.parametrize("model", [BASE, CARTRIDGE])
def test_a_model_by_its_address(site: Site, model: str, tmp_path: Path) -> None:
    models = f"- model_id: ours\n  model_name: {model}\n  api_base: {site.url}\n"
    (tmp_path / "extra-openai-models.yaml").write_text(models)

    def ask(*options: str) -> str:
        command = [sys.executable, "-m", "llm", "-m", "ours", "-o", "temperature", "0", "-o", "max_tokens", "8"]
        done = subprocess.run(
            [*command, *options, "What does the document say?"],
            env={**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "unused"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert ask() == ask("--no-stream")
