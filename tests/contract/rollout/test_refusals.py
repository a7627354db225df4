"""What is refused, and how."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from foundry.errors import (
    CartridgeNotFound,
    ContextLengthExceeded,
    FingerprintMismatch,
    InvalidArgument,
    ResourceExhausted,
    ShapeMismatch,
)
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.v1 import common_pb2, rollout_pb2
from services.rollout.admission import Admission, Admissions
from services.rollout.engine import Grammar
from tests.contract.rollout.server import (
    MAX_SEQUENCES,
    MAX_WAITING,
    TIMEOUT_SECONDS,
    Gate,
    Rollout,
    joined,
    long,
    loop_watched,
    serving,
)
from tests.tiny import lengths_encoded


def changed(request: rollout_pb2.GenerateRequest, **sampling: Any) -> rollout_pb2.GenerateRequest:
    request.sampling.MergeFrom(rollout_pb2.Sampling(**sampling))
    return request


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"temperature": -1}, "sampling.temperature"),
        ({"temperature": math.nan}, "sampling.temperature"),
        ({"temperature": math.inf}, "sampling.temperature"),
        ({"top_p": 0}, "sampling.top_p"),
        ({"top_p": 1.5}, "sampling.top_p"),
        ({"top_p": math.nan}, "sampling.top_p"),
        ({"max_new_tokens": 0}, "sampling.max_new_tokens"),
        ({"max_new_tokens": 252}, "sampling.max_new_tokens"),
        ({"logprobs": 21}, "sampling.logprobs"),
        ({"stop": [""]}, "sampling.stop"),
        ({"stop": ["x" * 257]}, "sampling.stop"),
        ({"stop": ["x"] * 17}, "sampling.stop"),
        ({"n": MAX_SEQUENCES + MAX_WAITING + 1}, "sampling.n"),
        ({"n": 2**32 - 1}, "sampling.n"),
        ({"stop_token_ids": [384]}, "sampling.stop_token_ids"),
        ({"stop_token_ids": range(129)}, "sampling.stop_token_ids"),
    ],
)
async def test_sampling_out_of_range_names_its_field(rollout: Rollout, sampling: dict[str, Any], field: str) -> None:
    request = rollout.request(sampling=sampling)
    with pytest.raises(InvalidArgument) as caught:
        await rollout.generate(request)
    assert caught.value.field == field
    with pytest.raises(InvalidArgument) as caught:
        await rollout.batch([rollout.request(), request])
    assert caught.value.field in (f"requests[1].{field}", "requests")


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"max_new_tokens": 0, "prompt_logprobs": 21}, "sampling.prompt_logprobs"),
        ({"min_p": 1.5}, "sampling.min_p"),
        ({"min_p": math.nan}, "sampling.min_p"),
        ({"min_tokens": 7}, "sampling.min_tokens"),
        ({"logit_bias": {384: 1}}, "sampling.logit_bias"),
        ({"logit_bias": {5: 101}}, "sampling.logit_bias"),
        ({"logit_bias": {5: math.nan}}, "sampling.logit_bias"),
        ({"presence_penalty": -2.5}, "sampling.presence_penalty"),
        ({"frequency_penalty": math.inf}, "sampling.frequency_penalty"),
        ({"repetition_penalty": 0}, "sampling.repetition_penalty"),
        ({"repetition_penalty": math.nan}, "sampling.repetition_penalty"),
        ({"grammar": rollout_pb2.Grammar(regex="a")}, "sampling.ignore_eos"),
        ({"grammar": rollout_pb2.Grammar(regex="a"), "ignore_eos": False, "min_tokens": 1}, "sampling.min_tokens"),
    ],
)
async def test_what_changes_the_distribution_has_its_limits_too(
    rollout: Rollout, sampling: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await rollout.generate(rollout.request(sampling=sampling))
    assert caught.value.field == field


async def test_prompts_that_cannot_be(rollout: Rollout) -> None:
    empty, evil = (
        common_pb2.Conversation(messages=[common_pb2.Message(role=role, content="?") for role in roles])
        for roles in ([], ["user", "evil"])
    )
    cases = [
        (rollout.request([]), "token_ids"),
        (rollout.request([3, 384]), "token_ids"),
        (rollout.request(text=""), "text"),
        (rollout.request(conversation=empty), "messages"),
        (rollout.request(conversation=evil), "messages[1].role"),
        (rollout.request(conversation=evil, cartridges=[rollout.publish(0)]), "messages[1].role"),
        (rollout.request(range(3, 258)), "sampling.max_new_tokens"),
    ]
    request = rollout.request()
    request.ClearField("token_ids")
    for case, field in [*cases, (request, "prompt")]:
        with pytest.raises(InvalidArgument) as caught:
            await rollout.generate(case)
        assert caught.value.field == field
    with pytest.raises(InvalidArgument, match=r"384.*vocabulary of 384"):
        await rollout.generate(cases[1][0])
    with pytest.raises(InvalidArgument, match=r"255.* 6 .*261.*256"):
        await rollout.generate(cases[-1][0])


LONG = "The harbour is open again, said the mayor. " * 33_721


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("text", [LONG, "<|im_end|>" * 145_000, " " * 1_450_000])
async def test_a_prompt_that_cannot_fit_is_refused_untokenised(
    rollout: Rollout, monkeypatch: pytest.MonkeyPatch, text: str, behind: bool
) -> None:
    cartridges = [rollout.publish(0)] if behind else []
    message = common_pb2.Message(role="user", content=text)
    lengths = lengths_encoded(rollout.lm.tokenizer, monkeypatch)
    asked = {"max_new_tokens": 256, "clamp_max_new_tokens": True}
    for field, prompt in (
        ("conversation", {"conversation": common_pb2.Conversation(messages=[message])}),
        ("text", {"text": text}),
    ):
        # What is promised is 0.1 (`make bench-oversized`); machines that run tests have other things to do.
        async with loop_watched(most_seconds=1.0):
            with pytest.raises(ContextLengthExceeded, match=r"at least \d+ tokens .* length is 256 tokens") as caught:
                await rollout.generate(rollout.request(sampling=asked, cartridges=cartridges, **prompt))
        assert caught.value.field == field
    assert max(lengths, default=0) < 1000


async def test_a_prompt_that_might_fit_is_tokenised_once(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    # As many bytes as 256 tokens may have.
    text = ("The president " * 300)[:2000]
    lengths = lengths_encoded(rollout.lm.tokenizer, monkeypatch)
    asked = {"max_new_tokens": 256, "clamp_max_new_tokens": True}
    conversation = common_pb2.Conversation(messages=[common_pb2.Message(role="user", content=text)])
    for field, prompt in (("conversation", {"conversation": conversation}), ("text", {"text": text})):
        with pytest.raises(ContextLengthExceeded, match=r"prompt of \d+ tokens leaves no room .* 256") as caught:
            await rollout.generate(rollout.request(sampling=asked, **prompt))
        assert caught.value.field == field
        assert sum(length > 1000 for length in lengths) == 1
        lengths.clear()


async def test_short_calls_do_not_wait_for_a_long_one(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived, go_on = threading.Event(), threading.Event()
    check = Admissions.check

    def held(self: Admissions, request: rollout_pb2.GenerateRequest, grammar: Grammar | None = None) -> Admission:
        if request.text:
            arrived.set()
            assert go_on.wait(TIMEOUT_SECONDS)
        return check(self, request, grammar)

    monkeypatch.setattr(Admissions, "check", held)
    waiting = asyncio.create_task(rollout.generate(rollout.request(text=LONG)))
    assert await asyncio.to_thread(arrived.wait, TIMEOUT_SECONDS)
    await rollout.generate(rollout.request())
    go_on.set()
    with pytest.raises(ContextLengthExceeded):
        await waiting


async def test_cartridges_count_towards_the_models_context(rollout: Rollout) -> None:
    cartridge = rollout.publish(0, num_tokens=300)
    fits = rollout.request(range(3, 203), cartridges=[cartridge], sampling={"max_new_tokens": 12})
    await rollout.generate(fits)
    with pytest.raises(InvalidArgument, match=r"300.*200.*13.*513.*512") as caught:
        await rollout.generate(changed(fits, max_new_tokens=13))
    assert caught.value.field == "sampling.max_new_tokens"
    assert (await rollout.resident()).cartridges[0].references == 0


@pytest.mark.parametrize(
    ("num_prompt", "num_prefix", "expected"),
    [
        pytest.param(200, 0, 50, id="fits"),
        pytest.param(220, 0, 36, id="fills what the server takes"),
        pytest.param(200, 300, 12, id="fills the context"),
        pytest.param(255, 0, 1, id="one token"),
    ],
)
async def test_a_length_that_may_be_lowered_is(
    rollout: Rollout, num_prompt: int, num_prefix: int, expected: int
) -> None:
    cartridges = [rollout.publish(0, num_tokens=num_prefix)] if num_prefix else []
    asked = {"max_new_tokens": 50, "clamp_max_new_tokens": True, "n": 2}
    request = rollout.request([5] * num_prompt, cartridges=cartridges, sampling=asked)
    chunks = await rollout.generate(request)
    assert [len(joined(chunks, index)[0]) for index in range(2)] == [expected, expected]
    answers = await rollout.batch([request])
    assert {answer.usage.completion_tokens for answer in answers.values()} == {expected}


async def test_no_room_at_all_is_refused_though_the_length_may_be_lowered(rollout: Rollout) -> None:
    asked = {"max_new_tokens": 50, "clamp_max_new_tokens": True}
    for request, message in (
        (rollout.request([5] * 256, sampling=asked), r"prompt of 256 tokens leaves no room .*256"),
        (rollout.request([5] * 200, cartridges=[rollout.publish(0, num_tokens=312)], sampling=asked), r"312.*200.*512"),
    ):
        with pytest.raises(ContextLengthExceeded, match=message) as caught:
            await rollout.generate(request)
        assert caught.value.field == "token_ids"


@pytest.mark.parametrize(
    ("caller", "field"),
    [
        (common_pb2.Caller(tenant="Acme"), "caller.tenant"),
        (common_pb2.Caller(tenant="a" * 64), "caller.tenant"),
        (common_pb2.Caller(tenant="acme/handbook"), "caller.tenant"),
        (common_pb2.Caller(client="x" * 129), "caller.client"),
    ],
)
async def test_callers_are_checked(rollout: Rollout, caller: common_pb2.Caller, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await rollout.generate(rollout.request(caller=caller))
    assert caught.value.field == field


async def test_a_batch_is_one_callers(rollout: Rollout) -> None:
    with pytest.raises(InvalidArgument, match="same caller") as caught:
        await rollout.batch([rollout.request(caller=common_pb2.Caller(client=name)) for name in "aab"])
    assert caught.value.field == "requests[2].caller"


async def test_cartridge_ids_need_a_digest(rollout: Rollout) -> None:
    good = rollout.publish(0)
    for cartridges, field in (
        ([good, common_pb2.CartridgeId(name="report", version=1)], "cartridges[1].digest"),
        ([common_pb2.CartridgeId(digest="blake3:xyz")], "cartridges[0].digest"),
        ([good, good], "cartridges"),
        ([rollout.publish(seed, num_tokens=1) for seed in range(17)], "cartridges"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            await rollout.generate(rollout.request(cartridges=cartridges))
        assert caught.value.field == field


async def test_fingerprint_is_required_everywhere(rollout: Rollout) -> None:
    cartridge = rollout.publish(0)
    for fingerprint, error in (("", InvalidArgument), ("blake3:" + "0" * 64, FingerprintMismatch)):
        request = rollout.request(model_fingerprint=fingerprint, cartridges=[cartridge])
        with pytest.raises(error):
            await rollout.generate(request)
        with pytest.raises(error):
            await rollout.batch([rollout.request(), request])
    assert not (await rollout.resident()).cartridges


async def test_a_digest_that_is_nowhere_is_not_found(rollout: Rollout) -> None:
    known = rollout.publish(0)
    await rollout.generate(rollout.request(cartridges=[known]))
    gone = common_pb2.CartridgeId(name=known.name, version=known.version, digest="blake3:" + "0" * 64)
    with pytest.raises(CartridgeNotFound):
        await rollout.generate(rollout.request(cartridges=[gone]))
    with pytest.raises(CartridgeNotFound):
        await rollout.batch([rollout.request(cartridges=[known]), rollout.request(cartridges=[gone])])
    assert [each.references for each in (await rollout.resident()).cartridges] == [0]


async def test_a_cartridge_of_another_shape(rollout: Rollout) -> None:
    spec = rollout.lm.spec
    header = spec.header(4, 1, torch.float32)
    object.__setattr__(header, "num_layers", 3)
    stored = Cartridge(header, torch.zeros(header.shape)).to_bytes()
    rollout.source.cartridges[stored.digest()] = stored
    with pytest.raises(ShapeMismatch, match="num_layers 3"):
        await rollout.generate(rollout.request(cartridges=[common_pb2.CartridgeId(digest=stored.digest())]))


async def test_batches_that_never_fit(lm: FrozenLM, directory: Path) -> None:
    async with serving(lm, directory) as rollout:
        with pytest.raises(InvalidArgument) as caught:
            await rollout.batch([])
        assert caught.value.field == "requests"
        with pytest.raises(InvalidArgument, match=r"17 sequences.*16") as caught:
            await rollout.batch([rollout.request()] * 15 + [rollout.request(sampling={"n": 2})])
        assert caught.value.field == "requests"
    # A completion of a batch is one message.
    wide = copy.copy(lm)
    wide.info = dataclasses.replace(lm.info, spec=dataclasses.replace(lm.spec, max_tokens=2**20))
    async with serving(wide, directory, max_sequence_tokens=2**15, max_sequences=1) as rollout:
        with pytest.raises(InvalidArgument, match="a message holds") as caught:
            await rollout.batch([rollout.request(sampling={"max_new_tokens": 20_000, "logprobs": 20})])
        assert caught.value.field == "requests[0].sampling.max_new_tokens"


async def test_a_full_queue_says_when_to_come_back(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=1, max_waiting=1) as rollout:
        calls = [rollout.stub.Generate(long(rollout), timeout=TIMEOUT_SECONDS) for _ in range(2)]
        for _ in calls:
            await rollout.submitted.get()
        with pytest.raises(ResourceExhausted) as caught:
            await rollout.generate(rollout.request())
        assert caught.value.retry_after_seconds == 1.0
        calls[1].cancel()
        gate.open()
        await (await rollout.cancelled.get()).ended
        await rollout.generate(rollout.request())


async def test_a_full_budget_says_when_to_come_back(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    num_bytes = lm.spec.header(16, 1, torch.float32).num_bytes
    async with serving(lm, directory, gate, cartridge_budget_bytes=num_bytes) as rollout:
        first, second = rollout.publish(0), rollout.publish(1)
        call = rollout.stub.Generate(long(rollout, cartridges=[first]), timeout=TIMEOUT_SECONDS)
        await rollout.submitted.get()
        with pytest.raises(ResourceExhausted) as caught:
            await rollout.generate(rollout.request(cartridges=[second]))
        assert caught.value.retry_after_seconds is not None
        call.cancel()
        gate.open()
        await (await rollout.cancelled.get()).ended
        await rollout.generate(rollout.request(cartridges=[second]))
        resident = await rollout.resident()
        assert [each.cartridge.digest for each in resident.cartridges] == [second.digest]
