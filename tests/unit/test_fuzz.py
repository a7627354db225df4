"""Whatever a parser is given, it answers with a value or a typed error: what is valid, damaged in any way.

100 cases each; 100,000 with HYPOTHESIS_PROFILE=nightly (make fuzz).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from foundry.errors import FoundryError
from foundry.identity import CartridgeHeader, read_prologue
from foundry.model.info import ModelInfo
from foundry.model.template import ChatTemplate
from foundry.selfstudy.prompts import read_prompts
from foundry.store import Manifest, RunRequest, RunSpec
from foundry.store.sealed import seal
from foundry.v1 import common_pb2, rollout_pb2
from services.gateway.bodies import parse
from services.gateway.openai.requests.chat import ChatRequest
from services.gateway.openai.requests.completion import CompletionRequest
from services.rollout.admission import Admissions
from tests.store_data import DOCUMENT, cartridge, draft
from tests.tiny import CLOCK, build_tiny_model

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
fuzzed = settings(max_examples=100_000 if NIGHTLY else 100, deadline=None, database=None)

MANIFEST = json.loads(
    Manifest.of(
        draft("acme/report", step=3, document=DOCUMENT, metrics={"kl": 0.25}),
        header=cartridge(1).header,
        digest=cartridge(1).digest(),
        version=17,
        created_at="2026-11-22T10:00:00.000+00:00",
    ).to_json()
)
HEADER = MANIFEST["header"]
BLOB = b"".join(bytes(part) for part in cartridge(1).file_parts())
RUN = {"name": "a", "document": DOCUMENT, "prompts": {"kind": "selfstudy", "num_prompts": 4}, "learning_rate": 0.01}
REQUEST = {"name": "a", "text": "A text.", "recipe": "quick", "compression": 8, "heldout": None, "families": "recite"}
CHAT = {
    "model": "a@1",
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    "stop": ["x"],
    "tools": [],
    "stream_options": {"include_usage": True},
}
COMPLETION = {"model": "a", "prompt": [[1, 2], "b"], "logprobs": 2, "cartridges": ["b@blake3:" + "0" * 64]}
PROMPTS = '{"prompt": "Why?"}\n{"messages": [{"role": "user", "content": "How?"}]}\n'
GENERATE = rollout_pb2.GenerateRequest(
    model_fingerprint="blake3:" + "0" * 64,
    conversation=common_pb2.Conversation(messages=[common_pb2.Message(role="user", content="Hi")]),
    cartridges=[common_pb2.CartridgeId(name="a", version=1, digest="blake3:" + "1" * 64)],
    sampling=rollout_pb2.Sampling(max_new_tokens=4, temperature=0.5, top_k=3, n=2, stop=["x"], seed=2**63),
).SerializeToString()

# Values that parsers trip over, besides what hypothesis thinks of.
ODD = st.sampled_from(
    [2**31, 2**63, 2**64, -1, 10**400, 1e308, 5e-324, "", "\0", "é" * 100, "blake3:" + "f" * 64, [], {}, [[[[]]]], True]
)
# Copied, since they are changed in turn.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | ODD,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
).map(deepcopy)
PIECES = st.sampled_from(
    [b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"NaN", b"-Infinity", b'"\\ud800"', b"\xff\xfe", b"\0", b'"', b"\\"]
)


@st.composite
def changed(draw: st.DrawFn, valid: Any) -> Any:
    """JSON of which some places hold something else, or nothing, or which has more."""
    value = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while isinstance(place, dict | list) and place:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
                place = place[key]
                continue
            what = draw(st.sampled_from(["replace", "remove", "add"]))
            if what == "replace":
                place[key] = draw(VALUES)
            elif what == "remove":
                del place[key]
            elif isinstance(place, dict):
                place[draw(st.text(max_size=8))] = draw(VALUES)
            else:
                place.append(draw(VALUES))
            break
    return value


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes of which some are others, missing, or twice."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.integers(0, 8)))
        content[begin:end] = draw(st.binary(max_size=8) | PIECES | st.just(bytes(content[begin:end]) * 2))
    return bytes(content)


def survives(read: Callable[[], object]) -> None:
    """Nothing but a value, or an error that says what is wrong in so many words."""
    message = "read"
    try:
        read()
    except FoundryError as error:
        message = error.message
    assert 0 < len(message) < 5000


@fuzzed
@given(changed(MANIFEST))
def test_manifests(values: Any) -> None:
    # Sealed anew, so that it is not the checksum that refuses it.
    survives(lambda: Manifest.from_json(seal({key: each for key, each in values.items() if key != "checksum"})))


@fuzzed
@given(damaged(json.dumps(MANIFEST).encode()))
def test_manifests_as_bytes(content: bytes) -> None:
    survives(lambda: Manifest.from_json(content))


@fuzzed
@given(changed(HEADER))
def test_headers(values: Any) -> None:
    survives(lambda: CartridgeHeader.from_dict(values).num_bytes)


@fuzzed
@given(damaged(BLOB[:2048]))
def test_blob_prologues(content: bytes) -> None:
    survives(lambda: read_prologue(content))


@fuzzed
@given(changed(RUN))
def test_runs(values: Any) -> None:
    survives(lambda: RunSpec.from_json(RunSpec.from_json(json.dumps(values)).to_json()))


@fuzzed
@given(changed(REQUEST))
def test_requests_of_runs(values: Any) -> None:
    survives(lambda: RunRequest.model_validate(values))


@fuzzed
@given(st.sampled_from([ChatRequest, CompletionRequest]), changed(CHAT) | changed(COMPLETION))
def test_completions(kind: type[ChatRequest | CompletionRequest], values: Any) -> None:
    # Of these FastAPI tells the first.
    with suppress(ValidationError):
        survives(lambda: kind.model_validate(values))


@fuzzed
@given(damaged(json.dumps(CHAT).encode()))
def test_bodies(content: bytes) -> None:
    survives(lambda: parse(content))


@fuzzed
@given(damaged(PROMPTS.encode()))
def test_prompts(content: bytes) -> None:
    survives(lambda: read_prompts(content.decode(errors="replace"), field="prompts"))


@pytest.fixture(scope="module")
def admissions(tmp_path_factory: pytest.TempPathFactory) -> Admissions:
    info = ModelInfo.read(build_tiny_model(tmp_path_factory.mktemp("fuzz")))
    template = ChatTemplate(info.tokenizer, CLOCK)
    return Admissions(info, template, max_context_tokens=256, max_sequence_tokens=128, max_sequences=4)


@fuzzed
@given(content=damaged(GENERATE))
def test_messages(admissions: Admissions, content: bytes) -> None:
    message: Message = rollout_pb2.GenerateRequest()
    try:
        message.ParseFromString(content)
    except DecodeError:
        return
    message.model_fingerprint = admissions._spec.fingerprint  # type: ignore[attr-defined]
    survives(lambda: admissions.check(message))  # type: ignore[arg-type]
