"""The trainer takes no answer that is not the policy's, whatever a server says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from foundry.errors import AlignmentError, Unavailable
from foundry.identity import answer_checksum
from foundry.rpc.answers import Prompt
from foundry.rpc.pods import Pods
from foundry.rpc.rollout import RolloutClient
from foundry.v1 import common_pb2, rollout_pb2
from tests.contract.scripted_rollout import POLICY, Scripted, serving

OTHER = common_pb2.CartridgeId(name="name", version=7, digest="blake3:" + "8" * 64)


@pytest.fixture
async def servers() -> AsyncIterator[tuple[list[Scripted], RolloutClient]]:
    scripted = [Scripted(), Scripted()]
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(serving(servicer)) for servicer in scripted]
        addresses = [f"127.0.0.1:{server.port}" for server in running]
        rollouts = RolloutClient(Pods("rollout", addresses), "blake3:model", "blake3:template", timeout_seconds=10)
        stack.push_async_callback(rollouts.close)
        yield scripted, rollouts


PROMPTS = [Prompt([10 + index], seed=index, place=f"prompt {index}") for index in range(5)]


async def test_answers_come_back_in_the_order_of_the_prompts(servers: tuple[list[Scripted], RolloutClient]) -> None:
    scripted, rollouts = servers
    answers = await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)
    assert [list(answer.ids) for answer in answers] == [[10 + index, 2] for index in range(5)]
    assert [answer.server for answer in answers] == [rollouts._pods.addresses[index % 2] for index in range(5)]
    assert [len(each.requests) for each in scripted] == [3, 2]
    request = scripted[1].requests[0]
    assert request.skip_prefix_cache
    assert request.sampling.seed == 1
    assert [each.digest for each in request.cartridges] == [POLICY.digest]


async def test_calls_are_cut_to_what_each_server_takes(servers: tuple[list[Scripted], RolloutClient]) -> None:
    scripted, rollouts = servers
    scripted[0].max_sequences = 2
    answers = await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)
    assert [list(answer.ids) for answer in answers] == [[10 + index, 2] for index in range(5)]
    assert [each.calls for each in scripted] == [[2, 1], [2]]
    # Remembered, until the server was away: then it may be another, with other settings.
    scripted[0].max_sequences = 64
    await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)
    assert scripted[0].calls[2:] == [2, 1]
    scripted[0].refuses = scripted[0].asked
    with pytest.raises(Unavailable):
        await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)
    scripted[0].refuses = None
    await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)
    assert scripted[0].calls[-1:] == [3]


async def test_prompts_that_no_message_holds_together_are_answered(
    servers: tuple[list[Scripted], RolloutClient],
) -> None:
    scripted, rollouts = servers
    # Of 1.5 MB each: five bytes an id. One server is asked for three of them.
    prompts = [Prompt([10 + index, *[2**30] * 300_000], seed=index) for index in range(5)]
    answers = await rollouts.sample(prompts, POLICY, temperature=1.0, max_new_tokens=8)
    assert [list(answer.ids) for answer in answers] == [[10 + index, 2] for index in range(5)]
    assert [each.calls for each in scripted] == [[2, 1], [2]]


def other_bytes(completion: rollout_pb2.Completion) -> None:
    del completion.identity.cartridges[:]
    completion.identity.cartridges.append(OTHER)


def bare_model(completion: rollout_pb2.Completion) -> None:
    del completion.identity.cartridges[:]


def no_logprobs(completion: rollout_pb2.Completion) -> None:
    del completion.logprobs[:]


def empty(completion: rollout_pb2.Completion) -> None:
    del completion.ids[:], completion.logprobs[:]


def other_model(completion: rollout_pb2.Completion) -> None:
    completion.identity.model_fingerprint = "blake3:other"


def other_template(completion: rollout_pb2.Completion) -> None:
    completion.identity.template_digest = "blake3:other"


def moved_keys(completion: rollout_pb2.Completion) -> None:
    completion.identity.rope = common_pb2.ROPE_SHIFT


def cut_off(completion: rollout_pb2.Completion) -> None:
    completion.finish_reason = rollout_pb2.FINISH_REASON_UNSPECIFIED


def flipped_last_id(completion: rollout_pb2.Completion) -> None:
    completion.ids[-1] ^= 1


def flipped_logprob(completion: rollout_pb2.Completion) -> None:
    completion.logprobs[0] = -0.50000006


def unknown_finish_reason(completion: rollout_pb2.Completion) -> None:
    completion.finish_reason = 17  # type: ignore[assignment]


def another_prompts(completion: rollout_pb2.Completion) -> None:
    completion.checksum = answer_checksum([9], completion.ids, completion.logprobs)


LIES = [other_bytes, bare_model, no_logprobs, empty, other_model, other_template, moved_keys, cut_off]
DAMAGES = [flipped_last_id, flipped_logprob, unknown_finish_reason, another_prompts]


@pytest.mark.parametrize("lie", [*LIES, *DAMAGES], ids=lambda f: f.__name__)
async def test_answers_of_another_policy_are_refused(servers: tuple[list[Scripted], RolloutClient], lie: Any) -> None:
    scripted, rollouts = servers
    scripted[1].changes["lie"] = lie
    with pytest.raises(AlignmentError, match="rollout 127"):
        await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)


async def test_a_wrong_identity_names_the_server_and_both_digests(
    servers: tuple[list[Scripted], RolloutClient],
) -> None:
    scripted, rollouts = servers
    scripted[1].changes["lie"] = other_bytes
    with pytest.raises(AlignmentError) as caught:
        await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)
    assert caught.value.message == (
        f"rollout {rollouts._pods.addresses[1]} answered with cartridges {OTHER.digest} when {POLICY.digest} was asked"
    )
    scripted[1].changes["lie"] = bare_model
    with pytest.raises(AlignmentError, match=f"{rollouts._pods.addresses[1]} answered with cartridges none when"):
        await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)


async def test_a_missing_answer_is_an_error(servers: tuple[list[Scripted], RolloutClient]) -> None:
    scripted, rollouts = servers
    scripted[0].leave_out = True
    with pytest.raises(AlignmentError, match="answered 2 of 3"):
        await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)


async def test_what_one_server_refuses_is_cancelled_on_the_others(
    servers: tuple[list[Scripted], RolloutClient],
) -> None:
    """Otherwise the same prompts, asked again, would be decoded beside their first copies, to other bits."""
    scripted, rollouts = servers
    scripted[0].cancelled = asyncio.Event()
    scripted[1].refuses = scripted[0].asked
    with pytest.raises(Unavailable):
        await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)
    async with asyncio.timeout(5):
        await scripted[0].cancelled.wait()
