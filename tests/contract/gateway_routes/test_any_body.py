"""Whatever JSON a route is sent, it answers as its page says, and a refusal is an error object.

4 bodies for each route; 200 with HYPOTHESIS_PROFILE=nightly (make schemathesis).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foundry.errors import BY_REASON
from services.gateway.access.scopes import NEEDED
from tests.contract.gateway_routes.site import DOCUMENT, Site, specification

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=200),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=10,
)
# What the routes with a body take, so that most of a body gets past the first check.
TAKEN: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello."}],
        "max_tokens": 2,
        "temperature": 0,
        "stream": False,
        "logprobs": True,
        "cartridges": None,
        "stop": "x",
    },
    "/v1/completions": {"model": "tiny", "prompt": "Hello.", "max_tokens": 2, "n": 1, "seed": 3, "top_k": 5},
    "/v1/responses": {"model": "tiny", "input": "Hello.", "max_output_tokens": 2, "stream": False, "temperature": 0},
    "/tokenize": {"model": "tiny", "messages": [{"role": "user", "content": "Hello."}], "return_token_strs": True},
    "/detokenize": {"model": "tiny", "tokens": [5, 6]},
    "/v1/documents": {"text": DOCUMENT, "title": "The treaty"},
    "/v1/runs": specification(text=DOCUMENT),
    "/v1/cartridges/{name:path}/tags/{tag}": {"version": 1},
    "/v1/cartridges/{name:path}/rollback": {"to": "1"},
}
_CHAT = TAKEN["/v1/chat/completions"] | {
    "cartridges": [{"id": "any", "source": "local", "force_redownload": False}],
    "logprobs_in_fingerprint": True,
}
_TEXT = TAKEN["/v1/completions"] | {"cartridges": None, "logprobs_in_fingerprint": True}
for _prefix in ("/custom/cartridge", "/v1/cartridge"):
    TAKEN |= {f"{_prefix}/chat/completions": _CHAT, f"{_prefix}/completions": _TEXT}
TAKEN["/custom/cartridge/synchronous-batch-completions"] = {"requests": [_CHAT]}
# What stands in a path.
NAMES = {
    "name": "any",
    "reference": "any",
    "version": 7,
    "tag": "best",
    "tenant": "acme",
    "model": "tiny",
    "digest": "x",
    "run_id": "run-a",
    "file_id": "file-a",
    "batch_id": "batch_a",
}


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[httpx.Client]:
    site.stack.publish("any", site.stack.cartridge(1))
    with httpx.Client(base_url=f"http://{site.gateway.address}", trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def declared(site: Site) -> dict[str, Any]:
    paths: dict[str, Any] = site.http("GET", "/openapi.json").json()["paths"]
    return paths


def bodies(path: str) -> st.SearchStrategy[Any]:
    """Any JSON, and what the route takes with some of its values replaced by any JSON."""
    taken = TAKEN.get(path)
    if taken is None:
        return JSON
    damage = st.dictionaries(st.sampled_from(sorted(taken)) | st.text(max_size=8), JSON, max_size=2)
    return st.one_of(JSON, damage.map(lambda changes: taken | changes))


@pytest.mark.parametrize("route", sorted(NEEDED))
@settings(
    max_examples=200 if NIGHTLY else 4,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_json_is_answered_as_the_page_says(
    client: httpx.Client, declared: dict[str, Any], route: str, data: st.DataObject
) -> None:
    method, path = route.split()
    shown = path.replace(":path", "")
    concrete = shown.format_map(NAMES)
    answer = client.request(method, concrete, json=data.draw(bodies(path)))
    assert str(answer.status_code) in declared[shown][method.lower()]["responses"], answer.text
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] in BY_REASON
    elif path == "/v1/runs" and method == "POST":
        client.post(f"/v1/runs/{answer.json()['id']}/cancel")
