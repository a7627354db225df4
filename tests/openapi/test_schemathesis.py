"""The gateway against its own OpenAPI page: 2,000 requests made of it, right and wrong ones, before real services.

`make schemathesis`; FOUNDRY_SCHEMATHESIS says how many in all.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.contract.gateway_routes.site import DOCUMENT, Site, specification
from tests.services import open_stack, wait_ready, wait_serving

NUM_CASES = int(os.environ.get("FOUNDRY_SCHEMATHESIS", "2000"))
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@dataclass
class Subject:
    url: str
    # By parameter, what exists: made up values alone would find nothing.
    known: dict[str, list[Any]]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with open_stack(tmp_path_factory.mktemp("openapi")) as stack:
        rollout = stack.rollout()
        teacher = stack.spawn("teacher", "--model", str(stack.model), "--reserve-tokens", "128")
        gateway = stack.gateway([rollout], "--teacher-address", teacher.address)
        wait_serving(rollout)
        wait_serving(teacher)
        wait_ready(gateway)
        stack.publish("handbook", *(stack.cartridge(seed) for seed in range(3)))
        stack.publish("acme/manual", stack.cartridge(4))
        site = Site(stack, rollout, gateway, None)  # type: ignore[arg-type]
        site.http("PUT", "/v1/cartridges/handbook/tags/best", json={"version": 2})
        run = site.http("POST", "/v1/runs", json=specification(text=DOCUMENT, name="other")).json()
        # A run that is not over has events without end.
        site.http("POST", f"/v1/runs/{run['id']}/cancel")
        yield Subject(
            f"http://{gateway.address}",
            {
                "name": ["handbook", "acme/manual", "handbook@best"],
                "version": [1, 2],
                "tag": ["best"],
                "tenant": ["hooli"],
                "model": ["tiny", "handbook"],
                "digest": [run["spec"]["document"]],
                "run_id": [run["id"]],
                "from": ["1"],
                "to": ["2"],
            },
        )


def test_every_answer_is_one_that_the_page_declares(subject: Subject) -> None:
    schema = schemathesis.openapi.from_url(f"{subject.url}/openapi.json")
    operations: list[Any] = [cast(Any, found).ok() for found in schema.get_all_operations()]
    known = st.fixed_dictionaries({}, optional={name: st.sampled_from(each) for name, each in subject.known.items()})
    counted: Counter[int] = Counter()
    wrong_operations: list[Exception] = []
    for operation in operations:
        right, wrong = (operation.as_strategy(generation_mode=mode) for mode in GenerationMode)

        @settings(
            max_examples=math.ceil(NUM_CASES / len(operations)),
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=right | wrong, values=known)
        def check(case: Any, values: dict[str, Any]) -> None:
            for place in (case.path_parameters, case.query, case.body):
                if isinstance(place, dict):
                    place.update({name: value for name, value in values.items() if name in place})
            response = case.call(timeout=60)
            counted[response.status_code] += 1
            case.validate_response(response, checks=CHECKS)

        try:
            check()
        except Exception as error:
            wrong_operations.append(error)
    print(f"{counted.total()} answers of {len(operations)} operations: {dict(sorted(counted.items()))}")
    if wrong_operations:
        raise ExceptionGroup("not as the page says", wrong_operations)
    assert counted.total() >= 0.9 * NUM_CASES
    assert {200, 201, 204, 400, 404, 409} <= counted.keys()
