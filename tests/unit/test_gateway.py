"""Parts of the gateway that no honest rollout server can put to the test."""

from __future__ import annotations

import asyncio
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from foundry.errors import (
    CartridgeNotFound,
    FingerprintMismatch,
    FoundryError,
    IdentityMismatch,
    InvalidArgument,
    Unavailable,
)
from foundry.rpc.pods import Pod, Pods
from foundry.rpc.resolve import Endpoint
from foundry.store import CartridgeId
from foundry.v1 import common_pb2, rollout_pb2
from services.gateway import errors
from services.gateway.access.principal import Principal
from services.gateway.balancer import RolloutBalancer, RolloutServer, ServedModel
from services.gateway.base_name import BaseName
from services.gateway.main import listen
from services.gateway.middleware.request_limits import RequestLimits
from services.gateway.openai import chat
from services.gateway.openai.fan_in import FanIn
from services.gateway.openai.generation import Generation
from services.gateway.openai.requests.chat import ChatRequest
from services.gateway.openai.requests.completion import CompletionRequest
from services.gateway.openai.target import Target
from services.gateway.openai.tokens import TokenSpelling

MODEL = ServedModel("tiny", "blake3:" + "f" * 64, "blake3:" + "e" * 64, 512)
FIRST, SECOND = (CartridgeId("a", version, f"blake3:{version}" + "0" * 63) for version in (1, 2))


def identity(
    *cartridges: CartridgeId,
    fingerprint: str = MODEL.fingerprint,
    rope: common_pb2.Rope.ValueType = common_pb2.ROPE_UNSPECIFIED,
) -> common_pb2.Identity:
    named = [common_pb2.CartridgeId(name=each.name, version=each.version, digest=each.digest) for each in cartridges]
    return common_pb2.Identity(
        model_fingerprint=fingerprint, cartridges=named, template_digest=MODEL.template_digest, rope=rope
    )


Deliver = Callable[[rollout_pb2.GenerateChunk], Awaitable[None]]


class Server:
    """Answers as it is told to, where a real rollout server would tell the truth."""

    def __init__(self, *chunks: rollout_pb2.GenerateChunk) -> None:
        self._chunks = chunks

    async def generate(self, request: object, deliver: Deliver, **ignored: Any) -> None:
        for chunk in self._chunks:
            await deliver(chunk)


class Rates:
    """Admits all, and counts what was spent."""

    def __init__(self) -> None:
        self.num_tokens = 0

    def admitted(self, *who: object, completion: bool) -> nullcontext[None]:
        return nullcontext()

    async def spent(self, principal: Principal, num_tokens: int) -> None:
        self.num_tokens += num_tokens


def generation_of(server: Server, target: Target, n: int = 1, store: object = None) -> Generation:
    asked = ChatRequest(model="a", n=n, messages=[{"role": "user", "content": "?"}])  # type: ignore[list-item]
    limits = SimpleNamespace(max_choices=8, request_timeout_seconds=5)
    gateway = SimpleNamespace(settings=limits, rollouts=server, admitted=nullcontext, store=store, rates=Rates())
    return Generation(cast(Any, gateway), Principal(), target, asked, [rollout_pb2.GenerateRequest()], "test")


END = rollout_pb2.GenerateChunk(
    text="tokens", identity=identity(FIRST), finish_reason=rollout_pb2.FINISH_REASON_STOP, usage=rollout_pb2.Usage()
)


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(identity(), id="the base model"),
        pytest.param(identity(FIRST), id="one less"),
        pytest.param(identity(FIRST, FIRST), id="another version"),
        pytest.param(identity(FIRST, SECOND, FIRST), id="one more"),
        pytest.param(identity(SECOND, FIRST), id="another order"),
        pytest.param(identity(FIRST, SECOND, fingerprint="blake3:" + "0" * 64), id="another model"),
        pytest.param(common_pb2.Identity(), id="nothing said"),
        pytest.param(identity(FIRST, SECOND, rope=common_pb2.ROPE_SHIFT), id="keys moved"),
    ],
)
async def test_an_answer_made_with_anything_else_is_withheld(said: common_pb2.Identity) -> None:
    lie = rollout_pb2.GenerateChunk(text="tokens", identity=said)
    with pytest.raises(IdentityMismatch):
        await anext(generation_of(Server(lie), Target(MODEL, (FIRST, SECOND))).chunks())
    truth = rollout_pb2.GenerateChunk(text="tokens", identity=identity(FIRST, SECOND))
    chunks = generation_of(Server(truth), Target(MODEL, (FIRST, SECOND))).chunks()
    assert (await anext(chunks))[1].text == "tokens"
    await chunks.aclose()


@pytest.mark.parametrize("said", [common_pb2.ROPE_UNSPECIFIED, common_pb2.ROPE_KEEP, 7])
async def test_keys_that_were_to_be_moved_and_were_not_are_no_answer(said: Any) -> None:
    """Unspecified is what an older server says, which can't move them."""
    target = Target(MODEL, (FIRST, SECOND), "shift")
    lie = rollout_pb2.GenerateChunk(text="tokens", identity=identity(FIRST, SECOND, rope=said))
    with pytest.raises(IdentityMismatch, match="'shift'"):
        await anext(generation_of(Server(lie), target).chunks())
    truth = rollout_pb2.GenerateChunk(identity=identity(FIRST, SECOND, rope=common_pb2.ROPE_SHIFT))
    chunks = generation_of(Server(truth), target).chunks()
    assert (await anext(chunks))[1] == truth
    await chunks.aclose()


async def test_every_choice_is_checked() -> None:
    other = rollout_pb2.GenerateChunk(index=1, text="tokens", identity=identity(SECOND))
    with pytest.raises(IdentityMismatch):
        await generation_of(Server(END, other), Target(MODEL, (FIRST,)), n=2).gather()


async def test_an_answer_that_was_cut_short_is_none() -> None:
    (choice,) = await generation_of(Server(END), Target(MODEL, (FIRST,))).gather()
    assert choice.text == "tokens"
    begun = rollout_pb2.GenerateChunk(text="tok", ids=[1, 2], prompt_tokens=3, identity=identity(FIRST))
    generation = generation_of(Server(begun), Target(MODEL, (FIRST,)))
    with pytest.raises(Unavailable):
        await generation.gather()
    # It was computed all the same.
    assert cast(Any, generation._gateway.rates).num_tokens == 5


class Publishing:
    """A store in which `latest` moves on with every look, and a server that is always one version behind."""

    def __init__(self, versions: int) -> None:
        self.versions = versions
        self.resolved = 0

    async def resolve(self, reference: object) -> CartridgeId:
        self.resolved += 1
        return SECOND if self.resolved >= self.versions else FIRST

    def model(self) -> ServedModel:
        return MODEL

    async def generate(self, request: rollout_pb2.GenerateRequest, deliver: Deliver, **ignored: Any) -> None:
        if request.cartridges[0].digest != SECOND.digest:
            raise CartridgeNotFound("swept", field="digest")
        chunk = rollout_pb2.GenerateChunk(
            text="new",
            identity=identity(SECOND),
            finish_reason=rollout_pb2.FINISH_REASON_STOP,
            usage=rollout_pb2.Usage(),
        )
        await deliver(chunk)


async def test_latest_is_looked_up_again_when_its_version_was_swept() -> None:
    moving = Publishing(versions=1)
    generation = generation_of(cast(Any, moving), Target(MODEL, (FIRST,)), store=moving)
    (choice,) = await generation.gather()
    assert choice.text == "new"
    assert generation.headers()["x-foundry-digest"] == SECOND.digest
    assert generation.info().cartridges[0].version == SECOND.version


async def test_a_version_that_is_gone_stays_an_error() -> None:
    still = Publishing(versions=100)
    with pytest.raises(CartridgeNotFound, match="swept"):
        await generation_of(cast(Any, still), Target(MODEL, (FIRST,)), store=still).gather()
    assert still.resolved == 1


def app_before(server: object) -> FastAPI:
    """The chat route before a rollout server of the base model."""
    app = FastAPI()
    errors.install(app)
    app.include_router(chat.router)
    app.add_middleware(RequestLimits)
    limits = SimpleNamespace(max_choices=8, request_timeout_seconds=5)
    app.state.gateway = SimpleNamespace(
        authentication=None,
        settings=limits,
        rollouts=server,
        base_name=BaseName(cast(Any, None), cast(Any, None)),
        admitted=nullcontext,
        rates=Rates(),
        spelling=TokenSpelling(None),
    )
    return app


async def ask(server: object) -> httpx.Response:
    transport = httpx.ASGITransport(app_before(server))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.post("/v1/chat/completions", json=STREAMED)


STREAMED = {"model": MODEL.name, "messages": [{"role": "user", "content": "?"}], "stream": True}
BEGUN = rollout_pb2.GenerateChunk(text="tok", identity=identity())


class Dying(Server):
    def model(self) -> ServedModel:
        return MODEL

    async def generate(self, request: object, deliver: Deliver, **ignored: Any) -> None:
        await super().generate(request, deliver)
        raise Unavailable("going away", field="sampling.max_new_tokens")


async def test_what_fails_in_a_stream_is_its_last_event() -> None:
    answer = await ask(Dying(BEGUN))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    *begun, last = (json.loads(block.removeprefix("data: ")) for block in answer.text.strip().split("\n\n"))
    deltas = [chunk["choices"][0]["delta"] for chunk in begun]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "tok"}]
    error = {"message": "going away", "type": "server_error", "param": "max_tokens", "code": "UNAVAILABLE"}
    assert last == {"error": error}


async def test_what_fails_before_the_first_token_has_its_own_status() -> None:
    answer = await ask(Dying())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "UNAVAILABLE")


class Lasting(Dying):
    """Goes on until it is cancelled."""

    ended = False

    async def generate(self, request: object, deliver: Deliver, **ignored: Any) -> None:
        try:
            await Server.generate(self, request, deliver)
            await asyncio.Event().wait()
        finally:
            self.ended = True


@pytest.mark.parametrize("num_sent", [0, 1])
async def test_a_client_that_is_gone_when_its_stream_begins_ends_the_generation(num_sent: int) -> None:
    server = Lasting(BEGUN)
    body: list[Any] = [{"type": "http.request", "body": json.dumps(STREAMED).encode()}]
    sent: list[Any] = []

    async def receive() -> Any:
        return body.pop() if body else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if len(sent) == num_sent:
            raise OSError("the connection is closed")
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
    with pytest.raises(ClientDisconnect):
        await app_before(server)(scope | {"asgi": {"spec_version": "2.4"}}, receive, send)
    assert server.ended


async def test_a_slow_reader_slows_the_sources() -> None:
    delivered = 0

    async def source(deliver: Callable[[int], Awaitable[None]]) -> None:
        nonlocal delivered
        for number in range(500):
            await deliver(number)
            delivered += 1

    received = []
    async with FanIn([source, source]) as arrivals:
        while (arrival := await arrivals.next()) is not None:
            received.append(arrival)
            assert delivered - len(received) < 20
    assert [[number for index, number in received if index == mine] for mine in (0, 1)] == [[*range(500)]] * 2


@pytest.mark.parametrize("num_items", [0, 100])
async def test_leaving_ends_the_sources(num_items: int) -> None:
    begun: asyncio.Queue[None] = asyncio.Queue()
    num_ended = 0

    async def source(deliver: Callable[[int], Awaitable[None]]) -> None:
        nonlocal num_ended
        begun.put_nowait(None)
        try:
            for number in range(num_items):
                await deliver(number)
            await asyncio.Event().wait()
        finally:
            num_ended += 1

    async with FanIn([source, source]):
        await begun.get()
        await begun.get()
    assert num_ended == 2


@pytest.mark.parametrize("failure", [KeyError("a fault of ours"), asyncio.CancelledError("shared with others")])
async def test_the_first_failure_reaches_the_reader_and_ends_the_others(failure: BaseException) -> None:
    cancelled = asyncio.Event()

    async def waiting(deliver: Callable[[int], Awaitable[None]]) -> None:
        try:
            await deliver(1)
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async def failing(deliver: Callable[[int], Awaitable[None]]) -> None:
        await deliver(2)
        raise failure

    async def read() -> None:
        async with FanIn([waiting, failing]) as arrivals:
            assert [await arrivals.next(), await arrivals.next()] == [(0, 1), (1, 2)]
            await arrivals.next()

    with pytest.raises(type(failure), match=str(failure.args[0])):
        await read()
    assert cancelled.is_set()


@pytest.fixture
async def rollouts() -> AsyncIterator[RolloutBalancer]:
    """Four servers that are said to serve; nobody listens there."""
    found = RolloutBalancer(Pods("rollout", ["127.0.0.1:9"]), poll_seconds=1, retry_timeout_seconds=1)
    addresses = [f"127.0.0.1:{port}" for port in range(1, 5)]
    found._servers = {address: RolloutServer(Pod("rollout", Endpoint(address, "127.0.0.1"))) for address in addresses}
    for server in found._servers.values():
        server.model = MODEL
    yield found
    await asyncio.gather(*(server.pod.close() for server in found._servers.values()))
    await found.close()


async def test_a_cartridge_keeps_its_server_and_all_servers_have_some(rollouts: RolloutBalancer) -> None:
    homes = {key: rollouts._pick(key, set()).pod.address for key in map(str, range(200))}
    assert homes == {key: rollouts._pick(key, set()).pod.address for key in homes}
    assert min(Counter(homes.values()).values()) > 25
    # When one leaves, only its own move.
    rollouts._servers["127.0.0.1:1"].model = None
    moved = {key for key, home in homes.items() if rollouts._pick(key, set()).pod.address != home}
    assert moved == {key for key, home in homes.items() if home == "127.0.0.1:1"}


async def test_no_server_gets_much_more_than_its_share(rollouts: RolloutBalancer) -> None:
    for _ in range(100):
        rollouts._pick("one popular cartridge", set()).pod.in_flight += 1
    loads = sorted(server.pod.in_flight for server in rollouts._servers.values())
    assert sum(loads) == 100
    assert loads[-1] <= 1.25 * 101 / 4 + 1
    # Not spread more than needed either: its prefix cache is where it was.
    assert loads[0] < 100 / 4


async def test_servers_of_different_models_are_never_mixed(rollouts: RolloutBalancer) -> None:
    assert rollouts.model() == MODEL
    stranger = rollouts._servers["127.0.0.1:2"]
    stranger.model = replace(MODEL, fingerprint="blake3:" + "0" * 64)
    with pytest.raises(FingerprintMismatch, match=r"127\.0\.0\.1:2: blake3:000"):
        rollouts.model()
    # Once it is gone the others serve on; and while nobody answers, requests may wait for the model served last.
    stranger.model = None
    assert rollouts.model() == MODEL
    for server in rollouts._servers.values():
        server.model = None
    assert rollouts.model() == MODEL
    with pytest.raises(Unavailable):
        rollouts._pick("key", set())


_ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5)
_JSON = st.recursive(_ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "x"]), "content": st.text(max_size=5) | _JSON}, optional={"name": _JSON}
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from([ChatRequest, CompletionRequest]))
def test_any_json_is_either_refused_or_can_be_sent(data: st.DataObject, kind: type[Any]) -> None:
    names = [*kind.model_fields, *kind.neutral, *sorted(kind.ignored), "unheard-of"]
    body = {"model": "a", "messages": [{"role": "user", "content": "x"}], "prompt": [1, 2]}
    body = {name: value for name, value in body.items() if name in kind.model_fields}
    likely = st.integers(0, 30) | st.floats(0, 1) | st.lists(_MESSAGE, max_size=2) | st.lists(st.integers(-1, 9))
    changes = data.draw(st.dictionaries(st.sampled_from(names), likely | _JSON, max_size=3))
    try:
        asked = kind.model_validate(body | changes)
    except (ValidationError, InvalidArgument):
        return
    messages = [common_pb2.Message(content=message.content) for message in getattr(asked, "messages", [])]
    prompts = [
        rollout_pb2.GenerateRequest(**({"text": prompt} if isinstance(prompt, str) else {"token_ids": {"ids": prompt}}))
        for prompt in getattr(asked, "prompt", [])
    ] or [rollout_pb2.GenerateRequest(conversation=common_pb2.Conversation(messages=messages))]
    limits = SimpleNamespace(max_choices=8)
    try:
        gateway = cast(Any, SimpleNamespace(settings=limits))
        generation = Generation(gateway, Principal(), Target(MODEL, ()), asked, prompts, "test")
    except FoundryError:
        return
    for index in range(len(prompts)):
        generation._request(index).SerializeToString()


def test_connections_send_at_once() -> None:
    with listen("127.0.0.1:0") as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
