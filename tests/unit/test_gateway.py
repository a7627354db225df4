"""Parts of the gateway that no honest rollout server can put to the test."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models

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
from services.gateway.openai.generation import Answer, Target
from services.gateway.openai.tokens import TokenSpelling, finite
from services.gateway.openai.types import ChatRequest, CompletionRequest
from services.gateway.rollouts import Rollouts, RolloutServer, ServedModel
from tests.tiny import build_tokenizer

MODEL = ServedModel("tiny", "blake3:" + "f" * 64, "blake3:" + "e" * 64, 512)
FIRST, SECOND = (CartridgeId("a", version, f"blake3:{version}" + "0" * 63) for version in (1, 2))


def identity(*cartridges: CartridgeId, fingerprint: str = MODEL.fingerprint) -> common_pb2.Identity:
    named = [common_pb2.CartridgeId(name=each.name, version=each.version, digest=each.digest) for each in cartridges]
    return common_pb2.Identity(model_fingerprint=fingerprint, cartridges=named, template_digest=MODEL.template_digest)


class Server:
    """Answers as it is told to, where a real rollout server would tell the truth."""

    def __init__(self, *chunks: rollout_pb2.GenerateChunk) -> None:
        self._chunks = chunks

    async def generate(self, *unused: Any, **ignored: Any) -> AsyncGenerator[rollout_pb2.GenerateChunk, None]:
        for chunk in self._chunks:
            yield chunk


def answer_of(server: Server, target: Target, n: int = 1, store: object = None) -> Answer:
    asked = ChatRequest(model="a", n=n, messages=[{"role": "user", "content": "?"}])  # type: ignore[list-item]
    limits = SimpleNamespace(max_choices=8, request_timeout_seconds=5)
    gateway = SimpleNamespace(settings=limits, rollouts=server, admitted=nullcontext, store=store)
    return Answer(cast(Any, gateway), target, asked, [common_pb2.Conversation()], "test")


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
    ],
)
async def test_an_answer_made_with_anything_else_is_withheld(said: common_pb2.Identity) -> None:
    lie = rollout_pb2.GenerateChunk(text="tokens", identity=said)
    with pytest.raises(IdentityMismatch):
        await anext(answer_of(Server(lie), Target(MODEL, (FIRST, SECOND))).chunks())
    truth = rollout_pb2.GenerateChunk(text="tokens", identity=identity(FIRST, SECOND))
    chunks = answer_of(Server(truth), Target(MODEL, (FIRST, SECOND))).chunks()
    assert (await anext(chunks))[1].text == "tokens"
    await chunks.aclose()


async def test_every_choice_is_checked() -> None:
    other = rollout_pb2.GenerateChunk(index=1, text="tokens", identity=identity(SECOND))
    with pytest.raises(IdentityMismatch):
        await answer_of(Server(END, other), Target(MODEL, (FIRST,)), n=2).gather()


async def test_an_answer_that_was_cut_short_is_none() -> None:
    (choice,) = await answer_of(Server(END), Target(MODEL, (FIRST,))).gather()
    assert choice.text == "tokens"
    begun = rollout_pb2.GenerateChunk(text="tok", identity=identity(FIRST))
    with pytest.raises(Unavailable):
        await answer_of(Server(begun), Target(MODEL, (FIRST,))).gather()


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

    async def generate(
        self, message: rollout_pb2.GenerateRequest, **ignored: Any
    ) -> AsyncGenerator[rollout_pb2.GenerateChunk, None]:
        if message.cartridges[0].digest != SECOND.digest:
            raise CartridgeNotFound("swept", field="digest")
        yield rollout_pb2.GenerateChunk(
            text="new",
            identity=identity(SECOND),
            finish_reason=rollout_pb2.FINISH_REASON_STOP,
            usage=rollout_pb2.Usage(),
        )


async def test_latest_is_looked_up_again_when_its_version_was_swept() -> None:
    moving = Publishing(versions=1)
    answer = answer_of(cast(Any, moving), Target(MODEL, (FIRST,)), store=moving)
    (choice,) = await answer.gather()
    assert choice.text == "new"
    assert answer.headers()["x-foundry-digest"] == SECOND.digest
    assert answer.info().cartridges[0].version == SECOND.version


async def test_a_version_that_is_gone_stays_an_error() -> None:
    still = Publishing(versions=100)
    with pytest.raises(CartridgeNotFound, match="swept"):
        await answer_of(cast(Any, still), Target(MODEL, (FIRST,)), store=still).gather()
    assert still.resolved == 1


@pytest.fixture
async def rollouts() -> AsyncIterator[Rollouts]:
    """Four servers that are said to serve; nobody listens there."""
    found = Rollouts(Pods("rollout", ["127.0.0.1:9"]), poll_seconds=1, retry_timeout_seconds=1)
    addresses = [f"127.0.0.1:{port}" for port in range(1, 5)]
    found._servers = {address: RolloutServer(Pod("rollout", Endpoint(address, "127.0.0.1"))) for address in addresses}
    for server in found._servers.values():
        server.model = MODEL
    yield found
    await asyncio.gather(*(server.pod.close() for server in found._servers.values()))
    await found.close()


async def test_a_cartridge_keeps_its_server_and_all_servers_have_some(rollouts: Rollouts) -> None:
    homes = {key: rollouts._pick(key, set()).pod.address for key in map(str, range(200))}
    assert homes == {key: rollouts._pick(key, set()).pod.address for key in homes}
    assert min(Counter(homes.values()).values()) > 25
    # When one leaves, only its own move.
    rollouts._servers["127.0.0.1:1"].model = None
    moved = {key for key, home in homes.items() if rollouts._pick(key, set()).pod.address != home}
    assert moved == {key for key, home in homes.items() if home == "127.0.0.1:1"}


async def test_no_server_gets_much_more_than_its_share(rollouts: Rollouts) -> None:
    for _ in range(100):
        rollouts._pick("one popular cartridge", set()).pod.in_flight += 1
    loads = sorted(server.pod.in_flight for server in rollouts._servers.values())
    assert sum(loads) == 100
    assert loads[-1] <= 1.25 * 101 / 4 + 1
    # Not spread more than needed either: its prefix cache is where it was.
    assert loads[0] < 100 / 4


async def test_servers_of_different_models_are_never_mixed(rollouts: Rollouts) -> None:
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


def test_byte_level_tokens_are_spelt_with_their_bytes(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    spelling = TokenSpelling(tmp_path / "tokenizer.json")
    text = "The treaty, signé à 東京 🎏"
    spelt = [spelling.spell(token_id) for token_id in tokenizer.encode(text)]
    assert b"".join(bytes(content or []) for _, content in spelt).decode() == text
    assert spelt[0][0] == bytes(spelt[0][1] or []).decode()
    assert any(word == "\ufffd" for word, _ in spelt)
    assert spelling.spell(2) == ("<|im_end|>", list(b"<|im_end|>"))


def test_sentencepiece_tokens_are_spelt_with_their_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"\u2581The": 0, "<0xE6>": 1, "</s>": 2}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    spelling = TokenSpelling(tmp_path / "tokenizer.json")
    assert spelling.spell(0) == (" The", list(b" The"))
    assert spelling.spell(1) == ("\ufffd", [0xE6])
    assert spelling.spell(2) == ("</s>", list(b"</s>"))
    assert spelling.spell(3) == ("token_id:3", None)
    assert TokenSpelling(None).spell(0) == ("token_id:0", None)


def test_impossible_tokens_have_a_logprob_that_json_can_write() -> None:
    assert (finite(float("-inf")), finite(-1.5)) == (-9999.0, -1.5)


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
    conversation = [common_pb2.Message(content=message.content) for message in getattr(asked, "messages", [])]
    prompts: Any = [
        prompt if isinstance(prompt, str) else common_pb2.TokenIds(ids=prompt)
        for prompt in getattr(asked, "prompt", [])
    ] or [common_pb2.Conversation(messages=conversation)]
    limits = SimpleNamespace(max_choices=8)
    try:
        answer = Answer(cast(Any, SimpleNamespace(settings=limits)), Target(MODEL, ()), asked, prompts, "test")
    except FoundryError:
        return
    for index, prompt in enumerate(prompts):
        answer._request(index, prompt).SerializeToString()
