"""Where the keys of several cartridges stand: as asked for, as told in the answer, and cached apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from foundry.errors import ContextLengthExceeded, InvalidArgument, ResourceExhausted, RopeUnsupported
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.model.rotation import KeyRotation
from foundry.v1 import common_pb2, rollout_pb2
from services.rollout.engine.torch.engine import TorchEngine
from tests.contract.rollout.server import Rollout, joined, serving

KEEP, SHIFT = common_pb2.ROPE_KEEP, common_pb2.ROPE_SHIFT
IDS = list(range(10, 40))


def three(rollout: Rollout) -> list[common_pb2.CartridgeId]:
    return [rollout.publish(seed, num_tokens) for seed, num_tokens in enumerate((16, 23, 9))]


async def answered(
    rollout: Rollout, cartridges: Sequence[common_pb2.CartridgeId], rope: Any = None
) -> tuple[list[int], list[float], rollout_pb2.GenerateChunk, rollout_pb2.GenerateChunk]:
    """Ids, logprobs, the first and the last chunk."""
    chunks = await rollout.generate(rollout.request(IDS, cartridges=cartridges, rope=rope))
    ids, logprobs, _ = joined(chunks)
    return ids, logprobs, chunks[0], chunks[-1]


def expected(rollout: Rollout, cartridges: Sequence[common_pb2.CartridgeId], ids: list[int], *, shift: bool) -> Any:
    """Logprobs of an answer by one forward behind all of them."""
    lm, parts, offset = rollout.lm, [], 0
    for named in cartridges:
        kv_L2GPD = Cartridge.from_bytes(rollout.source.cartridges[named.digest]).kv_L2GPD
        parts.append(KeyRotation.of(lm).move(kv_L2GPD, offset) if shift else kv_L2GPD)
        offset += kv_L2GPD.shape[3]
    with torch.no_grad():
        hidden_TE = lm.packed_hidden([[*IDS, *ids][:-1]], [torch.cat(parts, dim=3)])
        logprobs_TV = torch.log_softmax(lm.logits(hidden_TE), dim=-1)[len(IDS) - 1 :]
    return pytest.approx(logprobs_TV.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist(), abs=1e-4)


async def test_keys_stand_as_asked_for_and_the_answer_says_where(rollout: Rollout) -> None:
    cartridges = three(rollout)
    found = {}
    for rope, told, shift in ((None, KEEP, False), (KEEP, KEEP, False), (SHIFT, SHIFT, True)):
        ids, logprobs, first, last = await answered(rollout, cartridges, rope)
        assert first.identity.rope == told
        assert list(first.identity.cartridges) == cartridges
        assert last.usage.cartridge_tokens == 48
        assert logprobs == expected(rollout, cartridges, ids, shift=shift)
        found[rope] = logprobs
    assert found[None] != found[SHIFT]


async def test_a_batch_may_ask_for_both(rollout: Rollout) -> None:
    a, b, c = three(rollout)
    asked = [((a, b), KEEP), ((a, b), SHIFT), ((b, a), SHIFT), ((c, a, b), SHIFT), ((b,), SHIFT), ((), None)]
    requests = [rollout.request(IDS, cartridges=cartridges, rope=rope) for cartridges, rope in asked]
    completions = await rollout.batch([*requests, requests[1]])
    for index, (cartridges, rope) in enumerate([*asked, asked[1]]):
        completion = completions[index, 0]
        assert completion.identity.rope == (rope or KEEP)
        assert [each.digest for each in completion.identity.cartridges] == [each.digest for each in cartridges]
        if cartridges:
            ids = list(completion.ids)
            assert list(completion.logprobs) == expected(rollout, cartridges, ids, shift=rope == SHIFT)
    # Of both batches that stood behind a and b with one rope.
    assert all(resident.references == 0 for resident in (await rollout.resident()).cartridges)


async def test_a_single_cartridge_is_the_same_to_the_bit(rollout: Rollout) -> None:
    cartridge = rollout.publish(0)
    requests = [
        rollout.request(IDS, cartridges=[cartridge], rope=rope, skip_prefix_cache=True) for rope in (KEEP, SHIFT)
    ]
    kept, shifted = [await rollout.generate(each) for each in requests]
    assert joined(kept) == joined(shifted)
    assert (kept[0].identity.rope, shifted[0].identity.rope) == (KEEP, SHIFT)
    # And no copy was made for it.
    assert len((await rollout.resident()).cartridges) == 1


async def test_what_is_cached_behind_one_is_not_read_behind_the_other(rollout: Rollout) -> None:
    a, b, c = three(rollout)
    for cartridges, rope in (((a, b), KEEP), ((a, b), SHIFT), ((c, b), SHIFT), ((c, b), KEEP)):
        first = await answered(rollout, cartridges, rope)
        again = await answered(rollout, cartridges, rope)
        assert [each[3].usage.cached_tokens for each in (first, again)] == [0, 29]
        assert again[0] == first[0]


async def test_copies_are_residents_of_the_budget(lm: FrozenLM, directory: Path) -> None:
    token_bytes = lm.spec.kv_bytes_per_token(torch.float32)
    async with serving(lm, directory, cartridge_budget_bytes=3 * 16 * token_bytes) as rollout:
        a, b = (rollout.publish(seed) for seed in range(2))
        await answered(rollout, [a, b], KEEP)
        await answered(rollout, [a, b], SHIFT)
        found = (await rollout.resident()).cartridges
        assert {(each.cartridge.digest, each.shift) for each in found} == {(a.digest, 0), (b.digest, 0), (b.digest, 16)}
        assert {each.num_bytes for each in found} == {16 * token_bytes}
        # The least recently used makes room, copy or not.
        ids, logprobs, *_ = await answered(rollout, [b, a], SHIFT)
        assert logprobs == expected(rollout, [b, a], ids, shift=True)
        kept = [(each.cartridge.digest, each.shift) for each in (await rollout.resident()).cartridges]
        assert len(kept) == 3
        assert {(b.digest, 0), (a.digest, 16)} < set(kept)
    async with serving(lm, directory, cartridge_budget_bytes=16 * token_bytes) as rollout:
        with pytest.raises(ResourceExhausted):
            await answered(rollout, [rollout.publish(0), rollout.publish(1)], SHIFT)


@pytest.mark.parametrize("rope", [KEEP, SHIFT])
async def test_cartridges_longer_than_the_context_are_refused_by_name(rollout: Rollout, rope: Any) -> None:
    most = rollout.lm.spec.max_tokens
    long = [rollout.publish(seed, most // 2) for seed in range(2)]
    with pytest.raises(ContextLengthExceeded, match=f"maximum context length is {most} tokens") as caught:
        await answered(rollout, long, rope)
    assert caught.value.field == "cartridges"
    with pytest.raises(ContextLengthExceeded) as caught:
        await answered(rollout, [*long, rollout.publish(2, 5)], rope)
    assert caught.value.field == "cartridges"
    # No key was moved to where the model has no positions.
    assert all(each.shift + 5 <= most for each in (await rollout.resident()).cartridges)


async def test_an_unknown_rope_is_refused(rollout: Rollout) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await answered(rollout, three(rollout), 7)
    assert caught.value.field == "rope"


async def test_an_engine_that_moves_no_keys_refuses_to(
    lm: FrozenLM, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = TorchEngine.__init__

    def without(self: TorchEngine, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        self.rotation = "it is made so"

    monkeypatch.setattr(TorchEngine, "__init__", without)
    async with serving(lm, directory) as rollout:
        cartridges = three(rollout)
        with pytest.raises(RopeUnsupported, match="it is made so") as caught:
            await answered(rollout, cartridges, SHIFT)
        assert caught.value.field == "rope"
        # Nothing was loaded for it, and what needs no keys moved is answered.
        assert not (await rollout.resident()).cartridges
        for some, rope in ((cartridges, KEEP), (cartridges[:1], SHIFT)):
            assert (await answered(rollout, some, rope))[2].identity.rope == rope
        with pytest.raises(RopeUnsupported):
            await rollout.parts.residency.load(cartridges[0], 16)
