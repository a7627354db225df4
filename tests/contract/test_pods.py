"""A name with several addresses is several servers, as they come and go: real ones, at one port of several numbers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foundry.errors import InvalidArgument, PolicyMismatch, Unavailable
from foundry.identity import ids_digest
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.model.template import ChatTemplate
from foundry.rpc.answers import Prompt
from foundry.rpc.pods import Pods
from foundry.rpc.resolve import Endpoint, EndpointResolver
from foundry.rpc.retry import Retry
from foundry.rpc.rollout import RolloutClient
from foundry.rpc.server import Server
from foundry.rpc.teacher import TeacherClient
from foundry.v1 import teacher_pb2, teacher_pb2_grpc
from services.teacher.servicer import TeacherServicer
from services.teacher.settings import TeacherSettings
from services.trainer.sample import Sample
from services.trainer.signals import signals_of
from services.trainer.update.proof import prove
from tests.contract.scripted_rollout import POLICY, Scripted, serving
from tests.tiny import CLOCK, build_tiny_model

FIRST, SECOND, THIRD = "127.0.0.2", "127.0.0.3", "127.0.0.4"
PROMPTS = [Prompt([10 + index], seed=index, place=f"prompt {index}") for index in range(6)]


class Names:
    """A name server with one name."""

    def __init__(self, *numbers: str) -> None:
        self.numbers: Sequence[str] = numbers
        self.down = False

    async def __call__(self, host: str) -> Sequence[str]:
        assert host == "pods.test"
        if self.down or not self.numbers:
            raise OSError("no such name")
        return self.numbers


async def test_endpoints_come_in_order_and_once() -> None:
    names = Names(SECOND, FIRST)
    resolver = EndpointResolver(["pods.test:7", "[::1]:7", "127.0.0.2:7", "pods.test:8"], names)
    assert await resolver.endpoints() == [
        Endpoint("127.0.0.2:7", "pods.test"),
        Endpoint("127.0.0.3:7", "pods.test"),
        Endpoint("[::1]:7", "::1"),
        Endpoint("127.0.0.2:8", "pods.test"),
        Endpoint("127.0.0.3:8", "pods.test"),
    ]


async def test_a_name_server_that_is_down_takes_nobody_away() -> None:
    names = Names()
    resolver = EndpointResolver(["pods.test:7"], names)
    assert await resolver.endpoints() == []
    names.numbers = [FIRST]
    found = await resolver.endpoints()
    names.down = True
    assert await resolver.endpoints() == found == [Endpoint("127.0.0.2:7", "pods.test")]


async def test_the_systems_names_are_known() -> None:
    assert await EndpointResolver(["localhost:7"]).endpoints() == [Endpoint("127.0.0.1:7", "localhost")]


@pytest.mark.parametrize("address", ["pods.test", "pods.test:grpc", ":7001", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match="is not host:port"):
        Pods("rollout", [address])


# Training answers


class Scaled:
    """Scripted rollout servers that can be added and killed, and the trainer's client of their name."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self.names = Names()
        self.servers: dict[str, Scripted] = {}
        self._stack = stack
        self._running: dict[str, AsyncExitStack] = {}
        self.port = 0

    async def add(self, number: str) -> Scripted:
        self.servers[number] = Scripted()
        self._running[number] = await self._stack.enter_async_context(AsyncExitStack())
        running = await self._running[number].enter_async_context(
            serving(self.servers[number], f"{number}:{self.port}")
        )
        self.port = running.port
        self.names.numbers = [*self.names.numbers, number]
        return self.servers[number]

    async def kill(self, number: str) -> None:
        """The name knows it still."""
        await self._running[number].aclose()

    def rollouts(self, *, silent_seconds: float = 10.0) -> RolloutClient:
        pods = Pods("rollout", [f"pods.test:{self.port}"], lookup=self.names, silent_seconds=silent_seconds)
        rollouts = RolloutClient(pods, "blake3:model", "blake3:template", timeout_seconds=10)
        self._stack.push_async_callback(rollouts.close)
        return rollouts


@pytest.fixture
async def scaled() -> AsyncIterator[Scaled]:
    async with AsyncExitStack() as stack:
        yield Scaled(stack)


async def answered_by(rollouts: RolloutClient) -> list[str]:
    """The number of the server of each answer; the answers themselves are always the same."""
    answers = await Retry(10, max_wait_seconds=0.01).call(
        "rollout", lambda: rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)
    )
    assert [list(answer.ids) for answer in answers] == [[prompt.ids[0], 2] for prompt in PROMPTS]
    return [answer.server.rpartition(":")[0] for answer in answers]


async def test_batches_follow_the_name_up_and_down(scaled: Scaled) -> None:
    await scaled.add(FIRST)
    rollouts = scaled.rollouts()
    assert await answered_by(rollouts) == [FIRST] * 6
    await scaled.add(SECOND)
    assert await answered_by(rollouts) == [FIRST, SECOND] * 3
    await scaled.add(THIRD)
    assert await answered_by(rollouts) == [FIRST, SECOND, THIRD] * 2
    # It may be asked no more, though it would still answer.
    scaled.names.numbers = [SECOND, THIRD]
    assert await answered_by(rollouts) == [SECOND, THIRD] * 3


async def test_a_pod_killed_in_the_middle_of_a_batch(scaled: Scaled) -> None:
    await scaled.add(FIRST)
    doomed = await scaled.add(SECOND)
    doomed.cancelled = asyncio.Event()
    rollouts = scaled.rollouts()
    asking = asyncio.create_task(answered_by(rollouts))
    await doomed.asked.wait()
    await scaled.kill(SECOND)
    assert await asking == [FIRST] * 6
    # Nor is every later batch begun in vain, while the name still knows it.
    before = len(scaled.servers[FIRST].requests)
    assert await answered_by(rollouts) == [FIRST] * 6
    assert len(scaled.servers[FIRST].requests) == before + 6


async def test_a_pod_that_is_back_is_asked_again(scaled: Scaled) -> None:
    await scaled.add(FIRST)
    await scaled.add(SECOND)
    rollouts = scaled.rollouts(silent_seconds=0.2)
    await scaled.kill(SECOND)
    assert await answered_by(rollouts) == [FIRST] * 6
    scaled.names.numbers = [FIRST]
    await scaled.add(SECOND)
    async with asyncio.timeout(10):
        while SECOND not in await answered_by(rollouts):
            pass


async def test_all_pods_away_are_waited_for(scaled: Scaled) -> None:
    await scaled.add(FIRST)
    rollouts = scaled.rollouts()
    await scaled.kill(FIRST)
    with pytest.raises(Unavailable, match=rf"rollout {FIRST}:{scaled.port}"):
        await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)
    scaled.names.numbers = []
    asking = asyncio.create_task(answered_by(rollouts))
    await scaled.add(FIRST)
    assert await asking == [FIRST] * 6


async def test_a_server_given_by_number_is_waited_for(scaled: Scaled) -> None:
    """The whole batch is then dealt out as before, hence its answers have the same bits."""
    await scaled.add(FIRST)
    await scaled.add(SECOND)
    addresses = [f"{FIRST}:{scaled.port}", f"{SECOND}:{scaled.port}"]
    rollouts = RolloutClient(Pods("rollout", addresses), "blake3:model", "blake3:template", timeout_seconds=10)
    assert await answered_by(rollouts) == [FIRST, SECOND] * 3
    await scaled.kill(SECOND)
    with pytest.raises(Unavailable, match=SECOND):
        await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)
    asking = asyncio.create_task(answered_by(rollouts))
    await scaled.add(SECOND)
    assert await asking == [FIRST, SECOND] * 3
    await rollouts.close()


async def test_a_name_without_addresses_says_so() -> None:
    rollouts = RolloutClient(Pods("rollout", ["pods.test:7"], lookup=Names()), "", "", timeout_seconds=1)
    with pytest.raises(Unavailable, match=r"no rollout server is behind pods\.test:7"):
        await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)


async def test_the_proof_names_the_pod(scaled: Scaled) -> None:
    await scaled.add(FIRST)
    liar = await scaled.add(SECOND)
    rollouts = scaled.rollouts()
    answers = await rollouts.sample(PROMPTS, POLICY, temperature=1.0, max_new_tokens=8)
    samples = [Sample.of(prompt, answer, POLICY, "") for prompt, answer in zip(PROMPTS, answers, strict=True)]
    assert [sample.place for sample in samples] == [prompt.place for prompt in PROMPTS]
    trainers_word = torch.tensor([word for sample in samples for word in truth(sample, SECOND)])
    with pytest.raises(PolicyMismatch, match=f"from 1 of 2 .* Rollout {SECOND}:{scaled.port} claimed version 7"):
        prove(samples, trainers_word, threshold=0.01)
    assert len(liar.requests) == 3


def truth(sample: Sample, liar: str) -> list[float]:
    return [logprob - 3.0 * sample.server.startswith(f"{liar}:") for logprob in sample.rollout_logprobs]


# Scores


class Teachers:
    """Real teachers of one tiny model behind one name."""

    def __init__(self, directory: Path, stack: AsyncExitStack) -> None:
        self.lm = FrozenLM.load(directory)
        self.names = Names()
        self.servicers: dict[str, TeacherServicer] = {}
        self.running: dict[str, Server] = {}
        self.port = 0
        self._settings = TeacherSettings(model=directory, reserve_tokens=64)
        self._stack = stack

    async def add(self, number: str) -> None:
        server = Server(f"{number}:{self.port}", [teacher_pb2.DESCRIPTOR.services_by_name["Teacher"]])
        servicer = TeacherServicer(self.lm, self._settings)
        teacher_pb2_grpc.add_TeacherServicer_to_server(servicer, server.grpc)
        await server.start()
        self._stack.callback(servicer.close)
        self._stack.push_async_callback(server.stop, 0)
        self.port, self.running[number], self.servicers[number] = server.port, server, servicer
        self.names.numbers = [*self.names.numbers, number]

    def pods(self) -> Pods:
        return Pods("teacher", [f"pods.test:{self.port}"], lookup=self.names)

    def trainers(self, document: str) -> TeacherClient:
        template = ChatTemplate(self.lm.tokenizer, CLOCK)
        teacher = TeacherClient(
            self.pods(),
            self.lm.spec.fingerprint,
            document,
            timeout_seconds=30,
            template_digest=template.digest,
            context_digest=ids_digest(template.context(document)),
        )
        self._stack.push_async_callback(teacher.close)
        return teacher

    def holding(self) -> dict[str, int]:
        """Contexts on each."""
        return {number: len(servicer._contexts._device._entries) for number, servicer in self.servicers.items()}


@pytest.fixture
async def teachers(tmp_path: Path) -> AsyncIterator[Teachers]:
    async with AsyncExitStack() as stack:
        teachers = Teachers(build_tiny_model(tmp_path), stack)
        for number in (FIRST, SECOND, THIRD):
            await teachers.add(number)
        yield teachers


SAMPLES = [Sample([5, 6, 7], [8, 9], (), "", 0, truncated=False), Sample([11], [12, 13], (), "", 0, truncated=False)]
FORWARD = Objective("forward_kl")
DOCUMENTS = [f"The harbour {number} is open again." for number in range(9)]


async def test_each_document_has_one_teacher(teachers: Teachers) -> None:
    # The port is part of an address, so who gets what differs from run to run: with so many, none gets nothing.
    documents = [f"The harbour {number} is open again." for number in range(60)]
    for document in documents:
        # A second run, and the gateway before either, come to the same one.
        gateways = TeacherClient(teachers.pods(), teachers.lm.spec.fingerprint, document, timeout_seconds=30)
        assert await gateways.put_context() == len(ChatTemplate(teachers.lm.tokenizer, CLOCK).context(document))
        await gateways.close()
        for _ in range(2):
            trainers = teachers.trainers(document)
            await trainers.put_context()
            await signals_of(trainers, SAMPLES, FORWARD)
    assert sum(teachers.holding().values()) == len(documents)
    assert min(teachers.holding().values()) > 0


async def test_another_teacher_takes_over_with_the_same_scores(teachers: Teachers) -> None:
    trainers, retry = teachers.trainers(DOCUMENTS[0]), Retry(30, max_wait_seconds=0.01)
    await trainers.put_context()
    before = await signals_of(trainers, SAMPLES, FORWARD)
    (home,) = (number for number, count in teachers.holding().items() if count)
    await teachers.running[home].stop(0)

    async def score() -> list[torch.Tensor]:
        return [signal for signal in await signals_of(trainers, SAMPLES, FORWARD) if isinstance(signal, torch.Tensor)]

    after = await retry.call("teacher", score)
    assert all(
        isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
        for one, other in zip(before, after, strict=True)
    )
    assert sorted(teachers.holding().values()) == [0, 1, 1]
    # Where it went it stays, when the first is back too: there it would have to be computed again.
    teachers.names.numbers = [number for number in teachers.names.numbers if number != home]
    await retry.call("teacher", score)
    await teachers.add(home)
    await retry.call("teacher", score)
    assert teachers.holding()[home] == 0
