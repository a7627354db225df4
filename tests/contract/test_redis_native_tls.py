"""Redis' own TLS, where a server that was built with it is installed (Debian: apt install redis-server)."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError

from foundry.errors import StoreUnavailable
from foundry.local.ports import HOST, reserve
from foundry.store import CartridgeStore
from tests.contract.test_redis_access import refusal, settings, use_everything
from tests.process import spawn
from tests.tls import Authority
from tests.valkey import PASSWORD, USER, documented_rules

SERVER = shutil.which("redis-server")

pytestmark = pytest.mark.skipif(SERVER is None, reason="no redis-server on this machine")


@pytest.fixture
async def tls(tmp_path: Path) -> AsyncIterator[dict[str, object]]:
    """A server that speaks TLS alone, asks for a certificate, and knows the documented user; settings to reach it."""
    authority = Authority(tmp_path)
    (certificate, key), (ours, our_key) = authority.issue(HOST), authority.issue("foundry.test")
    held = reserve()
    port = held.getsockname()[1]
    command = [
        str(SERVER),
        "--port",
        "0",
        "--tls-port",
        str(port),
        "--bind",
        HOST,
        "--save",
        "",
        "--dir",
        str(tmp_path),
    ]
    command += ["--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "yes"]
    command += ["--tls-ca-cert-file", str(authority.file), "--user", USER, "on", f">{PASSWORD}"]
    # The page says so: Redis knows this one since 7.2.
    command += [rule for rule in documented_rules().split() if rule != "+client|setinfo"]
    with (tmp_path / "redis.log").open("ab") as log:
        process = spawn(command, stdout=log, stderr=log)
    certificates = {"ssl_ca_certs": authority.file, "ssl_certfile": ours, "ssl_keyfile": our_key}
    probe = Redis(host=HOST, port=port, ssl=True, **certificates)  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(20):
            while True:
                assert process.poll() is None, (tmp_path / "redis.log").read_text()
                try:
                    await probe.ping()
                    break
                except ConnectionError:
                    await asyncio.sleep(0.01)
        yield {
            "redis_url": f"rediss://{HOST}:{port}/0",
            "redis_ca_file": authority.file,
            "redis_certificate_file": ours,
            "redis_key_file": our_key,
        }
    finally:
        await probe.aclose()
        process.kill()
        process.wait()
        held.close()


async def test_everything_works_over_the_servers_own_tls(tls: dict[str, object], tmp_path: Path) -> None:
    store = await CartridgeStore.open(settings(tmp_path, **tls))
    await use_everything(store)
    await store.close()


async def test_who_brings_no_certificate_or_a_wrong_password_is_kept_out(
    tls: dict[str, object], tmp_path: Path
) -> None:
    await refusal(settings(tmp_path, **tls | {"redis_password": "planted"}))
    bare = await CartridgeStore.open(
        settings(tmp_path, **tls | {"redis_certificate_file": None, "redis_key_file": None})
    )
    with pytest.raises(StoreUnavailable):
        await bare.ping()
    await bare.close()
