"""What veRL calls a server, before a rollout server; without veRL itself (see test_verl.py)."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from foundry.adapters.verl_server import VerlServer
from foundry.errors import (
    CartridgeNotFound,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidArgument,
    PolicyUnproven,
    ResourceExhausted,
    Unavailable,
)
from foundry.model.lm import FrozenLM
from foundry.v1.common_pb2 import CartridgeId
from tests.contract.rollout.server import Gate, Rollout, serving
from tests.contract.rollout.test_tokasaurus import external
from tests.contract.rollout.tokasaurus_server import TokasaurusServer, listening

IDS = [5, 6, 7, 8, 9]


def named(cartridge: CartridgeId) -> dict[str, Any]:
    return {"name": cartridge.name, "version": cartridge.version, "digest": cartridge.digest}


@asynccontextmanager
async def verl_server(address: str, cartridge: Any = None, **settings: Any) -> AsyncIterator[VerlServer]:
    server = VerlServer(
        address,
        cartridge,
        **{"max_context_tokens": 128, "response_tokens": 6, "timeout_seconds": 20.0, "retry_seconds": 0.1, **settings},
    )
    try:
        yield server
    finally:
        await server.close()


async def test_tokens_in_tokens_out_with_logprobs_and_the_version(rollout: Rollout) -> None:
    cartridge = rollout.publish(seed=1, version=7)
    async with verl_server(rollout.address, named(cartridge)) as server:
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "logprobs": True}
        answer = await server.generate(IDS, {**sampling, "seed": 3}, "request-1")
    expected = (
        await rollout.batch([rollout.request(cartridges=[cartridge], sampling={"seed": 3, "ignore_eos": False})])
    )[0, 0]
    assert answer.token_ids == list(expected.ids)
    assert answer.log_probs == pytest.approx(expected.logprobs, abs=1e-5)
    assert answer.stop_reason == "completed"
    assert answer.extra_fields == {
        "global_steps": None,
        "cartridge_name": "report",
        "cartridge_version": 7,
        "cartridge_digest": cartridge.digest,
        "model_fingerprint": rollout.lm.spec.fingerprint,
    }


async def test_a_new_version_answers_from_then_on(rollout: Rollout) -> None:
    first, second = rollout.publish(seed=1), rollout.publish(seed=2, version=2)
    async with verl_server(rollout.address, named(first)) as server:
        before = await server.generate(IDS, {"temperature": 0.0}, "a")
        await server.set_policy(named(second), 12)
        after = await server.generate(IDS, {"temperature": 0.0}, "a")
    assert before.token_ids != after.token_ids
    assert (after.extra_fields["cartridge_digest"], after.extra_fields["global_steps"]) == (second.digest, 12)
    assert after.log_probs is None


async def test_without_a_cartridge_the_plain_model_answers(rollout: Rollout) -> None:
    async with verl_server(rollout.address) as server:
        answer = await server.generate(IDS, {"temperature": 0.0, "max_tokens": 3}, "a")
    assert len(answer.token_ids) <= 3
    assert (answer.extra_fields["cartridge_digest"], answer.extra_fields["cartridge_version"]) == ("", 0)


async def test_the_same_request_has_the_same_answer(rollout: Rollout) -> None:
    async with verl_server(rollout.address) as server:
        first, again, other = [await server.generate(IDS, {}, name) for name in ("a", "a", "b")]
    assert first.token_ids == again.token_ids != other.token_ids


async def test_the_context_bounds_an_answer(rollout: Rollout) -> None:
    async with verl_server(rollout.address, max_context_tokens=8) as server:
        assert len((await server.generate(IDS, {"max_new_tokens": 50}, "a")).token_ids) <= 3
        with pytest.raises(InvalidArgument, match="8 tokens leaves no room") as raised:
            await server.generate([5] * 8, {}, "a")
    assert raised.value.field == "prompt_ids"


@pytest.mark.parametrize(
    ("sampling", "more", "field"),
    [
        ({"top_p": 0.9}, {}, "sampling_params.top_p"),
        ({"top_k": 4}, {}, "sampling_params.top_k"),
        ({"repetition_penalty": 1.1}, {}, "sampling_params.repetition_penalty"),
        ({"min_tokens": 4}, {}, "sampling_params.min_tokens"),
        ({}, {"image_data": [b"x"]}, "image_data"),
        ({}, {"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ],
)
async def test_what_is_not_the_policy_is_refused(sampling: Any, more: Any, field: str) -> None:
    async with verl_server("127.0.0.1:1") as server:
        with pytest.raises(InvalidArgument) as raised:
            await server.generate(IDS, sampling, "a", **more)
    assert raised.value.field == field


@pytest.mark.parametrize("cartridge", [{"name": "a"}, {"name": "a", "version": 1, "digest": "latest"}, ["a"]])
def test_a_cartridge_is_named_by_its_digest(cartridge: Any) -> None:
    with pytest.raises(InvalidArgument):
        VerlServer("127.0.0.1:1", cartridge, max_context_tokens=8, response_tokens=4)


async def test_another_model_is_refused(rollout: Rollout) -> None:
    async with verl_server(rollout.address, model_fingerprint="blake3:" + "0" * 64) as server:
        with pytest.raises(FingerprintMismatch):
            await server.generate(IDS, {}, "a")


async def test_what_the_server_says_comes_through_and_through_a_pickle(rollout: Rollout) -> None:
    digest = "blake3:" + "1" * 64
    async with verl_server(rollout.address, {"name": "a", "version": 1, "digest": digest}) as server:
        with pytest.raises(CartridgeNotFound) as raised:
            await server.generate(IDS, {}, "a")
    assert type(pickle.loads(pickle.dumps(raised.value))) is CartridgeNotFound


async def test_a_server_that_is_gone_is_said() -> None:
    async with verl_server("127.0.0.1:1") as server:
        with pytest.raises(Unavailable):
            await server.generate(IDS, {}, "a")


async def test_a_server_that_comes_back_is_asked_again(rollout: Rollout, monkeypatch: pytest.MonkeyPatch) -> None:
    async with verl_server(rollout.address, retry_seconds=20.0) as server:
        connect, away = server._connect, [Unavailable("away"), ResourceExhausted("full", retry_after_seconds=0.01)]

        async def flaky() -> Any:
            if away:
                raise away.pop()
            return await connect()

        monkeypatch.setattr(server, "_connect", flaky)
        assert (await server.generate(IDS, {}, "a")).stop_reason == "completed"
    assert away == []


async def test_calls_have_deadlines_and_end_when_all_are_aborted(lm: FrozenLM, directory: Path) -> None:
    async with serving(lm, directory, gate := Gate()) as rollout:
        async with verl_server(rollout.address, timeout_seconds=0.3) as server:
            with pytest.raises(DeadlineExceeded):
                await server.generate(IDS, {}, "a")
        async with verl_server(rollout.address) as server:
            while not rollout.submitted.empty():
                rollout.submitted.get_nowait()
            call = asyncio.create_task(server.generate(IDS, {}, "a"))
            await asyncio.wait_for(rollout.submitted.get(), 10)
            await server.abort_all_requests()
            answer = await asyncio.wait_for(call, 10)
            gate.open()
    assert (answer.token_ids, answer.stop_reason) == ([], "aborted")


async def test_an_external_server_proves_nothing_to_it(lm: FrozenLM, directory: Path, tmp_path: Path) -> None:
    tokasaurus = TokasaurusServer(directory, tmp_path, lm.info.eos_ids)
    async with listening(tokasaurus), external(lm, tokasaurus) as rollout:
        server = VerlServer(rollout.address, named(rollout.publish(seed=1)), max_context_tokens=128, response_tokens=6)
        with pytest.raises(PolicyUnproven):
            await server.generate(IDS, {}, "a")
        await server.close()
