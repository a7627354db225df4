"""The engine tokasaurus through our gRPC, before a server written from that branch's documentation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.responses import JSONResponse, Response

from foundry.errors import (
    AlignmentError,
    DeadlineExceeded,
    FoundryError,
    InvalidArgument,
    PartialPage,
    PolicyUnproven,
    Unavailable,
)
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.rpc.channel import open_channel
from foundry.v1 import common_pb2, rollout_pb2
from services.rollout.engine.tokasaurus.engine import TokasaurusEngine
from services.rollout.serving import Serving, load_engine, tokasaurus_engine
from services.rollout.settings import RolloutSettings
from tests.contract.rollout.server import STORE, DictSource, Rollout, joined, served, serving
from tests.contract.rollout.tokasaurus_server import TokasaurusServer, listening

GREEDY = {"temperature": 0.0}


class External(Rollout):
    engine: TokasaurusEngine
    server: TokasaurusServer

    def request(self, *args: Any, sampling: dict[str, Any] | None = None, **fields: Any) -> rollout_pb2.GenerateRequest:
        return super().request(*args, sampling={**GREEDY, **(sampling or {})}, **fields)


@asynccontextmanager
async def external(lm: FrozenLM, server: TokasaurusServer, **tokasaurus: Any) -> AsyncIterator[External]:
    values = {"url": server.url, "cartridge_dir": server.cartridge_dir, **tokasaurus}
    settings = RolloutSettings.model_validate(
        {"model": server.model_directory, "store": STORE, "engine": "tokasaurus", "tokasaurus": values}
        | {"max_sequences": 4, "max_waiting": 12, "max_sequence_tokens": 256}
    )
    engine = tokasaurus_engine(settings, lm.info)
    source = DictSource()
    parts = Serving.build(settings, lm.info, engine, source)
    async with served(parts, None) as address, open_channel(address) as channel:
        running = External(lm, parts, source, address, channel)
        running.engine, running.server = engine, server
        yield running
    await asyncio.to_thread(engine.close)


@pytest.fixture
def server(lm: FrozenLM, directory: Path, tmp_path: Path) -> TokasaurusServer:
    return TokasaurusServer(directory, tmp_path, lm.info.eos_ids)


@pytest.fixture
async def rollout(lm: FrozenLM, server: TokasaurusServer) -> AsyncIterator[External]:
    async with listening(server), external(lm, server) as running:
        yield running


async def test_it_answers_as_the_built_in_engine_does(rollout: External, lm: FrozenLM, directory: Path) -> None:
    cartridge = rollout.publish(seed=1, num_tokens=32, version=3)
    asked = rollout.request(cartridges=[cartridge], sampling={"logprobs": 3})
    chunks = await rollout.generate(asked)
    ids, logprobs, text = joined(chunks)
    async with serving(lm, directory) as built_in:
        built_in.source.cartridges = rollout.source.cartridges
        expected = await built_in.generate(asked)
    assert (ids, text) == (joined(expected)[0], joined(expected)[2])
    assert logprobs == pytest.approx(joined(expected)[1], abs=1e-4)
    top = [each for chunk in chunks for each in chunk.top_logprobs]
    expected_top = [each for chunk in expected for each in chunk.top_logprobs]
    assert [list(each.ids) for each in top] == [list(each.ids) for each in expected_top]
    assert top[0].logprobs == pytest.approx(expected_top[0].logprobs, abs=1e-4)
    # Name, version and digest come back.
    assert list(chunks[0].identity.cartridges) == [cartridge]
    assert chunks[0].identity.model_fingerprint == lm.spec.fingerprint
    assert (chunks[-1].usage.cartridge_tokens, chunks[-1].usage.completion_tokens) == (32, 6)
    assert [offset for chunk in chunks for offset in chunk.text_offsets] == [
        offset for chunk in expected for offset in chunk.text_offsets
    ]


async def test_without_a_cartridge_it_is_the_plain_model(rollout: External, lm: FrozenLM, directory: Path) -> None:
    found = joined(await rollout.generate(rollout.request()))
    async with serving(lm, directory) as built_in:
        assert found[0] == joined(await built_in.generate(rollout.request()))[0]
    assert rollout.server.bodies[0]["cartridges"] == []


async def test_versions_have_ids_of_their_own_that_hold_the_digest(rollout: External) -> None:
    first, second = rollout.publish(seed=1), rollout.publish(seed=2, version=2)
    answers = [joined(await rollout.generate(rollout.request(cartridges=[each])))[0] for each in (first, second)]
    assert answers[0] != answers[1]
    asked = [body["cartridges"] for body in rollout.server.bodies]
    for cartridge, (named,) in zip((first, second), asked, strict=True):
        assert cartridge.digest.removeprefix("blake3:") in named["id"]
        assert named["source"] == "local"
    # One that was dropped and came back has another: the server would not read it again under the old one.
    await asyncio.to_thread(rollout.parts.residency.device.remove, first.digest)
    assert sorted(path.name for path in rollout.server.cartridge_dir.iterdir()) == [asked[1][0]["id"]]
    again = joined(await rollout.generate(rollout.request(cartridges=[first])))[0]
    assert again == answers[0]
    assert rollout.server.bodies[-1]["cartridges"][0]["id"] != asked[0][0]["id"]


async def test_a_cartridge_without_frozen_tokens_is_one_that_the_server_reads(rollout: External) -> None:
    spec = rollout.lm.spec
    kv = torch.randn(spec.kv_shape(16), generator=torch.Generator().manual_seed(3))
    stored = Cartridge(spec.header(16, 0, torch.float32), kv).to_bytes()
    rollout.source.cartridges[stored.digest()] = stored
    cartridge = common_pb2.CartridgeId(name="report", version=1, digest=stored.digest())
    ids = joined(await rollout.generate(rollout.request(cartridges=[cartridge])))[0]
    assert ids != joined(await rollout.generate(rollout.request()))[0]


async def test_a_length_that_fills_no_page_is_refused(rollout: External) -> None:
    cartridge = rollout.publish(seed=1, num_tokens=24)
    with pytest.raises(PartialPage, match=r"24 tokens.* pages of 16") as raised:
        await rollout.generate(rollout.request(cartridges=[cartridge]))
    assert raised.value.field == "cartridges"
    assert list(rollout.server.cartridge_dir.iterdir()) == []
    assert rollout.server.bodies == []


async def test_nothing_is_trained_on_its_answers(rollout: External) -> None:
    cartridge = rollout.publish(seed=1)
    with pytest.raises(PolicyUnproven, match="does not say which bytes it decoded with"):
        await rollout.batch([rollout.request(cartridges=[cartridge])])
    assert rollout.server.bodies == []


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"top_p": 0.5}, "sampling.top_p"),
        ({"top_k": 5}, "sampling.top_k"),
        ({"min_p": 0.1}, "sampling.min_p"),
        ({"min_tokens": 2}, "sampling.min_tokens"),
        ({"logit_bias": {3: 1.0}}, "sampling.logit_bias"),
        ({"presence_penalty": 1.0}, "sampling.presence_penalty"),
        ({"frequency_penalty": 1.0}, "sampling.frequency_penalty"),
        ({"repetition_penalty": 1.5}, "sampling.repetition_penalty"),
        ({"prompt_logprobs": 0}, "sampling.prompt_logprobs"),
        ({"grammar": rollout_pb2.Grammar(regex="a+")}, "sampling.grammar"),
        ({"temperature": 0.7}, "sampling.temperature"),
        ({"temperature": 1.0}, "sampling.seed"),
    ],
)
async def test_what_the_server_would_not_do_is_refused(rollout: External, sampling: Any, field: str) -> None:
    with pytest.raises(InvalidArgument, match="the Tokasaurus server that decodes here") as raised:
        await rollout.generate(rollout.request(sampling=sampling))
    assert raised.value.field == field
    assert rollout.server.bodies == []


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"skip_prefix_cache": True}, "skip_prefix_cache"),
        ({"caller": common_pb2.Caller(tenant="a")}, "caller.tenant"),
    ],
)
async def test_what_it_would_share_is_refused(rollout: External, fields: Any, field: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        await rollout.generate(rollout.request(**fields))
    assert raised.value.field == field


async def test_an_order_that_it_would_not_keep_is_refused(rollout: External) -> None:
    both = [rollout.publish(seed=1), rollout.publish(seed=2)]
    with pytest.raises(InvalidArgument, match="name one"):
        await rollout.generate(rollout.request(cartridges=both))


async def test_neutral_values_are_taken_and_the_seed_is_the_servers(rollout: External) -> None:
    sampling = rollout_pb2.Sampling(
        temperature=1.0, top_p=1.0, repetition_penalty=1.0, n=2, max_new_tokens=6, ignore_eos=True
    )
    request = rollout.request()
    request.sampling.CopyFrom(sampling)
    chunks = await rollout.generate(request)
    assert [len(joined(chunks, index)[0]) for index in range(2)] == [6, 6]
    assert [body["temperature"] for body in rollout.server.bodies] == [1.0, 1.0]


async def test_stops_end_the_answer_where_they_do_here(rollout: External, lm: FrozenLM, directory: Path) -> None:
    ids, _, text = joined(await rollout.generate(rollout.request(sampling={"max_new_tokens": 12})))
    for stops in ({"stop": [text[2:4]]}, {"stop_token_ids": [ids[3]]}):
        request = rollout.request(sampling={"max_new_tokens": 12, **stops})
        chunks = await rollout.generate(request)
        async with serving(lm, directory) as built_in:
            expected = await built_in.generate(request)
        assert joined(chunks)[0] == joined(expected)[0]
        assert joined(chunks)[2] == joined(expected)[2]
        assert chunks[-1].finish_reason == rollout_pb2.FINISH_REASON_STOP


async def test_a_server_that_is_gone_is_said_and_comes_back(lm: FrozenLM, server: TokasaurusServer) -> None:
    async with listening(server):
        pass
    async with external(lm, server) as rollout:
        with pytest.raises(Unavailable, match="can't be reached"):
            await rollout.generate(rollout.request())
        # The service goes on.
        async with listening(server):
            rollout.engine._server._client.base_url = server.url
            assert len(joined(await rollout.generate(rollout.request()))[0]) == 6


async def test_an_error_is_no_token(rollout: External) -> None:
    metrics = rollout.parts.driver._metrics
    before = metrics.generation_tokens._value.get(), metrics.request_success["abort"]._value.get()
    rollout.server.answer = lambda _: Response(status_code=500)
    with pytest.raises(Unavailable):
        await rollout.generate(rollout.request())
    after = metrics.generation_tokens._value.get(), metrics.request_success["abort"]._value.get()
    assert after == (before[0], before[1] + 1)


async def test_an_answer_has_a_deadline(lm: FrozenLM, server: TokasaurusServer) -> None:
    never = asyncio.Event()
    server.before_answer = never.wait  # type: ignore[assignment]
    async with listening(server), external(lm, server, answer_timeout_seconds=0.2) as rollout:
        with pytest.raises(DeadlineExceeded, match=r"within 0\.2 s"):
            await rollout.generate(rollout.request())
        await asyncio.wait_for(server.given_up.wait(), 10)


async def test_a_call_that_is_given_up_is_given_up_there(rollout: External) -> None:
    asked, never = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        asked.set()
        await never.wait()

    rollout.server.before_answer = wait
    call = asyncio.create_task(rollout.generate(rollout.request()))
    await asyncio.wait_for(asked.wait(), 10)
    call.cancel()
    await asyncio.wait_for(rollout.server.given_up.wait(), 10)


def changed(**fields: Any) -> Callable[[dict[str, Any]], Response]:
    def answer(content: dict[str, Any]) -> Response:
        packed = json.loads(content["system_fingerprint"]) | fields
        return JSONResponse(content | {"system_fingerprint": json.dumps(packed)})

    return answer


LIES: dict[str, tuple[Callable[[dict[str, Any]], Response], type[FoundryError], str]] = {
    "no JSON": (lambda _: Response("<html>"), AlignmentError, "no answer"),
    "a list": (lambda _: JSONResponse([]), AlignmentError, "no answer"),
    "another model's": (changed(completion_ids=[[9999] * 6]), AlignmentError, "9999 is no token"),
    "truth values": (changed(completion_ids=[[True] * 6]), AlignmentError, "True is no token"),
    "two of one": (changed(completion_ids=[[1], [2]]), AlignmentError, "no answer"),
    "fewer logprobs": (changed(completion_ids=[[5] * 5]), AlignmentError, "6 numbers where 5 belong"),
    "no logprobs": (changed(packed_chosen_logprobs=None), AlignmentError, "no answer"),
    "NaN": (changed(packed_chosen_logprobs=["AADAfwAAwH8AAMB/AADAfwAAwH8AAMB/"]), AlignmentError, "logprobs"),
    "too much": (lambda _: Response(b" " * 2**20), AlignmentError, "bytes that an answer may have"),
    "an early end": (
        changed(completion_ids=[[5]], packed_chosen_logprobs=["AACAvw=="]),
        AlignmentError,
        "ended an answer after 1 tokens",
    ),
    "a fault": (lambda _: Response("oh", status_code=500), Unavailable, "failed: status 500"),
    "too long": (lambda _: JSONResponse({"detail": "too long"}, status_code=400), InvalidArgument, "too long"),
    "no such route": (lambda _: JSONResponse({"detail": "Not Found"}, status_code=404), Unavailable, "route"),
}


@pytest.mark.parametrize("lie", LIES)
async def test_what_is_no_answer_is_none(rollout: External, lie: str) -> None:
    rollout.server.answer, error, said = LIES[lie]
    with pytest.raises(error, match=said):
        await rollout.generate(rollout.request())
    # Nothing of it is left for the next one.
    rollout.server.answer = JSONResponse
    assert len(joined(await rollout.generate(rollout.request()))[0]) == 6


async def test_more_alternatives_than_the_server_has_are_its_refusal(rollout: External) -> None:
    with pytest.raises(InvalidArgument, match="max_topk_logprobs=4"):
        await rollout.generate(rollout.request(sampling={"logprobs": 5}))


async def test_a_directory_that_is_another_is_said(lm: FrozenLM, server: TokasaurusServer, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    async with listening(server), external(lm, server, cartridge_dir=tmp_path / "other") as rollout:
        with pytest.raises(Unavailable, match="is its `cartridge_dir` the directory of"):
            await rollout.generate(rollout.request(cartridges=[rollout.publish(seed=1)]))


async def test_earlier_branches_have_it_elsewhere(lm: FrozenLM, server: TokasaurusServer) -> None:
    path = "/v1/cartridge/completions"
    async with listening(server, path), external(lm, server, route=path) as rollout:
        assert len(joined(await rollout.generate(rollout.request()))[0]) == 6


async def test_more_sequences_than_places_wait_their_turn(rollout: External) -> None:
    running, most = 0, 0

    async def count() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1

    rollout.server.before_answer = count
    answers = await asyncio.gather(*(rollout.generate(rollout.request(ids=(5, 6, each))) for each in range(7, 17)))
    assert [len(joined(chunks)[0]) for chunks in answers] == [6] * 10
    assert most <= 4


async def test_the_end_leaves_no_cartridge_behind(lm: FrozenLM, server: TokasaurusServer) -> None:
    async with listening(server), external(lm, server) as rollout:
        await rollout.generate(rollout.request(cartridges=[rollout.publish(seed=1)]))
        assert len(list(server.cartridge_dir.iterdir())) == 1
    assert list(server.cartridge_dir.iterdir()) == []


def test_the_directory_must_be_there(directory: Path, tmp_path: Path) -> None:
    for cartridge_dir in (None, tmp_path / "nowhere"):
        settings = RolloutSettings.model_validate(
            {"model": directory, "store": STORE, "engine": "tokasaurus", "tokasaurus": {"cartridge_dir": cartridge_dir}}
        )
        with pytest.raises(InvalidArgument) as raised:
            load_engine(settings)
        assert raised.value.field == "tokasaurus.cartridge_dir"
