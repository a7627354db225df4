"""Redis with TLS, users and passwords: who is let in, with what rights, and what the others are told."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from limits.aio.storage.redis.bridge import RedisBridge
from redis.asyncio import Redis

from foundry import store as store_package
from foundry.errors import InvalidArgument, StoreRefused, StoreUnavailable
from foundry.store import CartridgeStore, Reference, RunState, StoreSettings
from foundry.store.credentials import RedisAccess
from foundry.store.redis.connection import Connection
from tests.store_data import cartridge, draft, run_spec
from tests.tls import Authority, TlsFront
from tests.valkey import PASSWORD, USER, Valkey, documented_rules

TIMEOUT_SECONDS = 1.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def front(valkey: Valkey, authority: Authority) -> AsyncIterator[TlsFront]:
    """TLS before the server."""
    opened = TlsFront(authority, valkey.port)
    await opened.start()
    yield opened
    await opened.close()


@pytest.fixture
async def admin(valkey: Valkey) -> AsyncIterator[Redis]:
    """What an operator does, who may do everything."""
    client = Redis.from_url(valkey.url)
    yield client
    await client.aclose()


def settings(tmp_path: Path, **values: object) -> StoreSettings:
    redis = {"redis_username": USER, "redis_password": PASSWORD, "redis_timeout_seconds": TIMEOUT_SECONDS}
    return StoreSettings.model_validate({"objects_url": f"file://{tmp_path}/objects"} | redis | values)


async def refusal(refused: StoreSettings) -> StoreRefused:
    async with asyncio.timeout(5 * TIMEOUT_SECONDS):
        with pytest.raises(StoreRefused) as caught:
            await CartridgeStore.open(refused)
    assert PASSWORD not in repr(caught.value)
    return caught.value


async def use_everything(store: CartridgeStore) -> None:
    """Every script and command at least once, the blocking ones too."""
    run_id = await store.runs.create(run_spec())
    claimed = await store.runs.claim("worker-0", 60, timeout_seconds=1)
    assert claimed is not None
    await store.runs.heartbeat(run_id, 1, 60)
    await store.runs.report(run_id, 1, {"type": "step", "step": 1})
    await store.acquire("report", run_id, 1)
    for step in range(6):
        await store.publish(cartridge(step), draft(run=run_id, step=step), durable=step % 2 == 0)
    await store.tag("report", "best", 3)
    await store.tag("report", "best", 5)
    await store.rollback_tag("report", "best")
    digest = (await store.resolve("report@best")).digest
    async with store.leased(digest, "rollout-0", 60):
        assert await store.leases(digest) == ["rollout-0"]
        assert (await store.fetch(digest)).digest() == digest
    async for event in store.subscribe("0-0"):
        assert event.cartridge.version == 1
        break
    await store.runs.finish(run_id, 1, RunState.SUCCEEDED, result={"kl": 0.5})
    assert [event async for event in store.runs.events(run_id)]
    await store.rollback("report", Reference.parse("report@1"))
    assert len(await store.versions("report")) > 3
    assert await store.hot_versions("report")
    await store.untag("report", "best")
    await store.runs.create(run_spec("other"))
    assert await store.runs.claim("worker-0", 0.001) is not None
    assert await store.runs.claim("worker-1", 60, timeout_seconds=5) is not None
    assert await store.runs.claim("worker-2", 60, timeout_seconds=0.05) is None, "a bell that nobody rings"


async def test_the_documented_rights_are_enough_over_tls(
    front: TlsFront, authority: Authority, admin: Redis, tmp_path: Path
) -> None:
    url = f"rediss://127.0.0.1:{front.port}/0"
    store = await CartridgeStore.open(settings(tmp_path, redis_url=url, redis_ca_file=authority.file))
    await use_everything(store)
    await admin.flushall()
    assert await store.rebuild()
    await store.delete("report", 1)
    await store.delete("report")
    await store.close()
    assert await admin.acl_log() == []


def test_the_documented_rights_are_those_that_are_used() -> None:
    """No more and no less: each command in the sources is in the documented line, and the other way round."""
    package = Path(store_package.__file__).parent
    sources = "".join(path.read_text() for path in (*package.rglob("*.py"), *package.rglob("*.lua")))
    called = {word.lower() for word in re.findall(r"(?:call\(|\.read\(\s*)['\"]([A-Z]+)['\"]", sources)}
    windows = RedisBridge.SCRIPT_ACQUIRE_SLIDING_WINDOW + RedisBridge.SCRIPT_SLIDING_WINDOW
    called |= {word.decode() for word in re.findall(rb"redis\.call\('([a-z]+)'", windows)}
    # By the client's methods, by values of many megabytes, and by the client itself.
    called |= {"get", "set", "xread", "blpop", "evalsha", "script|load", "client|setinfo", "select"}
    granted = {word[1:] for word in documented_rules().split() if word.startswith("+")}
    assert granted == called


async def test_keys_of_others_are_out_of_reach(valkey: Valkey, admin: Redis, tmp_path: Path) -> None:
    await admin.set("somebody:else", "1")
    store = await CartridgeStore.open(settings(tmp_path, redis_url=valkey.url))
    with pytest.raises(StoreRefused, match="ACL"):
        await store._connection.read("GET", "somebody:else")
    await store.close()


@pytest.mark.parametrize(
    "wrong",
    [
        {"redis_password": "planted-wrong-password"},
        {"redis_username": "nobody"},
    ],
)
async def test_the_wrong_user_or_password_is_refused(valkey: Valkey, tmp_path: Path, wrong: dict[str, str]) -> None:
    refused = await refusal(settings(tmp_path, redis_url=valkey.url, **wrong))
    assert "user and password" in refused.message
    assert "planted" not in repr(refused)


async def test_a_password_in_the_url_works_and_is_refused_like_any_other(valkey: Valkey, tmp_path: Path) -> None:
    bare = {"redis_username": "", "redis_password": None}
    right = valkey.url.replace("//", f"//{USER}:{PASSWORD}@")
    store = await CartridgeStore.open(settings(tmp_path, redis_url=right, **bare))
    await store.ping()
    await store.close()
    wrong = valkey.url.replace("//", f"//{USER}:planted-wrong@")
    assert "planted" not in repr(await refusal(settings(tmp_path, redis_url=wrong, **bare)))


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        # A command of a script, a script at all, and a value of many megabytes.
        ("hget", "hget"),
        ("evalsha", "evalsha"),
    ],
)
async def test_a_missing_right_is_named(valkey: Valkey, admin: Redis, tmp_path: Path, missing: str, named: str) -> None:
    await admin.execute_command("ACL", "SETUSER", USER, f"-{missing}")
    store = CartridgeStore(settings(tmp_path, redis_url=valkey.url))
    with pytest.raises(StoreRefused, match=named):
        await store.acquire("report", "run-a", 1)
    await store.close()


async def test_a_missing_right_to_upload_is_named(valkey: Valkey, admin: Redis, tmp_path: Path) -> None:
    store = await CartridgeStore.open(settings(tmp_path, redis_url=valkey.url))
    await store.acquire("report", "run-a", 1)
    await admin.execute_command("ACL", "SETUSER", USER, "-set")
    with pytest.raises(StoreRefused, match="set"):
        await store.publish(cartridge(0), draft(), durable=False)
    await store.close()


async def test_durable_versions_are_served_when_the_user_is_withdrawn(
    valkey: Valkey, admin: Redis, tmp_path: Path
) -> None:
    store = await CartridgeStore.open(settings(tmp_path, redis_url=valkey.url))
    await store.acquire("report", "run-a", 1)
    manifest = await store.publish(cartridge(0), draft(), durable=True)
    await admin.execute_command("ACL", "DELUSER", USER)
    assert (await store.resolve("report")) == manifest.id
    assert (await store.fetch(manifest.digest)).digest() == manifest.digest
    with pytest.raises(StoreRefused):
        await store.publish(cartridge(1), draft(step=1), durable=True)
    await store.close()


# Files


async def test_the_password_comes_from_a_file(valkey: Valkey, tmp_path: Path) -> None:
    file = tmp_path / "password"
    by_file = {"redis_url": valkey.url, "redis_password": None, "redis_password_file": file}
    with pytest.raises(InvalidArgument, match=r"redis_password_file.*can't be read") as caught:
        await CartridgeStore.open(settings(tmp_path, **by_file))
    assert caught.value.field == "redis_password_file"
    file.write_text("\n")
    with pytest.raises(InvalidArgument, match="empty"):
        await CartridgeStore.open(settings(tmp_path, **by_file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument, match="UTF-8"):
        await CartridgeStore.open(settings(tmp_path, **by_file))
    file.write_text(f"{PASSWORD}\n")
    store = await CartridgeStore.open(settings(tmp_path, **by_file))
    await store.ping()
    await store.close()


# TLS


async def test_a_certificate_of_another_authority_is_refused(front: TlsFront, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    url = f"rediss://127.0.0.1:{front.port}/0"
    for trusted in (Authority(other).file, None):
        refused = await refusal(settings(tmp_path, redis_url=url, redis_ca_file=trusted))
        assert "certificate" in refused.message
        assert "redis_ca_file" in refused.message


async def test_a_certificate_for_another_name_is_refused(front: TlsFront, authority: Authority, tmp_path: Path) -> None:
    url = f"rediss://localhost:{front.port}/0"
    refused = await refusal(settings(tmp_path, redis_url=url, redis_ca_file=authority.file))
    assert "certificate" in refused.message


async def test_plain_and_tls_mixed_up_is_unavailable_in_time(
    valkey: Valkey, front: TlsFront, authority: Authority, tmp_path: Path
) -> None:
    for url, ca in ((f"rediss://127.0.0.1:{valkey.port}", authority.file), (f"redis://127.0.0.1:{front.port}", None)):
        store = CartridgeStore(settings(tmp_path, redis_url=url, redis_ca_file=ca))
        async with asyncio.timeout(10 * TIMEOUT_SECONDS):
            with pytest.raises(StoreUnavailable):
                await store.ping()
        await store.close()


async def test_a_server_may_ask_for_our_certificate(valkey: Valkey, authority: Authority, tmp_path: Path) -> None:
    front = TlsFront(authority, valkey.port, client_certificates=True)
    await front.start()
    certificate, key = authority.issue("foundry.example")
    tls = {"redis_url": f"rediss://127.0.0.1:{front.port}", "redis_ca_file": authority.file}
    store = await CartridgeStore.open(settings(tmp_path, **tls, redis_certificate_file=certificate, redis_key_file=key))
    await store.ping()
    await store.close()
    bare = CartridgeStore(settings(tmp_path, **tls))
    with pytest.raises(StoreUnavailable):
        await bare.ping()
    await bare.close()
    await front.close()


async def test_a_blocking_connection_is_made_like_the_others(
    front: TlsFront, authority: Authority, tmp_path: Path
) -> None:
    tls = {"redis_url": f"rediss://127.0.0.1:{front.port}", "redis_ca_file": authority.file}
    connection = Connection(RedisAccess.of(settings(tmp_path, **tls)), timeout_seconds=TIMEOUT_SECONDS)
    blocking = await asyncio.to_thread(connection.open_blocking)

    def ask() -> object:
        blocking.send_command("GET", "foundry:absent")
        return blocking.read_response()

    assert await asyncio.to_thread(ask) is None
    assert connection.options["socket_timeout"] == TIMEOUT_SECONDS
    await asyncio.to_thread(blocking.disconnect)
    await connection.close()
    wrong = Connection(RedisAccess.of(settings(tmp_path, **tls, redis_password="planted")), timeout_seconds=1)
    with pytest.raises(StoreRefused) as caught:
        await asyncio.to_thread(wrong.open_blocking)
    assert "planted" not in repr(caught.value)
    await wrong.close()
