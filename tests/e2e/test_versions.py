"""Fifty versions are published while sixteen clients generate: every answer is exactly one version's."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from foundry.errors import CartridgeNotFound
from foundry.model.cartridge import Cartridge
from foundry.rpc.channel import open_channel, typed_errors
from foundry.store import CartridgeStore, ManifestDraft
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc
from tests.services import Stack, wait_serving

NAME, RUN = "moving", "run-moving"
VERSIONS, CLIENTS, TOKENS = 50, 16, 8
# Few, so that what 16 clients saw can be decoded again offline; of different lengths, so that batches are mixed.
PROMPTS = ([5, 6, 7], [40, 41, 42, 43, 44, 45, 46], [200], [9, 300, 12, 77, 8])

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("versions"))
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


@dataclass(frozen=True)
class Seen:
    """One answer, and `latest` before and after it."""

    prompt: int
    ids: tuple[int, ...]
    digests: tuple[str, ...]
    version: int
    asked: int


async def publish_all(store: CartridgeStore, cartridges: list[Cartridge], answered: asyncio.Queue[int]) -> None:
    for step, cartridge in enumerate(cartridges):
        draft = ManifestDraft(name=NAME, run=RUN, attempt=1, step=step)
        manifest = await store.publish(cartridge.to_bytes(), draft, durable=step % 10 == 0)
        # Each version is met by some client, while most of the others are still with those before.
        while await answered.get() < manifest.version:
            pass


async def generate(
    stub: rollout_pb2_grpc.RolloutAsyncStub,
    store: CartridgeStore,
    fingerprint: str,
    client: int,
    answered: asyncio.Queue[int],
) -> list[Seen]:
    seen: list[Seen] = []
    while not seen or seen[-1].version < VERSIONS:
        latest = await store.resolve(NAME)
        prompt = (client + len(seen)) % len(PROMPTS)
        request = rollout_pb2.GenerateRequest(
            model_fingerprint=fingerprint,
            token_ids=common_pb2.TokenIds(ids=PROMPTS[prompt]),
            cartridges=[common_pb2.CartridgeId(name=NAME, version=latest.version, digest=latest.digest)],
            sampling=rollout_pb2.Sampling(temperature=0, max_new_tokens=TOKENS),
        )
        ids: list[int] = []
        identity: common_pb2.Identity | None = None
        try:
            with typed_errors("rollout"):
                async for chunk in stub.Generate(request, timeout=60):
                    ids += chunk.ids
                    identity = chunk.identity if chunk.HasField("identity") else identity
        except CartridgeNotFound:
            # Overtaken: four newer versions came before the server had fetched this one. Never another's answer.
            continue
        assert identity is not None
        assert len(identity.cartridges) == 1
        answered.put_nowait(identity.cartridges[0].version)
        digests = tuple(cartridge.digest for cartridge in identity.cartridges)
        seen.append(Seen(prompt, tuple(ids), digests, identity.cartridges[0].version, latest.version))
    return seen


def test_every_answer_is_exactly_one_version(stack: Stack) -> None:
    rollout = stack.rollout("--max-sequences", "16")
    wait_serving(rollout)
    cartridges = [stack.cartridge(seed) for seed in range(VERSIONS)]

    async def work(store: CartridgeStore) -> list[list[Seen]]:
        await store.acquire(NAME, RUN, 1)
        await store.publish(
            cartridges[0].to_bytes(), ManifestDraft(name=NAME, run=RUN, attempt=1, step=0), durable=True
        )
        answered: asyncio.Queue[int] = asyncio.Queue()
        async with open_channel(rollout.address) as channel:
            stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(channel)
            fingerprint = stack.lm.spec.fingerprint
            clients = [generate(stub, store, fingerprint, client, answered) for client in range(CLIENTS)]
            seen, _ = await asyncio.gather(asyncio.gather(*clients), publish_all(store, cartridges, answered))
            return list(seen)

    seen = stack.with_store(work)
    by_digest = {cartridge.to_bytes().digest(): (index, cartridge) for index, cartridge in enumerate(cartridges, 1)}
    answers = {answer for client in seen for answer in client}
    assert {answer.version for answer in answers} == set(range(1, VERSIONS + 1))
    offline: dict[tuple[str, int], tuple[int, ...]] = {}
    for answer in answers:
        version, cartridge = by_digest[answer.digests[0]]
        assert answer.version == answer.asked == version
        key = (answer.digests[0], answer.prompt)
        if key not in offline:
            offline[key] = tuple(stack.greedy(PROMPTS[answer.prompt], [cartridge], TOKENS))
        assert answer.ids == offline[key]
    # The proof can fail: another version would have answered otherwise.
    assert len(set(offline.values())) > len(offline) // 2
    for client in seen:
        versions = [answer.version for answer in client]
        assert versions == sorted(versions)
