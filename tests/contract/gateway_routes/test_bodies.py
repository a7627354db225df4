"""Bodies within the limits: none takes the gateway's memory or holds up another request."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundry.errors import InvalidArgument
from foundry.store import RunSpec
from services.gateway import bodies
from tests.contract.gateway_routes.site import Site, specification
from tests.hostile_bodies import bodies as hostile_bodies
from tests.hostile_bodies import cost, warm_up
from tests.services import wait_ready

# What is promised is 0.1 (benchmarks/results/bodies.json); machines that run tests have other things to do.
_MAX_DELAY_SECONDS = 1.0
_MAX_ANSWER_BYTES = 2048


def test_no_body_takes_much_memory_or_holds_up_others(site: Site) -> None:
    gateway = site.stack.gateway([site.rollout])
    wait_ready(gateway)
    warm_up(gateway)
    before = gateway.peak_bytes()
    hostile = hostile_bodies(150_000)
    for name, (path, body) in hostile.items():
        found = cost(gateway, path, body)
        assert found.status == 400, name
        assert found.answer_bytes < _MAX_ANSWER_BYTES, name
        assert found.delay_seconds < _MAX_DELAY_SECONDS, name
    # One after another: what one has taken the next one takes again.
    largest = max(len(body) for _, body in hostile.values())
    assert gateway.peak_bytes() - before <= 10 * largest
    gateway.stop()


NUMBERS = [name for name, field in RunSpec.model_fields.items() if type(field.default) in (int, float)]


@pytest.mark.parametrize("number", ["1" + 30 * "0", "1" + 400 * "0", "1" + 5000 * "0", "-1" + 400 * "0", "1e400"])
def test_numbers_of_any_size_are_refused_or_taken(site: Site, number: str) -> None:
    for field in ("compression", *NUMBERS):
        values = {"name": "handbook", "text": "Nobody signed anything. " * 8} | {field: "THE NUMBER"}
        body = json.dumps(values).replace('"THE NUMBER"', number)
        answer = site.http("POST", "/v1/runs", content=body, headers={"content-type": "application/json"})
        if answer.status_code == 201:
            # Then everybody can read it.
            assert site.http("GET", "/v1/runs").status_code == 200
            site.client.runs.cancel(answer.json()["id"])
        else:
            assert answer.status_code == 400, field
            assert number[:40] not in answer.text


def test_what_was_sent_is_not_echoed(site: Site) -> None:
    secret = "sk-secret"
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello."}]}
    for body in (
        chat | {"temperature": secret},
        chat | {"messages": secret},
        chat | {"messages": [secret]},
        chat | {"messages": [{"role": secret, "content": ""}]},
        chat | {"frequency_penalty": secret},
        chat | {"seed": [secret]},
        [secret],
    ):
        answer = site.http("POST", "/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert secret not in answer.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=40,
)


def _counted(value: Any) -> tuple[int, int]:
    """Strings, lists and objects; and values, of which a list or object of n has n - 1 commas."""
    if isinstance(value, str):
        return 1, 0
    if isinstance(value, dict):
        inner = [_counted(each) for each in value.values()]
        parts = 1 + len(value) + sum(each[0] for each in inner)
    elif isinstance(value, list):
        inner = [_counted(each) for each in value]
        parts = 1 + sum(each[0] for each in inner)
    else:
        return 0, 0
    return parts, max(0, len(value) - 1) + sum(each[1] for each in inner)


@given(JSON, st.booleans(), st.integers(1, 20))
def test_what_a_body_holds_is_counted_in_its_bytes(value: Any, ascii_only: bool, stride: int) -> None:
    content = json.dumps(value, ensure_ascii=ascii_only).encode(errors="replace")
    counted = bodies._Counted()
    for begin in range(0, len(content), stride):
        counted.add(content[begin : begin + stride])
    assert (counted._num_parts, counted._num_values) == _counted(value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'"\\ud800"', b"[NaN]", b"[" * 10**4, b"1" * 5000, b'"\\'])
def test_what_is_not_json_is_a_typed_error(content: bytes) -> None:
    with pytest.raises(InvalidArgument, match="not JSON"):
        bodies.parse(content)


@pytest.mark.parametrize("levels", [65, 1000])
def test_what_is_nested_deeply_is_a_typed_error(levels: int) -> None:
    with pytest.raises(InvalidArgument, match="nested more than 64 deep"):
        bodies.parse(b"[" * levels + b"]" * levels)


@pytest.mark.parametrize("digits", [19, 25, 400, 5000])
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/v1/cartridges/x/tags/best", '{"version": %s}'),
        ("DELETE", "/v1/cartridges/x/versions/%s", ""),
        ("GET", "/v1/cartridges/x@%s", ""),
        ("POST", "/v1/cartridges/x/rollback", '{"to": "%s"}'),
        ("POST", "/v1/chat/completions", '{"model": "x@%s", "messages": [{"role": "user", "content": "a"}]}'),
    ],
)
def test_versions_of_any_size_are_typed_errors(site: Site, digits: int, method: str, path: str, body: str) -> None:
    number = "9" * digits
    path, body = (each.replace("%s", number) for each in (path, body))
    answer = site.http(method, path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 404), answer.text


@pytest.mark.parametrize(
    ("event_id", "status"),
    [("9" * 20, 400), ("1-18446744073709551616", 400), ("18446744073709551615-18446744073709551615", 204)],
)
def test_event_ids_of_any_size_are_typed_errors(site: Site, event_id: str, status: int) -> None:
    run_id = site.client.runs.create(**specification(text="Nobody signed anything. " * 8))["id"]
    site.client.runs.cancel(run_id)
    answer = site.http("GET", f"/v1/runs/{run_id}/events", headers={"last-event-id": event_id})
    assert answer.status_code == status
