"""Whatever stands in the place of one record or one key of Redis: errors are typed, and everything else is served.

60 examples each; 1000 with HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from foundry.errors import FoundryError
from foundry.store import CartridgeId, CartridgeStore, DatasetSummary, RunState, StoreSettings
from foundry.store.objects import layout
from foundry.store.sealed import seal
from foundry.store.signatures import split
from tests.store_data import cartridge, claim, draft, run_spec
from tests.valkey import Valkey

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
PROFILE = settings(
    max_examples=1000 if NIGHTLY else 60,
    derandomize=not NIGHTLY,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
DATASET = "blake3:" + "ef" * 32
TENANTS = ("", "acme")

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
texts = st.one_of(
    st.binary(max_size=32),
    values.map(lambda value: json.dumps(value).encode()),
    st.sampled_from(
        [
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"9" * 400,
            b"9" * 5000,
            b"-1",
            b"1e999",
            b"NaN",
            b'"\\ud800"',
            b" " * (2**24 + 1),
        ]
    ),
)
# In the place of a record: any bytes, or the record with one value replaced and a checksum that is right.
replacements = texts | st.tuples(st.integers(0, 20), values)
types = st.sampled_from(["string", "list", "hash", "set", "zset", "stream"])


class Kept(NamedTuple):
    """What the damage must not touch."""

    version: CartridgeId
    document: str
    run: str
    api_key: str


class Site:
    """A store with one of everything to damage, and as much to keep; each example begins as this was filled."""

    def __init__(self, directory: Path, *, signed: bool) -> None:
        self.directory = directory
        self.signed = signed
        self.runner = asyncio.Runner()
        self.server = Valkey(directory)
        self.runner.run(self.server.start())
        values = {"redis_url": self.server.url, "objects_url": (directory / "objects").as_uri(), "keep_hot": 2}
        values |= {"keep_runs_days": 1, "keep_documents_days": 1}
        if signed:
            directory.joinpath("keys").write_text("k" * 32)
            values["signing_key_file"] = directory / "keys"
        self.store = self.runner.run(CartridgeStore.open(StoreSettings.model_validate(values)))
        self.kept = self.runner.run(self._fill())
        kept = (
            self.kept.version.name,
            self.kept.version.digest[7:],
            self.kept.document[7:],
            self.kept.run,
            self.kept.api_key,
        )
        objects = sorted(str(path.relative_to(directory / "objects")) for path in directory.glob("objects/*/**/*.*"))
        self.records = [key for key in objects if not key.startswith("blobs") and not any(part in key for part in kept)]
        self.dumps = self.runner.run(self._dump())
        self.keys = [key for key in self.dumps if not any(part in key for part in kept)]

    async def _fill(self) -> Kept:
        store = self.store
        for name, content in (("report", 0), ("kept", 9)):
            await store.acquire(name, "run-a", 1)
            for step in range(3):
                manifest = await store.publish(cartridge(content + step), draft(name, step=step), durable=True)
            await store.tag(name, "best", 1)
            await store.tag(name, "best", 2)
        await store.publish(cartridge(5), draft(step=5), durable=False)
        await store.lease(cartridge(0).digest(), "reader", 3600)
        for tenant in TENANTS:
            await store.documents.of(tenant).put("a text to damage")
            datasets = store.datasets.of(tenant)
            await datasets.append(DATASET, "asked", 0, [{"family": "prompts"}])
            await datasets.finish(DATASET, DatasetSummary(digest=DATASET, families={"prompts": {"conversations": 1}}))
        document = await store.documents.put("a text to keep")
        for _ in range(2):
            await store.runs.create(run_spec("acme/trained"), tenant="acme")
            claimed = await claim(store.runs, lease_seconds=3600)
            await store.runs.save_checkpoint(claimed.run_id, 1, 1, [b"state"])
        await store.runs.finish(claimed.run_id, 1, RunState.SUCCEEDED, result={"loss": 0.5})
        await store.runs.request_pause(await store.runs.create(run_spec("queued")))
        await store.api_keys.create(scopes=["admin"])
        api_key, _ = await store.api_keys.create(scopes=["query"])
        await store.grants.put("acme/report", "globex")
        await store.grants.put("kept/report", "globex")
        await store._marks.put("batch", [cartridge(7).digest()])
        return Kept(manifest.id, document, await store.runs.create(run_spec("kept-run")), api_key.key_id)

    async def _dump(self) -> dict[str, bytes]:
        redis: Any = self.store._connection.redis
        return {key.decode(): await redis.dump(key) for key in sorted(await redis.keys("foundry:*"))}

    async def restore(self) -> None:
        redis = self.store._connection.redis
        await redis.flushall()
        async with redis.pipeline(transaction=False) as pipe:
            for key, dump in self.dumps.items():
                pipe.restore(key, 0, dump)
            await pipe.execute()

    def close(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()
        self.server.close()


@pytest.fixture(scope="module", params=[False, True], ids=["unsigned", "signed"])
def site(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Site]:
    made = Site(tmp_path_factory.mktemp("hostile"), signed=request.param)
    yield made
    made.close()


async def typed(work: Awaitable[Any]) -> Any:
    """None where it is refused."""
    try:
        return await work
    except FoundryError:
        return None


async def gone_through(store: CartridgeStore) -> None:
    """All that lists, sweeps and checks. Raises whatever is not a typed error."""

    async def each(sweep: Any) -> list[Any]:
        return [one async for one in sweep]

    for name in await store.names():
        for look in (store.versions, store.tags, store.durable_versions, store.hot_versions):
            await typed(look(name))
        for reference in (name, f"{name}@1", f"{name}@best", f"{name}@{cartridge(0).digest()}"):
            if found := await typed(store.resolve(reference)):
                await typed(store.manifest(found.name, found.version))
                await typed(store.fetch(found.digest))
        await typed(store.tag_record(name, "best"))
    for tenant in TENANTS:
        await store.runs.list(tenant=tenant)
    for run in await store.runs.list():
        await typed(store.runs.load_checkpoint(run.run_id))
        await typed(store.runs._archive.events(run.run_id))
        if run.state.over:
            await typed(each(store.runs.events(run.run_id)))
    for key in await store.api_keys.list():
        await typed(store.api_keys.get(key.key_id))
    await store.api_keys.refreshed({})
    await store.grants.refreshed({})
    await store.grants.for_tenant("globex")
    for tenant in TENANTS:
        for info in await store.documents.of(tenant).list():
            await typed(store.documents.of(tenant).get(info.digest))
        await typed(store.datasets.of(tenant).summary(DATASET))
        await typed(store.datasets.of(tenant).shard(DATASET, "asked", 0))
    await typed(store.usage())
    await typed(each(store.gc(dry_run=True)))


async def served(store: CartridgeStore, kept: Kept) -> None:
    version = kept.version
    assert version.name in await store.names()
    assert await store.resolve(version.name) == version
    assert [each.version for each in await store.versions(version.name)] == [1, 2, 3]
    assert (await store.resolve("kept@best")).version == 2
    assert (await store.fetch(version.digest)).digest() == version.digest
    assert kept.document in [info.digest for info in await store.documents.list()]
    assert await store.documents.get(kept.document) == "a text to keep"
    assert kept.api_key in [key.key_id for key in await store.api_keys.list()]
    known = (await store.api_keys.refreshed({}))[layout.api_key(kept.api_key)]
    assert known.value == await store.api_keys.get(kept.api_key)
    assert await store.grants.of_name("kept/report") == [await store.grants.get("kept/report", "globex")]
    for tenant in (None, ""):
        assert kept.run in [run.run_id for run in await store.runs.list(tenant=tenant)]
    assert (await store.runs.get(kept.run)).spec.name == "kept-run"


async def wrong(store: CartridgeStore) -> set[str]:
    return {each.kind for each in [each async for each in store.verify()] if each.state in ("corrupt", "missing")}


def replaced(content: bytes, replacement: bytes | tuple[int, Any]) -> bytes:
    if isinstance(replacement, bytes):
        return replacement
    try:
        record = json.loads(split(content)[0])
        place, value = replacement
        name = sorted(record)[place % len(record)]
        return seal({key: each for key, each in record.items() if key != "checksum"} | {name: value}).encode()
    except (ValueError, FoundryError):
        # A text, or nothing that we would ever write.
        return b"{}"


def test_a_hostile_record(site: Site) -> None:
    @PROFILE
    @given(key=st.sampled_from(site.records), replacement=replacements)
    def check(key: str, replacement: bytes | tuple[int, Any]) -> None:
        site.runner.run(example(key, replacement))

    async def example(key: str, replacement: bytes | tuple[int, Any]) -> None:
        path = site.directory / "objects" / key
        content = path.read_bytes()
        path.write_bytes(replaced(content, replacement))
        try:
            await gone_through(site.store)
            await served(site.store, site.kept)
            found = await wrong(site.store)
            if (site.signed or isinstance(replacement, bytes)) and path.suffix != ".jsonl":
                assert found, f"{key} is damaged, and nobody says so"
            await site.store.rebuild(force=True)
            await gone_through(site.store)
            await served(site.store, site.kept)
            await wrong(site.store)
        finally:
            path.write_bytes(content)
            await site.restore()

    check()


async def stand_in(redis: Any, key: str, kind: str, field: str, text: bytes) -> None:
    """Another thing under the key: of the type `kind`, or if that is its own, of another content."""
    if (await redis.type(key)).decode() != kind or kind in ("string", "list", "stream"):
        await redis.delete(key)
    # The field that scripts read, where there is one.
    fields = await redis.hkeys(key) if kind == "hash" else []
    named = fields[len(field) % len(fields)] if fields else field
    await {
        "string": lambda: redis.set(key, text),
        "list": lambda: redis.rpush(key, text),
        "hash": lambda: redis.hset(key, named, text),
        "set": lambda: redis.sadd(key, text),
        "zset": lambda: redis.zadd(key, {text: 5}),
        "stream": lambda: redis.xadd(key, {named: text}),
    }[kind]()


def test_a_hostile_key(site: Site) -> None:
    @PROFILE
    @given(key=st.sampled_from(site.keys), kind=types, own=st.booleans(), field=st.text(max_size=9), text=texts)
    def check(key: str, kind: str, own: bool, field: str, text: bytes) -> None:
        site.runner.run(example(key, kind, own, field, text))

    async def example(key: str, kind: str, own: bool, field: str, text: bytes) -> None:
        redis: Any = site.store._connection.redis
        if own:
            kind = (await redis.type(key)).decode()
        try:
            await stand_in(redis, key, kind, field, text)
            await gone_through(site.store)
            await served(site.store, site.kept)
            await wrong(site.store)
            await site.store.rebuild(force=True)
            await served(site.store, site.kept)
            assert {1, 2, 3} <= {each.version for each in await site.store.versions("report")}
            assert (await site.store.resolve("report@best")).version == 2
            assert "pointer" not in await wrong(site.store)
        finally:
            await site.restore()

    check()
