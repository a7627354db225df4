"""Nothing that a service prints holds a secret: wrong ones, right ones, and what was put in the wrong place."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from foundry.local.ports import address_of, reserve
from foundry.store import StoreSettings
from tests.process import Process
from tests.seaweed import Seaweed
from tests.services import wait_ready, wait_until
from tests.tiny import build_tiny_model
from tests.valkey import PASSWORD, USER, Valkey

PLANTED = "planted/secret#of:the@test"
SECONDS = 120


def environment(**store: str) -> dict[str, str]:
    return {f"FOUNDRY_STORE__{name.upper()}": value for name, value in store.items()}


def printed_by(process: Process) -> str:
    """All that a service prints which can't start."""
    process.start()
    assert process._process is not None
    try:
        assert process._process.wait(SECONDS) != 0
    except subprocess.TimeoutExpired:
        pytest.fail(f"it goes on:\n{process.log.read_text()}")
    finally:
        process.close()
    return process.log.read_text()


def assert_hidden(printed: str) -> None:
    for part in (PLANTED, "planted", "secret#of", "of:the", PASSWORD):
        assert part not in printed, printed


Place = Callable[[Valkey, Seaweed, Path], dict[str, str]]


def wrong_password(valkey: Valkey, _: Seaweed, directory: Path) -> dict[str, str]:
    objects = f"file://{directory}/objects"
    return environment(redis_url=valkey.url, redis_username=USER, redis_password=PLANTED, objects_url=objects)


def password_that_breaks_the_url(valkey: Valkey, _: Seaweed, directory: Path) -> dict[str, str]:
    url = valkey.url.replace("//", f"//{USER}:{PLANTED}@")
    return environment(redis_url=url, objects_url=f"file://{directory}/objects")


def wrong_s3_secret(valkey: Valkey, seaweed: Seaweed, _: Path) -> dict[str, str]:
    s3 = {name: str(value) for name, value in seaweed.settings("secrets").items()}
    return environment(redis_url=valkey.url, **(s3 | {"objects_secret_access_key": PLANTED}))


def misspelt(valkey: Valkey, _: Seaweed, directory: Path) -> dict[str, str]:
    return environment(redis_url=valkey.url, redis_pass=PLANTED, objects_url=f"file://{directory}/objects")


@pytest.mark.parametrize(
    ("place", "says"),
    [
        (wrong_password, "Redis refused us"),
        (password_that_breaks_the_url, "the Redis URL can't be read"),
        (wrong_s3_secret, "SignatureDoesNotMatch"),
        (misspelt, "FOUNDRY_STORE__REDIS_PASS (--store.redis-pass): no such setting"),
    ],
)
async def test_a_gateway_that_is_refused_ends_and_says_why(
    place: Place, says: str, valkey: Valkey, seaweed: Seaweed, tmp_path: Path
) -> None:
    process = Process("gateway", ["--log-level", "debug"], tmp_path, place(valkey, seaweed, tmp_path))
    printed = printed_by(process)
    assert says in printed
    assert_hidden(printed)


async def test_a_trainer_that_is_refused_ends_and_says_why(valkey: Valkey, seaweed: Seaweed, tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model")
    arguments = ["--model", str(model), "--log-level", "debug"]
    printed = printed_by(Process("trainer", arguments, tmp_path, wrong_password(valkey, seaweed, tmp_path)))
    assert "Redis refused us" in printed
    assert_hidden(printed)


def test_a_refused_connection_is_waited_for_and_shows_no_secret(tmp_path: Path) -> None:
    nobody = reserve()
    url = f"redis://{USER}:planted-secret@{address_of(nobody)}"
    where = environment(redis_url=url, objects_url=f"file://{tmp_path}/objects")
    process = Process("gateway", ["--log-level", "debug", "--rollout-addresses", "127.0.0.1:1"], tmp_path, where)
    process.start()
    try:
        wait_until(lambda: "store_opened_without_redis" in process.log.read_text(), process)
        wait_ready(process, "/healthz")
    finally:
        process.close()
        nobody.close()
    assert_hidden(process.log.read_text())


def test_a_gateway_that_works_logs_no_secret(valkey: Valkey, seaweed: Seaweed, tmp_path: Path) -> None:
    store = {"redis_url": valkey.url, "redis_username": USER, "redis_password": PASSWORD} | seaweed.settings("works")
    settings = StoreSettings.model_validate(store)
    where = environment(**{name: str(value) for name, value in store.items()})
    arguments = ["--log-level", "debug", "--rollout-addresses", "127.0.0.1:1", "--census-seconds", "0.2"]
    process = Process("gateway", arguments, tmp_path, where)
    process.start()
    try:
        wait_until(lambda: "pointers_restored" in process.log.read_text(), process)
        wait_ready(process, "/healthz")
        valkey.kill()
        wait_until(lambda: "store not looked at" in process.log.read_text(), process)
    finally:
        process.close()
    for secret in (PASSWORD, str(store["objects_secret_access_key"])):
        assert secret not in process.log.read_text() + repr(settings) + settings.model_dump_json()
