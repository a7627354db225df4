"""docker-compose.yml, as far as it can be judged without an engine; `make e2e-compose` runs it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from foundry.rpc.tokens import HOLDERS, holder_of
from foundry.settings import ServiceSettings
from services.gateway.settings import GatewaySettings
from services.rollout.settings import RolloutSettings
from services.teacher.settings import TeacherSettings
from services.trainer.settings import TrainerSettings

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
OURS: dict[str, type[ServiceSettings]] = {
    "gateway": GatewaySettings,
    "rollout": RolloutSettings,
    "teacher": TeacherSettings,
    "trainer": TrainerSettings,
}
ONE_SHOT = {"model", "bucket", "tokens"}


def interpolated(value: str, **given: str) -> str:
    """With the variables that are given, and the defaults of the others; a default may itself be a variable."""
    while "${" in value:
        value = re.sub(r"\$\{(\w+):-([^${}]*)\}", lambda found: given.get(found[1], found[2]), value)
    return value


@pytest.mark.parametrize("name", sorted(name for name in SERVICES if name.removesuffix("-gpu") in OURS))
def test_variables_are_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_MODEL", "/model")
    for variable, value in SERVICES[name]["environment"].items():
        monkeypatch.setenv(variable, interpolated(str(value)))
    settings = OURS[name.removesuffix("-gpu")].parse([])
    known = {"OMP_WAIT_POLICY", *(f"FOUNDRY_{field.upper()}" for field in type(settings).model_fields)}
    unknown = {each for each in SERVICES[name]["environment"] if each.partition("__")[0] not in known}
    assert unknown == set()


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_locked_down_and_bounded(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["logging"]["options"]["max-size"]
    # A GPU's service has all of the machine's memory.
    assert name in ONE_SHOT or name.endswith("-gpu") or service["deploy"]["resources"]["limits"]["memory"]
    assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned(name: str) -> None:
    tag = interpolated(SERVICES[name]["image"]).rpartition(":")[2]
    assert re.match(r"v?\d", tag), tag


@pytest.mark.parametrize("name", SERVICES)
def test_whoever_needs_another_waits_for_it(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        expected = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
        assert how["condition"] == expected, other


@pytest.mark.parametrize("name", sorted(name for name in SERVICES if name.removesuffix("-gpu") in OURS))
def test_each_service_has_the_tokens_that_it_needs_and_no_other(name: str) -> None:
    made = {f"tokens-{holder}:/tokens/{holder}" for holder in HOLDERS}
    assert set(SERVICES["tokens"]["volumes"]) == made
    dockerfile = (ROOT / "services" / "gateway" / "Dockerfile").read_text()
    assert all(f" {volume.partition(':')[2]}" in dockerfile for volume in made), "who owns it"
    holder = holder_of(name.removesuffix("-gpu"))
    mounted = [volume for volume in SERVICES[name]["volumes"] if volume.startswith("tokens")]
    assert mounted == [f"tokens-{holder}:{SERVICES[name]['environment']['FOUNDRY_RPC_TOKENS_DIRECTORY']}:ro"]
    assert "tokens" in SERVICES[name]["depends_on"]
    # An empty volume is filled with what an image has where it is mounted: nothing, but for the one that makes tokens.
    assert "/run/foundry" not in dockerfile
    assert SERVICES[name]["environment"]["FOUNDRY_RPC_TOKENS_DIRECTORY"].startswith("/run/foundry/")


def test_a_grace_ends_before_the_kill() -> None:
    for name in ("rollout", "teacher", "trainer", "gateway"):
        grace = SERVICES[name]["environment"].get(
            "FOUNDRY_GRACE_SECONDS", OURS[name].model_fields["grace_seconds"].default
        )
        assert float(grace) < float(SERVICES[name]["stop_grace_period"].removesuffix("s"))


@pytest.mark.parametrize("name", ["rollout", "rollout-gpu"])
def test_the_rollouts_engine_is_chosen_by_its_tag(name: str) -> None:
    image = SERVICES[name]["image"]
    assert interpolated(image) == "cartridge-foundry/rollout:0.1.0"
    assert interpolated(image, FOUNDRY_TAG="2.0") == "cartridge-foundry/rollout:2.0"
    assert (
        interpolated(image, FOUNDRY_TAG="2.0", FOUNDRY_ROLLOUT_TAG="2.0-vllm") == "cartridge-foundry/rollout:2.0-vllm"
    )
    # The image says which engine it has.
    assert "FOUNDRY_ENGINE" not in SERVICES[name]["environment"]


def test_vllm_takes_of_the_memory_what_the_container_has() -> None:
    limit = SERVICES["rollout"]["deploy"]["resources"]["limits"]["memory"]
    kv_bytes = int(interpolated(SERVICES["rollout"]["environment"]["FOUNDRY_VLLM__KV_BYTES"]))
    assert kv_bytes < int(limit.removesuffix("g")) * 1024**3
    # A GPU's is what the GPU has left.
    assert "FOUNDRY_VLLM__KV_BYTES" not in SERVICES["rollout-gpu"]["environment"]
    assert "exec" in SERVICES["rollout-gpu"]["tmpfs"][0].split(":")[1].split(",")
