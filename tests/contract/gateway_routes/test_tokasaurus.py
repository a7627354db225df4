"""A client of Tokasaurus' cartridge branch, written from what its routes take and give, before the gateway."""

from __future__ import annotations

import base64
import json
import pickle
import time
from typing import Any

import httpx
import numpy as np
import pytest
from openai import OpenAI

from tests.contract.gateway_routes.site import Guarded, Site

CHAT, COMPLETIONS = "/custom/cartridge/chat/completions", "/custom/cartridge/completions"
BATCH = "/custom/cartridge/synchronous-batch-completions"
QUESTION = [{"role": "user", "content": "Where?"}]
TAG = '<cartridge>{"id": "toka-1"}</cartridge>'
GREEDY = {"max_tokens": 8, "temperature": 0}


class Client:
    """`model` is what such clients send: nothing that is looked at."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self._site.http("POST", path, json={"model": "todo"} | body)

    def chat(self, *ids: str, path: str = CHAT, **body: Any) -> dict[str, Any]:
        named = [{"id": each, "source": "wandb", "force_redownload": True} for each in ids]
        answer = self.post(path, **({"messages": QUESTION} | GREEDY | body | ({"cartridges": named} if named else {})))
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest.fixture
def client(site: Site) -> Client:
    for number in (1, 2):
        if f"toka-{number}" not in [each["name"] for each in site.client.cartridges.list()]:
            site.stack.publish(f"toka-{number}", site.stack.cartridge(40 + number))
    return Client(site)


def text(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def unpacked(answer: dict[str, Any], k: int = 0) -> tuple[list[int], Any, Any, Any]:
    packed = json.loads(answer["system_fingerprint"])
    chosen = np.frombuffer(base64.b64decode(packed["packed_chosen_logprobs"][0]), np.float32)
    indices = np.frombuffer(base64.b64decode(packed["packed_topk_indices"][0]), np.int32).reshape(-1, k)
    logprobs = np.frombuffer(base64.b64decode(packed["packed_topk_logprobs"][0]), np.float32).reshape(-1, k)
    return packed["completion_ids"][0], chosen, indices, logprobs


def test_cartridges_stand_before_the_conversation(site: Site, client: Client) -> None:
    plain, one = client.chat(), client.chat("toka-1")
    both = client.chat("toka-1", "toka-2")
    assert len({text(each) for each in (plain, one, both)}) == 3
    for model, answer in (("toka-1", one), ("tiny", plain)):
        assert text(answer) == site.client.chat(model, "Where?", max_tokens=8, temperature=0).text
    assert text(client.chat("toka-1@1", path="/v1/cartridge/chat/completions")) == text(one)
    named = [each["digest"] for each in both["foundry"]["cartridges"]]
    assert named == [site.client.cartridges.get(f"toka-{number}")["version"]["digest"] for number in (1, 2)]
    assert text(client.chat(cartridges=[])) == text(plain)


@pytest.mark.parametrize("around", ["{}", "You are kind. {}", "{}\n\nYou are kind."])
def test_a_system_message_may_name_cartridges(client: Client, around: str) -> None:
    tags = '<cartridge>\n{"id": "toka-1", "source": "local"}\n</cartridge><cartridge>{"id": "toka-2"}</cartridge>'
    left = around.format("").strip()
    kept = [{"role": "system", "content": left}] if left else []
    system = {"role": "system", "content": around.format(tags)}
    tagged = client.post(CHAT, messages=[system, *QUESTION], **GREEDY)
    plain = client.post(CHAT, messages=[*kept, *QUESTION], cartridges=[{"id": "toka-1"}, {"id": "toka-2"}], **GREEDY)
    assert tagged.status_code == plain.status_code
    if tagged.status_code != 200:
        assert tagged.json() == plain.json()
        return
    assert tagged.json()["choices"] == plain.json()["choices"]
    assert tagged.json()["usage"]["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"]


def test_a_tag_may_stand_in_a_part(client: Client) -> None:
    parts = [{"type": "text", "text": TAG}]
    assert text(client.chat(messages=[{"role": "system", "content": parts}, *QUESTION])) == text(client.chat("toka-1"))
    # The user's own text is no configuration.
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": TAG}]}
    assert client.chat(**asked)["foundry"]["cartridges"] == []


def test_tags_without_an_end_take_no_time(client: Client) -> None:
    began = time.monotonic()
    content = "<cartridge>{" * 80_000 + "}" + " " * 1000
    answer = client.post(CHAT, messages=[{"role": "system", "content": content}, *QUESTION], **GREEDY)
    assert answer.status_code in (400, 413), answer.text
    assert time.monotonic() - began < 10


def test_chosen_logprobs_are_packed_where_logprobs_are_not_asked_for(client: Client) -> None:
    answer = client.chat("toka-1", logprobs_in_fingerprint=True, n=2)
    spelt = client.chat("toka-1", logprobs=True)["choices"][0]["logprobs"]["content"]
    packed = json.loads(answer["system_fingerprint"])
    assert len(packed["completion_ids"]) == len(packed["packed_chosen_logprobs"]) == 2
    for chosen in packed["packed_chosen_logprobs"]:
        found = np.frombuffer(base64.b64decode(chosen), np.float32)
        assert np.allclose(found, [each["logprob"] for each in spelt], atol=1e-6)
    assert packed["packed_topk_indices"] is packed["packed_topk_logprobs"] is None


def test_the_fingerprint_has_ids_and_logprobs(site: Site, client: Client) -> None:
    asked: dict[str, Any] = {"logprobs": True, "top_logprobs": 3}
    packed, spelt = client.chat("toka-1", **asked, logprobs_in_fingerprint=True), client.chat("toka-1", **asked)
    assert packed["choices"][0]["logprobs"] is None
    ids, chosen, indices, logprobs = unpacked(packed, 3)
    assert json.loads(spelt["system_fingerprint"]) == {
        "completion_ids": [ids],
        "packed_chosen_logprobs": None,
        "packed_topk_indices": None,
        "packed_topk_logprobs": None,
    }
    content = spelt["choices"][0]["logprobs"]["content"]
    assert np.allclose(chosen, [each["logprob"] for each in content], atol=1e-6)
    assert np.allclose(logprobs, [[top["logprob"] for top in each["top_logprobs"]] for each in content], atol=1e-6)
    # Greedily the likeliest is the one chosen.
    assert list(indices[:, 0]) == ids
    # As OpenAI's route says of the same cartridge.
    answer = site.http("POST", "/v1/chat/completions", json=asked | {"model": "toka-1", "messages": QUESTION} | GREEDY)
    assert answer.json()["choices"][0]["logprobs"]["content"] == content


def test_completions_take_ids_and_pack_too(site: Site, client: Client) -> None:
    prompt = [5, 17, 300, 2]
    body = {"prompt": prompt, "logprobs": 2, "max_tokens": 6, "temperature": 0}
    answer = client.post(COMPLETIONS, **body, cartridges=[{"id": "toka-2"}], logprobs_in_fingerprint=True).json()
    ours = site.http("POST", "/v1/completions", json=body | {"model": "toka-2", "return_token_ids": True}).json()
    ids, chosen, indices, _ = unpacked(answer, 2)
    assert ids == ours["choices"][0]["token_ids"] == list(indices[:, 0])
    assert np.allclose(chosen, ours["choices"][0]["logprobs"]["token_logprobs"], atol=1e-6)
    assert answer["choices"][0]["text"] == ours["choices"][0]["text"]
    assert answer["choices"][0]["logprobs"] is None


def test_several_conversations_at_once(site: Site, client: Client) -> None:
    def asked(*ids: str, **body: Any) -> dict[str, Any]:
        named = [{"id": each} for each in ids]
        return {"model": "", "messages": QUESTION, "cartridges": named} | GREEDY | body

    three = [asked("toka-1"), asked("toka-2"), asked("toka-1", "toka-2")]
    answer = site.http("POST", BATCH, json={"requests": three})
    assert answer.status_code == 200, answer.text
    found = [text(each) for each in answer.json()["completions"]]
    assert found == [text(client.chat(*ids)) for ids in (["toka-1"], ["toka-2"], ["toka-1", "toka-2"])]

    def refused(*requests: Any, headers: dict[str, str] | None = None) -> tuple[int, str | None]:
        wrong = site.http("POST", BATCH, json={"requests": requests}, headers=headers)
        return wrong.status_code, wrong.json()["error"]["param"]

    assert refused(asked("toka-1"), asked("nobody")) == (404, "requests.1.cartridges.0")
    assert refused(asked("toka-1"), asked(max_tokens=-1)) == (400, "requests.1.max_tokens")
    assert refused(asked("toka-1", stream=True)) == (400, "requests.0.stream")
    # What only the rollout server can tell.
    assert refused(asked("toka-1"), asked(max_tokens=100_000)) == (400, "requests.1.max_tokens")
    # 128 choices are the most of one request, whatever it is made of.
    assert refused(*[asked(n=64)] * 3) == (400, "requests")
    assert refused() == (400, "requests")
    pickles = ("application/octet-stream", "application/x-pickle;q=1, application/octet-stream", "Application/Pickle")
    for accept in pickles:
        assert refused(asked("toka-1"), headers={"accept": accept}) == (400, "accept")
    either = client._site.http(
        "POST", BATCH, json={"requests": [asked("toka-1")]}, headers={"accept": f"{pickles[0]}, Application/JSON;q=0.5"}
    )
    assert either.headers["content-type"] == "application/json"
    assert [text(each) for each in either.json()["completions"]] == found[:1]


def test_a_pickle_is_not_read(client: Client) -> None:
    headers = {"content-type": "application/octet-stream"}
    answer = client._site.http("POST", BATCH, content=pickle.dumps({"requests": []}), headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "INVALID_ARGUMENT")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"cartridges": [{"id": "toka-1", "sauce": "wandb"}]}, "cartridges"),
        ({"cartridges": ["toka-1"]}, "cartridges"),
        ({"cartridges": "toka-1"}, "cartridges"),
        ({"cartridges": [{"source": "wandb"}]}, "cartridges"),
        ({"messages": [{"role": "system", "content": "<cartridge>{id}</cartridge>"}, *QUESTION]}, "messages.0.content"),
        (
            {
                "messages": [{"role": "system", "content": '<cartridge>{"id": "toka-1"}</cartridge>'}, *QUESTION],
                "cartridges": [{"id": "toka-2"}],
            },
            "cartridges",
        ),
        ({"messages": [{"role": "system", "content": "<cartridge>{ </cartridge>"}, *QUESTION]}, "messages.0.content"),
        (
            {"apply_chat_template_overrides": {"a": 1}, "chat_template_kwargs": {"a": 1}},
            "apply_chat_template_overrides",
        ),
        ({"messages": [{"role": "system", "content": TAG * 17}, *QUESTION]}, "messages.0.content"),
        ({"cartridges": [{"id": "toka-1"}] * 17}, "cartridges"),
        ({"logprobs": True, "logprobs_in_fingerprint": True, "stream": True}, "logprobs_in_fingerprint"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_what_can_not_be_meant_is_refused(client: Client, body: dict[str, Any], param: str) -> None:
    answer = client.post(CHAT, **({"messages": QUESTION} | GREEDY | body))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_its_own_default_temperature_holds(client: Client) -> None:
    seeded = {"messages": QUESTION, "max_tokens": 8, "seed": 3}
    default, stated = (client.post(CHAT, **seeded, **more).json() for more in ({}, {"temperature": 0.7}))
    assert text(default) == text(stated) != text(client.post(CHAT, **seeded, temperature=2).json())


def test_a_stream_is_openais(site: Site, client: Client) -> None:
    openai = OpenAI(base_url=f"http://{site.gateway.address}/v1/cartridge", api_key="unused")
    stream = openai.chat.completions.create(
        model="todo",
        messages=[{"role": "user", "content": "Where?"}],
        max_tokens=8,
        temperature=0,
        stream=True,
        extra_body={"cartridges": [{"id": "toka-1"}]},
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert said == text(client.chat("toka-1"))


def test_keys_are_asked_for_here_too(guarded: Guarded) -> None:
    body = {"messages": QUESTION, "cartridges": [{"id": "nobody"}]}
    for path, sent in ((CHAT, body), (COMPLETIONS, {"prompt": "a"}), (BATCH, {"requests": [body]})):
        assert guarded.http("POST", path, None, json=sent).status_code == 401
        _, key = guarded.key("train")
        assert guarded.http("POST", path, key, json=sent).status_code == 403
    _, key = guarded.key("query", tenant="asker")
    assert guarded.http("POST", CHAT, key, json=body).status_code == 404
