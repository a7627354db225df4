"""Fixtures that several test modules share."""

from __future__ import annotations

import logging
import os
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

# Read when torch is loaded, also by the services that tests start: on models this small, and beside another worker,
# threads only get in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"
# Read when Triton is loaded, which torch does: its kernels are interpreted, on a CPU.
os.environ["TRITON_INTERPRET"] = "1"

# Its plugin would import it when all tests are over, and Python 3.11 can't parse while leftovers are collected.
import hypothesis  # noqa: F401
import pytest
import structlog

from foundry.store import CartridgeStore, RunStore, StoreSettings
from tests.seaweed import Seaweed
from tests.valkey import PASSWORD, TESTER, Valkey


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`@pytest.mark.storages("file", "s3")` runs what uses `storage` on each of them; without it on files alone."""
    marker = metafunc.definition.get_closest_marker("storages")
    if marker is not None and "storage" in metafunc.fixturenames:
        metafunc.parametrize("storage", marker.args, indirect=True)


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """A command that is run in this process sets up its logs, which the next test must not inherit."""
    configured, handlers, level = structlog.get_config(), logging.root.handlers[:], logging.root.level
    hook, thread_hook = sys.excepthook, threading.excepthook
    yield
    structlog.configure(**configured)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    sys.excepthook, threading.excepthook = hook, thread_hook


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[Valkey]:
    """A running, empty Valkey server."""
    server = Valkey(tmp_path)
    await server.start()
    yield server
    server.close()


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A running S3 server, the same for all tests; each has a prefix of its own."""
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str | bool]:
    """Settings of an empty object storage."""
    if getattr(request, "param", "file") == "file":
        return {"objects_url": f"file://{tmp_path}/objects"}
    seaweed: Seaweed = request.getfixturevalue("seaweed")
    return seaweed.settings(uuid.uuid4().hex)


@pytest.fixture
def store_settings(valkey: Valkey, storage: dict[str, str | bool]) -> StoreSettings:
    """On a server that lets us do what docs/store.md says, and what tests do besides."""
    redis = {"redis_url": valkey.url, "redis_username": TESTER, "redis_password": PASSWORD, "redis_timeout_seconds": 5}
    return StoreSettings.model_validate(redis | storage)


@pytest.fixture
async def store(store_settings: StoreSettings) -> AsyncIterator[CartridgeStore]:
    opened = await CartridgeStore.open(store_settings)
    yield opened
    await opened.close()


@pytest.fixture
def runs(store: CartridgeStore) -> RunStore:
    return store.runs
