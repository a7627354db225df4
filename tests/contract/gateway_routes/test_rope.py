"""Several cartridges over HTTP: where their keys stand is asked for, told in the answer, and cached apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from tests.contract.gateway_routes.site import Site

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOKASAURUS = "/custom/cartridge/chat/completions"
QUESTION = [{"role": "user", "content": "Where does the ferry land, and when?"}]
GREEDY = {"max_tokens": 8, "temperature": 0, "return_token_ids": True, "logprobs": True}
NAMES = ("rope-a", "rope-b", "rope-c")


@pytest.fixture(scope="module", autouse=True)
def cartridges(site: Site) -> None:
    for seed, name in enumerate(NAMES):
        site.stack.publish(name, site.stack.cartridge(60 + seed))


def ask(site: Site, cartridges: Sequence[str] | None = NAMES[:2], path: str = CHAT, **body: Any) -> Any:
    asked = {"model": "tiny", "messages": QUESTION, "cartridges": cartridges and list(cartridges)} | GREEDY | body
    answer = site.http("POST", path, json={name: value for name, value in asked.items() if value is not None})
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(answer: Any) -> list[float]:
    return [each["logprob"] for each in answer["choices"][0]["logprobs"]["content"]]


def cached(answer: Any) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_the_answer_says_where_keys_stood_and_each_rope_is_cached_apart(site: Site) -> None:
    kept, shifted = ask(site, rope="keep"), ask(site, rope="shift")
    assert (kept["foundry"]["rope"], shifted["foundry"]["rope"]) == ("keep", "shift")
    # The bytes are the same ones: name, version and digest stay.
    assert kept["foundry"]["cartridges"] == shifted["foundry"]["cartridges"]
    assert kept["foundry"]["cartridge_tokens"] == shifted["foundry"]["cartridge_tokens"]
    assert [cached(each) for each in (kept, shifted)] == [0, 0]
    assert said(kept) != said(shifted)
    unsaid, again = ask(site), ask(site, rope="shift")
    assert (unsaid["foundry"]["rope"], again["foundry"]["rope"]) == ("keep", "shift")
    assert cached(unsaid) == cached(again) == kept["usage"]["prompt_tokens"] - 1
    for one, other in ((unsaid, kept), (again, shifted)):
        assert one["choices"][0]["token_ids"] == other["choices"][0]["token_ids"]
        assert said(one) == pytest.approx(said(other), abs=1e-4)


def test_a_single_cartridge_and_the_base_model_are_the_same_in_both(site: Site) -> None:
    for model, cartridges in (("tiny", NAMES[2:]), ("rope-c", None), ("tiny", None)):
        kept, shifted = (ask(site, cartridges, model=model, rope=rope) for rope in ("keep", "shift"))
        assert (kept["foundry"]["rope"], shifted["foundry"]["rope"]) == ("keep", "shift")
        assert kept["choices"][0]["token_ids"] == shifted["choices"][0]["token_ids"]
        # What was computed for one is there for the other.
        assert cached(shifted) == kept["usage"]["prompt_tokens"] - 1


def test_other_routes_take_it_too(site: Site) -> None:
    chat = ask(site, rope="shift")
    named = [{"id": name} for name in NAMES[:2]]
    body = {"model": "", "messages": QUESTION, "cartridges": named, "rope": "shift"} | GREEDY
    tokasaurus = site.http("POST", TOKASAURUS, json=body).json()
    assert tokasaurus["foundry"]["rope"] == "shift"
    assert tokasaurus["choices"][0]["token_ids"] == chat["choices"][0]["token_ids"]
    texts = [
        ask(site, path=TEXT, messages=None, prompt="The ferry lands", logprobs=0, rope=rope)
        for rope in ("keep", "shift")
    ]
    assert [each["foundry"]["rope"] for each in texts] == ["keep", "shift"]
    kept, shifted = (each["choices"][0]["logprobs"]["token_logprobs"] for each in texts)
    assert kept != shifted


def test_responses_take_it_too(site: Site) -> None:
    asked = {"model": "tiny", "input": QUESTION[0]["content"], "cartridges": [*NAMES[:2]], "max_output_tokens": 8}
    for rope in ("keep", "shift"):
        answer = site.http("POST", "/v1/responses", json=asked | {"rope": rope, "temperature": 0}).json()
        chat = ask(site, rope=rope)
        assert answer["foundry"]["rope"] == rope
        assert answer["foundry"]["cartridges"] == chat["foundry"]["cartridges"]
        assert answer["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def test_a_stream_says_it_with_its_first_chunk(site: Site) -> None:
    body = {"model": "tiny", "messages": QUESTION, "cartridges": list(NAMES[:2]), "rope": "shift", "stream": True}
    lines = site.http("POST", CHAT, json=body | {"max_tokens": 4}).text.splitlines()
    first = json.loads(lines[0].removeprefix("data: "))
    assert first["foundry"]["rope"] == "shift"


def test_the_client_library_takes_it_and_tells_it(site: Site) -> None:
    answers = [
        site.client.chat("tiny", "Where?", cartridges=[*NAMES], max_tokens=4, rope=rope) for rope in (None, "shift")
    ]
    assert [answer.rope for answer in answers] == ["keep", "shift"]
    assert [each.name for each in answers[1].cartridges] == [*NAMES]


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"rope": "turn"}, "rope", "INVALID_ARGUMENT"),
        ({"rope": 1}, "rope", "INVALID_ARGUMENT"),
        ({"rope": "shift", "cartridges": ["rope-long-a", "rope-long-b"]}, "cartridges", "context_length_exceeded"),
        ({"rope": "keep", "cartridges": ["rope-long-a", "rope-long-b"]}, "cartridges", "context_length_exceeded"),
    ],
)
def test_what_cannot_be_is_refused_by_name(site: Site, body: dict[str, Any], param: str, code: str) -> None:
    if "cartridges" in body and "rope-long-a" not in [each["name"] for each in site.client.cartridges.list()]:
        for seed, name in enumerate(body["cartridges"]):
            site.stack.publish(name, site.stack.cartridge(80 + seed, num_tokens=300))
    answer = site.http("POST", CHAT, json={"model": "tiny", "messages": QUESTION, "cartridges": [*NAMES[:2]]} | body)
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["param"], answer.json()["error"]["code"]) == (param, code)
