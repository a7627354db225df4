"""The real store against a model of it, over random sequences of everything that can be done to it.

After each step both must have the same versions, pointers, tags and readable bytes. 20 sequences of 40 steps; 400 of
60 with HYPOTHESIS_PROFILE=nightly.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from foundry.errors import CartridgeNotFound, FoundryError
from foundry.store import CartridgeStore, StoreSettings
from tests.contract.store_model import KEEP_HOT, StoreModel, Version
from tests.store_data import cartridge, draft
from tests.valkey import Valkey

NAMES = ["report", "acme/notes"]
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
PROFILE = settings(
    max_examples=400 if NIGHTLY else 20,
    stateful_step_count=60 if NIGHTLY else 40,
    derandomize=not NIGHTLY,
    database=None,
    deadline=None,
    phases=[Phase.generate, Phase.shrink] if NIGHTLY else [Phase.generate],
    suppress_health_check=list(HealthCheck),
)
CONTENTS = range(4)
DIGESTS = {content: cartridge(content).digest() for content in CONTENTS}

names = st.sampled_from(NAMES)
runs = st.sampled_from(["run-a", "run-b"])
attempts = st.integers(1, 3)
contents = st.sampled_from(CONTENTS)
# Of the versions there are, counted from the newest; a number that never was, beyond them.
positions = st.integers(0, 6)
tags = st.sampled_from(["best", "keep"])

T = TypeVar("T")


class StoreMachine(RuleBasedStateMachine):
    def __init__(self, server: Valkey) -> None:
        super().__init__()
        self.server, self.model = server, StoreModel(NAMES)
        self.directory = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner()
        self.store = self.run(self._open())
        self.run(self._empty_redis())

    async def _open(self) -> CartridgeStore:
        values = {
            "redis_url": self.server.url,
            "objects_url": Path(self.directory.name).as_uri(),
            "keep_hot": KEEP_HOT,
            "sweep_grace_seconds": 0,
        }
        return await CartridgeStore.open(StoreSettings.model_validate(values))

    async def _empty_redis(self) -> None:
        await self.store._connection.redis.flushall()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.run(self.store.close())
        self.runner.close()
        self.directory.cleanup()

    def attempt(self, work: Coroutine[Any, Any, T], refused: str | None) -> T | None:
        """The answer, or None where the model expects an error, and exactly that is raised."""
        if refused is None:
            return self.run(work)
        with pytest.raises(FoundryError) as raised:
            self.run(work)
        assert type(raised.value).__name__ == refused, raised.value.message
        return None

    def number(self, name: str, position: int) -> int:
        numbers = sorted(self.model.names[name].versions, reverse=True)
        return numbers[position] if position < len(numbers) else 10**6 + position

    @rule(name=names, run=runs, attempt=attempts)
    def acquire(self, name: str, run: str, attempt: int) -> None:
        self.attempt(self.store.acquire(name, run, attempt), self.model.acquire(name, run, attempt))

    @rule(name=names, run=runs, attempt=attempts)
    def release(self, name: str, run: str, attempt: int) -> None:
        self.attempt(self.store.release(name, run, attempt), self.model.release(name, run, attempt))

    @rule(name=names, run=runs, attempt=attempts, step=st.integers(0, 3), content=contents, durable=st.booleans())
    def publish(self, name: str, run: str, attempt: int, step: int, content: int, durable: bool) -> None:
        self._publish(name, run, attempt, step, content, durable)

    @rule(name=names, steps=st.lists(st.tuples(st.integers(0, 9), contents, st.booleans()), min_size=1, max_size=4))
    def publish_as_owner(self, name: str, steps: list[tuple[int, int, bool]]) -> None:
        """A stretch of a run: likelier to succeed than any publisher by chance."""
        run, attempt = self.model.names[name].owner or ("run-a", 1)
        if self.model.names[name].owner is None or self.model.names[name].released:
            self.acquire(name, run, attempt)
        for step, content, durable in steps:
            self._publish(name, run, attempt, step, content, durable)

    def _publish(self, name: str, run: str, attempt: int, step: int, content: int, durable: bool) -> None:
        published = draft(name, run=run, attempt=attempt, step=step)
        refused = self.model.may_publish(name, run, attempt)
        manifest = self.attempt(self.store.publish(cartridge(content), published, durable=durable), refused)
        if manifest is None:
            return
        assert (manifest.digest, manifest.run, manifest.step) == (DIGESTS[content], run, step)
        before = self.model.published_before(name, run, step, content)
        if before is None:
            self.model.published(name, manifest.version, Version(content, run, step, durable))
        else:
            assert manifest.version == before
            if durable:
                self.model.make_durable(name, before)

    @rule(name=names, selector=st.one_of(st.just("latest"), tags, contents.map("content:{}".format), positions))
    def resolve(self, name: str, selector: int | str) -> None:
        if isinstance(selector, int):
            selector = self.number(name, selector)
        expected = self.model.resolve(name, selector)
        written = str(selector)
        if written.startswith("content:"):
            written = DIGESTS[int(written.removeprefix("content:"))]
        found = self.attempt(
            self.store.resolve(f"{name}@{written}"), None if expected is not None else "CartridgeNotFound"
        )
        if found is not None and expected is not None:
            content = self.model.names[name].versions[expected].content
            assert (found.name, found.version, found.digest) == (name, expected, DIGESTS[content])

    @rule(name=names, position=positions, tag=tags)
    def tag(self, name: str, position: int, tag: str) -> None:
        number = self.number(name, position)
        self.attempt(self.store.tag(name, tag, number), self.model.tag(name, tag, number))

    @rule(name=names, tag=tags)
    def untag(self, name: str, tag: str) -> None:
        self.attempt(self.store.untag(name, tag), self.model.untag(name, tag))

    @rule(name=names, position=positions)
    def delete_version(self, name: str, position: int) -> None:
        number = self.number(name, position)
        self.attempt(self.store.delete(name, number), self.model.delete(name, number))

    @rule(name=names)
    def delete_name(self, name: str) -> None:
        self.attempt(self.store.delete(name), self.model.delete(name, None))

    @rule(content=contents)
    def lease(self, content: int) -> None:
        self.run(self.store.lease(DIGESTS[content], "reader", 600))
        self.model.leased.add(content)

    @rule(content=contents)
    def unlease(self, content: int) -> None:
        self.run(self.store.unlease(DIGESTS[content], "reader"))
        self.model.leased.discard(content)

    @rule(keep_last=st.sampled_from([None, 1, 2]))
    def gc(self, keep_last: int | None) -> None:
        async def sweep(*, dry_run: bool) -> list[tuple[str, str, int]]:
            gone = self.store.gc(keep_last=keep_last, dry_run=dry_run)
            return [(each.kind, each.key, each.num_bytes) async for each in gone]

        announced = self.run(sweep(dry_run=True))
        swept = self.run(sweep(dry_run=False))
        assert announced == swept
        contents = {digest: str(content) for content, digest in DIGESTS.items()}
        assert {(kind, contents.get(key, key)) for kind, key, _ in swept} == self.model.gc(keep_last)
        assert len(swept) == len(set(swept))

    @rule(keep_last=st.sampled_from([1, 2]), content=st.none() | contents)
    def end_runs_and_gc(self, keep_last: int, content: int | None) -> None:
        """What a sweep is for: names that nobody holds, with versions that somebody may still use."""
        for name, state in self.model.names.items():
            if state.owner is not None and not state.released:
                self.release(name, *state.owner)
        if content is not None:
            self.lease(content)
        self.gc(keep_last)

    @rule()
    def lose_redis(self) -> None:
        self.run(self._empty_redis())
        self.model.lose_redis()

    @rule()
    def rebuild_by_force(self) -> None:
        """Only what durable versions do not need is forgotten: nothing that anybody sees."""
        rebuilt = self.run(self.store.rebuild(force=True))
        assert rebuilt is not None
        for state in self.model.names.values():
            for number, each in sorted(state.versions.items()):
                if each.durable:
                    state.steps[each.run, each.step] = number

    @rule()
    def reopen(self) -> None:
        self.run(self.store.close())
        self.store = self.run(self._open())

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        self.run(self._compare())

    async def _compare(self) -> None:
        known = [name for name, state in self.model.names.items() if state.versions]
        assert await self.store.names() == sorted(known)
        for name, state in self.model.names.items():
            found = {
                manifest.version: (manifest.digest, manifest.run, manifest.step)
                for manifest in await self.store.versions(name)
            }
            expected = {n: (DIGESTS[each.content], each.run, each.step) for n, each in state.versions.items()}
            assert found == expected
            durable = {number for number, each in state.versions.items() if each.durable}
            assert await self.store.durable_versions(name) == durable
            assert {manifest.version for manifest in await self.store._durable.manifests(name)} == durable
            assert await self.store.tags(name) == state.tags == await self.store._durable.tags(name)
            if state.latest:
                assert (await self.store.resolve(name)).version == state.latest
        redis = self.store._connection.redis
        for content, digest in DIGESTS.items():
            assert await self.store._durable.has_blob(digest) == (content in self.model.blobs)
            if content in self.model.hot_contents():
                # Bytes of a version must not expire.
                assert await redis.ttl(f"foundry:bytes:{digest}:0") == -1
            readable = self.model.readable(content)
            try:
                stored = await self.store.fetch(digest)
            except CartridgeNotFound:
                assert not readable
            else:
                assert readable is not False
                assert bytes(stored.data) == bytes(cartridge(content).data)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    server = Valkey(tmp_path_factory.mktemp("valkey"))
    asyncio.run(server.start())
    yield server
    server.close()


def test_the_store_does_what_its_model_does(server: Valkey) -> None:
    # The library also takes what makes a machine.
    run_state_machine_as_test(lambda: StoreMachine(server), settings=PROFILE)  # type: ignore[arg-type]
