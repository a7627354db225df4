"""The rollout service over gRPC: what an answer carries, what is refused and how, and how work ends early."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

from foundry.cartridge import Cartridge
from foundry.errors import (
    CartridgeNotFound,
    Conflict,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidArgument,
    ResourceExhausted,
    ShapeMismatch,
    Unavailable,
)
from foundry.identity import CartridgeBytes, CartridgeHeader
from foundry.lm import FrozenLM
from foundry.rpc.channel import open_channel, typed_errors, wait_until_serving
from foundry.rpc.limits import MAX_MESSAGE_BYTES
from foundry.rpc.server import Server
from foundry.template import ChatTemplate
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc
from services.rollout import main
from services.rollout.driver import Job
from services.rollout.engine import TokenOutput
from services.rollout.engine.torch_engine import TorchEngine
from services.rollout.parts import Parts
from services.rollout.servicer import RolloutServicer
from services.rollout.settings import RolloutSettings
from tests.tiny import CHATML, build_tiny_model

TIMEOUT_SECONDS = 30.0
MAX_SEQUENCES, MAX_WAITING = 4, 12
STORE = {"redis_url": "redis://127.0.0.1:1/0", "objects_url": "memory://", "redis_timeout_seconds": 0.5}


class DictSource:
    def __init__(self) -> None:
        self.cartridges: dict[str, CartridgeBytes] = {}

    async def header(self, digest: str) -> CartridgeHeader:
        return (await self.fetch(digest)).header

    async def fetch(self, digest: str) -> CartridgeBytes:
        if digest not in self.cartridges:
            raise CartridgeNotFound(f"no cartridge {digest}")
        self.cartridges[digest].verify(digest)
        return self.cartridges[digest]


class Gate:
    """Lets the engine take only the steps that a test allows."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._open = False
        self.failure: Exception | None = None

    def allow(self, num_steps: int) -> None:
        self._permits.release(num_steps)

    def open(self) -> None:
        self._open = True
        self._permits.release()

    def wait(self) -> None:
        if not self._open:
            self._permits.acquire()
        if self.failure is not None:
            raise self.failure


class Rollout:
    """A running server, its parts, and calls with deadlines and typed errors."""

    def __init__(self, lm: FrozenLM, parts: Parts, source: DictSource, channel: grpc.aio.Channel) -> None:
        self.lm, self.parts, self.source, self.channel = lm, parts, source, channel
        self.stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(channel)
        # What the servicer asked of the driver, as it happens.
        self.submitted: asyncio.Queue[Job] = asyncio.Queue()
        self.cancelled: asyncio.Queue[Job] = asyncio.Queue()
        self.draining = asyncio.Event()
        driver = parts.driver
        submit, cancel, drain = driver.submit, driver.cancel, driver.drain

        def noting_submit(*args: Any, **kwargs: Any) -> Job:
            job = submit(*args, **kwargs)
            self.submitted.put_nowait(job)
            return job

        def noting_cancel(job: Job) -> None:
            cancel(job)
            self.cancelled.put_nowait(job)

        async def noting_drain() -> None:
            waiting = asyncio.ensure_future(drain())
            await asyncio.sleep(0)
            self.draining.set()
            await waiting

        driver.submit, driver.cancel, driver.drain = noting_submit, noting_cancel, noting_drain

    def publish(self, seed: int, num_tokens: int = 16, version: int = 1) -> common_pb2.CartridgeId:
        spec = self.lm.spec
        shape = (spec.num_layers, 2, spec.num_kv_heads, num_tokens, spec.head_dim)
        kv = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        stored = Cartridge(spec.header(num_tokens, 1, torch.float32), kv).to_bytes()
        self.source.cartridges[stored.digest()] = stored
        return common_pb2.CartridgeId(name="report", version=version, digest=stored.digest())

    def request(
        self,
        ids: Sequence[int] = (5, 6, 7, 8, 9),
        *,
        cartridges: Sequence[common_pb2.CartridgeId] = (),
        sampling: dict[str, Any] | None = None,
        **fields: Any,
    ) -> rollout_pb2.GenerateRequest:
        if "text" not in fields and "conversation" not in fields:
            fields["token_ids"] = common_pb2.TokenIds(ids=ids)
        fields.setdefault("model_fingerprint", self.lm.spec.fingerprint)
        wanted = {"max_new_tokens": 6, "seed": 1, "ignore_eos": True, **(sampling or {})}
        return rollout_pb2.GenerateRequest(cartridges=cartridges, sampling=rollout_pb2.Sampling(**wanted), **fields)

    async def generate(self, request: rollout_pb2.GenerateRequest) -> list[rollout_pb2.GenerateChunk]:
        with typed_errors("rollout"):
            return [chunk async for chunk in self.stub.Generate(request, timeout=TIMEOUT_SECONDS)]

    async def batch(self, requests: Sequence[rollout_pb2.GenerateRequest]) -> dict[tuple[int, int], Any]:
        """Completions by place of the request and index."""
        message = rollout_pb2.GenerateBatchRequest(requests=requests)
        with typed_errors("rollout"):
            answers = [answer async for answer in self.stub.GenerateBatch(message, timeout=TIMEOUT_SECONDS)]
        found = {(answer.request_index, answer.completion.index): answer.completion for answer in answers}
        assert len(found) == len(answers)
        return found

    async def resident(self) -> rollout_pb2.ResidentResponse:
        with typed_errors("rollout"):
            return await self.stub.Resident(rollout_pb2.ResidentRequest(), timeout=TIMEOUT_SECONDS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def lm(directory: Path) -> FrozenLM:
    return FrozenLM.load(directory)


@asynccontextmanager
async def serving(lm: FrozenLM, directory: Path, gate: Gate | None = None, **settings: Any) -> AsyncIterator[Rollout]:
    values = {
        "model": directory,
        "store": STORE,
        "max_sequences": MAX_SEQUENCES,
        "max_waiting": MAX_WAITING,
        "max_sequence_tokens": 256,
        "prefill_tokens_per_step": 32,
        **settings,
    }
    source = DictSource()
    parts = Parts.build(RolloutSettings(**values), lm, source)
    engine = parts.driver._engine
    step = engine.step
    if gate is not None:
        engine.step = lambda: (gate.wait(), step())[1]
    server = Server("127.0.0.1:0", [rollout_pb2.DESCRIPTOR.services_by_name["Rollout"]])
    servicer = RolloutServicer(server.set_not_serving)
    rollout_pb2_grpc.add_RolloutServicer_to_server(servicer, server.grpc)
    await server.start()
    parts.driver.start()
    servicer.begin(parts)
    await server.set_serving()
    try:
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            yield Rollout(lm, parts, source, channel)
    finally:
        if gate is not None:
            gate.open()
        await server.stop(0)
        await parts.residency.close()
        await parts.driver.close()


@pytest.fixture
async def rollout(lm: FrozenLM, directory: Path) -> AsyncIterator[Rollout]:
    async with serving(lm, directory) as running:
        yield running


def joined(chunks: Sequence[rollout_pb2.GenerateChunk], index: int = 0) -> tuple[list[int], list[float], str]:
    mine = [chunk for chunk in chunks if chunk.index == index]
    return (
        [token_id for chunk in mine for token_id in chunk.ids],
        [logprob for chunk in mine for logprob in chunk.logprobs],
        "".join(chunk.text for chunk in mine),
    )


def contents(completions: dict[tuple[int, int], Any]) -> dict[tuple[int, int], Any]:
    """What must be equal to the bit."""
    return {key: (list(each.ids), list(each.logprobs), each.text) for key, each in completions.items()}


# Answers


async def test_generate_streams_tokens_and_says_what_decoded_them(rollout: Rollout) -> None:
    cartridges = [rollout.publish(0, num_tokens=16, version=7), rollout.publish(1, num_tokens=3, version=2)]
    chunks = await rollout.generate(rollout.request(cartridges=cartridges, sampling={"logprobs": 3}))
    ids, logprobs, text = joined(chunks)
    assert len(chunks) > 1
    assert len(ids) == len(logprobs) == 6
    assert text == rollout.lm.tokenizer.decode(ids, skip_special_tokens=True)
    identity = chunks[0].identity
    assert identity.model_fingerprint == rollout.lm.spec.fingerprint
    assert identity.template_digest == ChatTemplate(rollout.lm.tokenizer).digest
    assert list(identity.cartridges) == cartridges
    assert not any(chunk.HasField("identity") for chunk in chunks[1:])
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [rollout_pb2.FINISH_REASON_UNSPECIFIED] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == rollout_pb2.FINISH_REASON_LENGTH
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cartridge_tokens, usage.cached_tokens) == (5, 6, 19, 0)
    top = [each for chunk in chunks for each in chunk.top_logprobs]
    assert [len(each.ids) for each in top] == [3] * 6
    # And they are the right numbers.
    kv = [Cartridge.from_bytes(rollout.source.cartridges[each.digest]).kv_L2GPD for each in cartridges]
    with torch.no_grad():
        hidden = rollout.lm.packed_hidden([[5, 6, 7, 8, 9, *ids][:-1]], [torch.cat(kv, dim=3)])
        expected = torch.log_softmax(rollout.lm.logits(hidden), dim=-1)[4:]
    chosen = expected.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
    assert [each.logprobs[0] for each in top] == pytest.approx(expected.amax(dim=-1).tolist(), abs=1e-4)


async def test_the_digests_told_are_the_engines_not_the_callers(rollout: Rollout) -> None:
    engine = rollout.parts.driver._engine
    step = engine.step
    engine.step = lambda: [replace(output, digests=("blake3:of-the-engine",)) for output in step()]
    request = rollout.request(cartridges=[rollout.publish(0)])
    chunks = await rollout.generate(request)
    completions = await rollout.batch([request])
    for identity in (chunks[0].identity, completions[0, 0].identity):
        assert [each.digest for each in identity.cartridges] == ["blake3:of-the-engine"]


async def test_conversation_behind_a_cartridge_is_the_turn_only(directory: Path) -> None:
    lm = FrozenLM.load(directory)
    # Like many models: without a system message the template supplies one. Behind a cartridge that would be a second.
    default = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    lm.tokenizer.chat_template = default + CHATML
    template = ChatTemplate(lm.tokenizer)
    messages = [{"role": "user", "content": "What is open?"}]
    turn, prompt = template.turn(messages), template.prompt(messages)
    assert prompt[-len(turn) :] == turn
    assert len(prompt) > len(turn)
    conversation = common_pb2.Conversation(messages=[common_pb2.Message(role="user", content="What is open?")])
    async with serving(lm, directory) as rollout:
        for cartridges, ids in (([rollout.publish(0)], turn), ([], prompt)):
            rendered = await rollout.generate(rollout.request(conversation=conversation, cartridges=cartridges))
            given = await rollout.generate(rollout.request(ids, cartridges=cartridges, skip_prefix_cache=True))
            assert joined(rendered) == joined(given)
            assert rendered[-1].usage.prompt_tokens == len(ids)


async def test_text_is_tokenised_without_a_template(rollout: Rollout) -> None:
    text = "The harbour is open"
    ids = rollout.lm.tokenizer(text)["input_ids"]
    of_text = await rollout.generate(rollout.request(text=text))
    of_ids = await rollout.generate(rollout.request(ids, skip_prefix_cache=True))
    assert joined(of_text) == joined(of_ids)


async def test_n_completions_are_seeded_one_after_the_other(rollout: Rollout) -> None:
    chunks = await rollout.generate(rollout.request(sampling={"n": 3, "seed": 2**64 - 2}))
    assert [joined(chunks, index)[0] for index in range(3)] == [
        joined(await rollout.generate(rollout.request(sampling={"seed": seed})))[0]
        for seed in (2**64 - 2, 2**64 - 1, 0)
    ]
    firsts = [next(chunk for chunk in chunks if chunk.index == index) for index in range(3)]
    assert all(chunk.HasField("identity") for chunk in firsts)
    assert sum(chunk.HasField("usage") for chunk in chunks) == 3


async def test_without_a_seed_answers_differ(rollout: Rollout) -> None:
    request = rollout.request()
    request.sampling.ClearField("seed")
    answers = [joined(await rollout.generate(request))[0] for _ in range(3)]
    assert len({tuple(answer) for answer in answers}) == 3


async def test_stop_string_over_the_wire(rollout: Rollout) -> None:
    whole = joined(await rollout.generate(rollout.request(sampling={"max_new_tokens": 60})))[2]
    stop = whole[10:14]
    chunks = await rollout.generate(rollout.request(sampling={"max_new_tokens": 60, "stop": [stop]}))
    assert joined(chunks)[2] == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == rollout_pb2.FINISH_REASON_STOP
    assert chunks[-1].usage.completion_tokens < 60


async def test_cached_tokens_are_reported(rollout: Rollout) -> None:
    cartridge = rollout.publish(0)
    ids = list(range(10, 40))
    await rollout.generate(rollout.request(ids, cartridges=[cartridge]))
    again = await rollout.generate(rollout.request(ids, cartridges=[cartridge]))
    assert again[-1].usage.cached_tokens == 29
    # Another digest under the same name and version shares nothing.
    other = rollout.publish(1)
    assert (other.name, other.version) == (cartridge.name, cartridge.version)
    changed = await rollout.generate(rollout.request(ids, cartridges=[other]))
    assert changed[-1].usage.cached_tokens == 0
    assert joined(changed)[1] != joined(again)[1]


async def test_equal_batches_give_equal_bits(rollout: Rollout) -> None:
    cartridges = [rollout.publish(seed) for seed in range(2)]
    batch = [
        rollout.request(
            list(range(3, 10 + 5 * index)),
            cartridges=[cartridges[index % 2]],
            sampling={"seed": index, "max_new_tokens": 5 + index, "n": 1 + index % 2},
            skip_prefix_cache=True,
        )
        for index in range(6)
    ]
    first = await rollout.batch(batch)
    assert sorted(first) == [(0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (4, 0), (5, 0), (5, 1)]
    for (request_index, _), completion in first.items():
        assert list(completion.identity.cartridges) == [cartridges[request_index % 2]]
        assert completion.usage.completion_tokens == len(completion.ids) == 5 + request_index
    assert contents(await rollout.batch(batch)) == contents(first)
    await asyncio.gather(
        *(rollout.generate(rollout.request([9] * n, sampling={"seed": n})) for n in (3, 30, 17, 9, 50))
    )
    assert contents(await rollout.batch(batch)) == contents(first)


async def test_a_slow_reader_gets_everything_in_messages_below_the_limit(lm: FrozenLM, directory: Path) -> None:
    async with serving(lm, directory, max_sequence_tokens=512) as rollout:
        request = rollout.request(sampling={"max_new_tokens": 500, "logprobs": 20})
        call = rollout.stub.Generate(request, timeout=TIMEOUT_SECONDS)
        await (await rollout.submitted.get()).ended
        chunks = [chunk async for chunk in call]
        assert len(joined(chunks)[0]) == 500
        assert max(chunk.ByteSize() for chunk in chunks) < MAX_MESSAGE_BYTES / 8


# Refusals


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


async def test_prompts_that_cannot_be(rollout: Rollout) -> None:
    empty = common_pb2.Conversation()
    cases = [
        (rollout.request([]), "token_ids"),
        (rollout.request([3, 384]), "token_ids"),
        (rollout.request(text=""), "text"),
        (rollout.request(conversation=empty), "messages"),
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
        await rollout.generate(cases[4][0])


async def test_cartridges_count_towards_the_models_context(rollout: Rollout) -> None:
    cartridge = rollout.publish(0, num_tokens=300)
    fits = rollout.request(range(3, 203), cartridges=[cartridge], sampling={"max_new_tokens": 12})
    await rollout.generate(fits)
    with pytest.raises(InvalidArgument, match=r"300.*200.*13.*513.*512") as caught:
        await rollout.generate(changed(fits, max_new_tokens=13))
    assert caught.value.field == "sampling.max_new_tokens"
    assert (await rollout.resident()).cartridges[0].references == 0


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
    with pytest.raises(InvalidArgument) as caught:
        await load(rollout, common_pb2.CartridgeId(name="report"))
    assert caught.value.field == "cartridge.digest"


async def load(rollout: Rollout, cartridge: common_pb2.CartridgeId, fingerprint: str | None = None) -> bool:
    request = rollout_pb2.LoadRequest(
        cartridge=cartridge, model_fingerprint=rollout.lm.spec.fingerprint if fingerprint is None else fingerprint
    )
    with typed_errors("rollout"):
        return (await rollout.stub.Load(request, timeout=TIMEOUT_SECONDS)).already_resident


async def test_fingerprint_is_required_everywhere(rollout: Rollout) -> None:
    cartridge = rollout.publish(0)
    for fingerprint, error in (("", InvalidArgument), ("blake3:" + "0" * 64, FingerprintMismatch)):
        request = rollout.request(model_fingerprint=fingerprint)
        with pytest.raises(error):
            await rollout.generate(request)
        with pytest.raises(error):
            await rollout.batch([rollout.request(), request])
        with pytest.raises(error):
            await load(rollout, cartridge, fingerprint)
    assert not (await rollout.resident()).cartridges


async def test_a_digest_that_is_nowhere_is_not_found(rollout: Rollout) -> None:
    known = rollout.publish(0)
    await load(rollout, known)
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
    stored = Cartridge(header, torch.zeros(3, 2, spec.num_kv_heads, 4, spec.head_dim)).to_bytes()
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
    wide = FrozenLM(lm.model, lm.tokenizer, lm.spec.fingerprint)
    object.__setattr__(wide.spec, "max_tokens", 2**20)
    async with serving(wide, directory, max_sequence_tokens=2**15, max_sequences=1) as rollout:
        with pytest.raises(InvalidArgument, match="a message holds") as caught:
            await rollout.batch([rollout.request(sampling={"max_new_tokens": 20_000, "logprobs": 20})])
        assert caught.value.field == "requests[0].sampling.max_new_tokens"


def long(rollout: Rollout, **fields: Any) -> rollout_pb2.GenerateRequest:
    return rollout.request(sampling={"max_new_tokens": 250}, **fields)


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


# Ending early


async def test_cancelling_a_stream_frees_its_slot_within_a_step(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=1) as rollout:
        cartridge = rollout.publish(0)
        call = rollout.stub.Generate(long(rollout, cartridges=[cartridge]), timeout=TIMEOUT_SECONDS)
        job = await rollout.submitted.get()
        gate.allow(2)
        await call.read()
        waiting = asyncio.create_task(rollout.generate(rollout.request()))
        await rollout.submitted.get()
        call.cancel()
        assert await rollout.cancelled.get() is job
        assert not job.ended.done()
        # The step that has begun, and no other.
        gate.allow(1)
        await job.ended
        assert (await rollout.resident()).cartridges[0].references == 0
        gate.allow(6)
        assert len(joined(await waiting)[0]) == 6


async def test_a_deadline_frees_the_slots(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate) as rollout:
        message = rollout_pb2.GenerateBatchRequest(requests=[long(rollout)] * 3)
        for call in (
            rollout.stub.Generate(long(rollout), timeout=0.3),
            rollout.stub.GenerateBatch(message, timeout=0.3),
        ):
            with pytest.raises(DeadlineExceeded), typed_errors("rollout"):
                await call.read()
            job = await rollout.cancelled.get()
            gate.allow(1)
            await job.ended
        stats = rollout.parts.driver._engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)


async def test_references_while_decoding(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate) as rollout:
        cartridge = rollout.publish(0, version=4)
        request = rollout.request(cartridges=[cartridge], sampling={"n": 2})
        call = rollout.stub.Generate(request, timeout=TIMEOUT_SECONDS)
        job = await rollout.submitted.get()
        resident = await rollout.resident()
        (found,) = resident.cartridges
        assert (found.cartridge, found.references) == (cartridge, 2)
        assert found.num_bytes == rollout.source.cartridges[cartridge.digest].header.num_bytes
        unload = rollout_pb2.UnloadRequest(digest=cartridge.digest)
        with pytest.raises(Conflict), typed_errors("rollout"):
            await rollout.stub.Unload(unload, timeout=TIMEOUT_SECONDS)
        gate.open()
        assert len([chunk async for chunk in call]) >= 2
        await job.ended
        await rollout.stub.Unload(unload, timeout=TIMEOUT_SECONDS)
        assert not (await rollout.resident()).cartridges


def hits() -> list[float]:
    name, tiers = "foundry_cartridge_hits_total", ("device", "host", "store")
    return [REGISTRY.get_sample_value(name, {"tier": tier}) or 0.0 for tier in tiers]


async def test_pins_and_tiers_are_reported(lm: FrozenLM, directory: Path) -> None:
    num_bytes = lm.spec.header(16, 1, torch.float32).num_bytes
    budgets = {"cartridge_budget_bytes": 2 * num_bytes, "host_cartridge_budget_bytes": 4 * num_bytes}
    async with serving(lm, directory, **budgets) as rollout:
        pinned, old, new = (rollout.publish(seed, version=seed) for seed in range(3))
        for cartridge in (pinned, old, new):
            load = rollout_pb2.LoadRequest(
                cartridge=cartridge, model_fingerprint=lm.spec.fingerprint, pin=cartridge is pinned
            )
            await rollout.stub.Load(load, timeout=TIMEOUT_SECONDS)
        answer = await rollout.resident()
        assert (answer.budget_bytes, answer.host_budget_bytes) == (2 * num_bytes, 4 * num_bytes)
        assert [(each.cartridge, each.pinned, each.tier) for each in answer.cartridges] == [
            (pinned, True, rollout_pb2.TIER_DEVICE),
            (new, False, rollout_pb2.TIER_DEVICE),
            (old, False, rollout_pb2.TIER_HOST),
        ]
        assert {each.num_bytes for each in answer.cartridges} == {num_bytes}
        assert metric("foundry_resident_cartridges", tier="host") == 3
        assert metric("foundry_resident_cartridge_bytes", tier="host") == 3 * num_bytes
        before = hits()
        # The store has lost it; host memory has not.
        rollout.source.cartridges.clear()
        for cartridge in (old, old, pinned):
            await rollout.generate(rollout.request(cartridges=[cartridge]))
        assert [now - old for now, old in zip(hits(), before, strict=True)] == [2, 1, 0]
        for cartridge in (pinned, old):
            await rollout.stub.Unload(rollout_pb2.UnloadRequest(digest=cartridge.digest), timeout=TIMEOUT_SECONDS)
        answer = await rollout.resident()
        assert [(each.cartridge, each.tier) for each in answer.cartridges] == [(new, rollout_pb2.TIER_HOST)]


async def test_a_new_version_is_loaded_while_the_old_one_decodes(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate) as rollout:
        old, new = rollout.publish(0, version=1), rollout.publish(1, version=2)
        call = rollout.stub.Generate(
            rollout.request(cartridges=[old], sampling={"max_new_tokens": 50}), timeout=TIMEOUT_SECONDS
        )
        job = await rollout.submitted.get()
        gate.allow(2)
        chunks = [await call.read()]
        meanwhile = asyncio.create_task(rollout.generate(rollout.request(cartridges=[new])))
        await rollout.submitted.get()
        gate.allow(8)
        assert (await meanwhile)[0].identity.cartridges[0].digest == new.digest
        assert not job.ended.done()
        gate.open()
        chunks += [chunk async for chunk in call]
        assert chunks[0].identity.cartridges[0].digest == old.digest
        alone = rollout.request(cartridges=[old], sampling={"max_new_tokens": 50}, skip_prefix_cache=True)
        assert joined(chunks)[0] == joined(await rollout.generate(alone))[0]


async def test_drain_refuses_new_work_and_returns_when_idle(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate) as rollout:
        call = rollout.stub.Generate(rollout.request(), timeout=TIMEOUT_SECONDS)
        job = await rollout.submitted.get()
        drain = asyncio.ensure_future(rollout.stub.Drain(rollout_pb2.DrainRequest(), timeout=TIMEOUT_SECONDS))
        await rollout.draining.wait()
        # Who balances by health goes elsewhere; who comes all the same is refused.
        assert await status(rollout.channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(Unavailable, match="draining"):
            await rollout.generate(rollout.request())
        assert not drain.done()
        gate.open()
        assert len(joined([chunk async for chunk in call])[0]) == 6
        await drain
        assert job.ended.done()


async def test_a_failing_engine_tells_every_waiter(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate, max_sequences=1) as rollout:
        cartridge = rollout.publish(0)
        calls = [
            asyncio.create_task(rollout.generate(long(rollout, cartridges=[cartridge]))),
            asyncio.create_task(rollout.generate(long(rollout))),
            asyncio.create_task(rollout.batch([long(rollout)] * 2)),
        ]
        for _ in calls:
            await rollout.submitted.get()
        gate.failure = RuntimeError("out of memory")
        gate.allow(1)
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, Unavailable)
            assert "out of memory" in result.message
        assert rollout.parts.driver.failed.is_set()
        with pytest.raises(Unavailable, match="out of memory"):
            await rollout.generate(rollout.request())
        assert (await rollout.resident()).cartridges[0].references == 0


# The process


def settings(directory: Path, **values: Any) -> RolloutSettings:
    return RolloutSettings(model=directory, store=STORE, listen="127.0.0.1:0", **values)


@asynccontextmanager
async def process(
    directory: Path, monkeypatch: pytest.MonkeyPatch, **values: Any
) -> AsyncIterator[tuple[asyncio.Task[int], grpc.aio.Channel]]:
    """`serve` as a task, and a channel to it as soon as it listens."""
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    class Announcing(Server):
        async def start(self) -> None:
            await super().start()
            listening.set_result(self.port)

    monkeypatch.setattr(main, "Server", Announcing)
    task = asyncio.create_task(main.serve(settings(directory, **values)))
    async with open_channel(f"127.0.0.1:{await listening}") as channel:
        yield task, channel
    assert task.done()


async def status(channel: grpc.aio.Channel) -> health_pb2.HealthCheckResponse.ServingStatus:
    request = health_pb2.HealthCheckRequest(service="foundry.v1.Rollout")
    return (await health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_SECONDS)).status


async def test_listens_before_the_model_is_loaded_and_serves_after(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_load = threading.Event()
    load_model = FrozenLM.load

    def gated(*args: Any, **kwargs: Any) -> FrozenLM:
        may_load.wait()
        return load_model(*args, **kwargs)

    monkeypatch.setattr(FrozenLM, "load", gated)
    async with process(directory, monkeypatch) as (task, channel):
        assert await status(channel) == health_pb2.HealthCheckResponse.NOT_SERVING
        stub = rollout_pb2_grpc.RolloutStub(channel)
        with pytest.raises(Unavailable, match="loading"), typed_errors("rollout"):
            await stub.Resident(rollout_pb2.ResidentRequest(), timeout=TIMEOUT_SECONDS)
        may_load.set()
        await wait_until_serving(channel, "rollout", timeout_seconds=TIMEOUT_SECONDS)
        resident = await stub.Resident(rollout_pb2.ResidentRequest(), timeout=TIMEOUT_SECONDS)
        assert resident.model_name == "tiny-llama"
        assert resident.max_sequence_tokens == 512
        # Calls in flight when the signal comes are finished.
        call = stub.Generate(
            rollout_pb2.GenerateRequest(
                model_fingerprint=resident.model_fingerprint,
                token_ids=common_pb2.TokenIds(ids=[5, 6]),
                sampling=rollout_pb2.Sampling(max_new_tokens=50, ignore_eos=True),
            ),
            timeout=TIMEOUT_SECONDS,
        )
        chunks = [await call.read()]
        signal.raise_signal(signal.SIGTERM)
        chunks += [chunk async for chunk in call]
        assert len(joined(chunks)[0]) == 50
        assert await task == 0


async def test_a_failing_engine_ends_the_process(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: TorchEngine) -> list[TokenOutput]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TorchEngine, "step", broken)
    async with process(directory, monkeypatch, grace_seconds=0.5) as (task, channel):
        stub = rollout_pb2_grpc.RolloutStub(channel)
        await wait_until_serving(channel, "rollout", timeout_seconds=TIMEOUT_SECONDS)
        fingerprint = (await stub.Resident(rollout_pb2.ResidentRequest(), timeout=TIMEOUT_SECONDS)).model_fingerprint
        request = rollout_pb2.GenerateRequest(
            model_fingerprint=fingerprint,
            token_ids=common_pb2.TokenIds(ids=[5, 6]),
            sampling=rollout_pb2.Sampling(max_new_tokens=5),
        )
        statuses = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="foundry.v1.Rollout"), timeout=TIMEOUT_SECONDS
        )
        assert (await statuses.read()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(Unavailable, match="out of memory"), typed_errors("rollout"):
            async for _ in stub.Generate(request, timeout=TIMEOUT_SECONDS):
                pass
        assert (await statuses.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        statuses.cancel()
        assert await task == 1


def metric(name: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(name, labels)
    assert value is not None, name
    return value


async def test_metrics(rollout: Rollout) -> None:
    names = [
        "foundry_prompt_tokens_total",
        "foundry_generation_tokens_total",
        "foundry_prefix_cache_hits_total",
        "foundry_time_to_first_token_seconds_count",
        "foundry_time_per_output_token_seconds_count",
        "foundry_cartridge_fetch_seconds_count",
    ]
    before = [metric(name) for name in names]
    request = rollout.request(cartridges=[rollout.publish(0)])
    await rollout.generate(request)
    await rollout.generate(request)
    assert [metric(name) - old for name, old in zip(names, before, strict=True)] == [10, 12, 4, 2, 10, 1]
    assert metric("foundry_resident_cartridges", tier="device") == 1
    num_bytes = (await rollout.resident()).cartridges[0].num_bytes
    assert metric("foundry_resident_cartridge_bytes", tier="device") == num_bytes
    assert metric("foundry_resident_cartridges", tier="host") == 0
    assert metric("foundry_num_requests_running") == 0
    assert metric("foundry_num_requests_waiting") == 0
