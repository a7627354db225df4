"""Run specifications: what can never work is refused with the name of the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from foundry.errors import InvalidArgument
from foundry.store import DocumentPrompts, Resources, RunSpec, SelfStudyPrompts
from tests.store_data import DOCUMENT, run_spec

MINIMAL: dict[str, Any] = {
    "name": "report",
    "document": DOCUMENT,
    "num_tokens": 8,
    "num_steps": 3,
    "prompts": {"kind": "selfstudy", "num_prompts": 4},
}


def test_json_round_trip() -> None:
    spec = run_spec(
        prompts=DocumentPrompts(digest=DOCUMENT), heldout=SelfStudyPrompts(num_prompts=2), objective="jsd", jsd_beta=0.1
    )
    assert RunSpec.from_json(spec.to_json()) == spec


def test_resources_are_kubernetes_quantities() -> None:
    for resources in (Resources(), Resources(cpu="1.5", memory="512Mi", gpus=0), Resources(cpu="250m", memory="1G")):
        spec = run_spec(resources=resources)
        assert RunSpec.from_json(spec.to_json()) == spec
    # Its digest is in the checkpoints of runs that were begun before there were resources.
    assert "resources" not in json.loads(run_spec().to_json())


def test_minimal_json_is_enough() -> None:
    assert RunSpec.from_dict(MINIMAL) == run_spec()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Bad Name"),
        ("name", 5),
        ("document", "report.txt"),
        ("num_tokens", 0),
        ("num_tokens", "8"),
        ("num_tokens", True),
        ("num_frozen", 8),
        ("num_frozen", -1),
        ("num_steps", 0),
        ("batch_size", 0),
        ("samples_per_prompt", 0),
        ("max_new_tokens", 0),
        ("objective", "l2"),
        ("objective", None),
        ("jsd_beta", 0),
        ("jsd_beta", 1),
        ("topk", 0),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("temperature", -1),
        ("temperature", "warm"),
        ("seed", -1),
        ("heldout_every", -1),
        ("durable_every", 0),
        ("checkpoint_every", 0),
        ("policy_mismatch_threshold", 0),
        ("policy_mismatch_threshold", float("inf")),
        ("model_fingerprint", "llama"),
        ("prompts", None),
        ("prompts", [1]),
        ("prompts.kind", "magic"),
        ("prompts.kind", ["selfstudy"]),
        ("prompts.num_prompts", 0),
        ("prompts.max_prompt_tokens", 0),
        ("prompts.surprise", 1),
        ("surprise", 1),
        ("resources", []),
        ("resources.cpu", 4),
        ("resources.cpu", "four"),
        ("resources.cpu", "0"),
        ("resources.cpu", "1Gi"),
        ("resources.memory", "16 GB"),
        ("resources.memory", "0Gi"),
        ("resources.memory", "1Gi\n"),
        ("resources.gpus", -1),
        ("resources.gpus", True),
        ("resources.nodes", 0),
        ("resources.nodes", 1.5),
        ("resources.disk", "1Gi"),
    ],
)
def test_bad_values_name_their_field(field: str, value: Any) -> None:
    values = json.loads(json.dumps(MINIMAL))
    part, _, key = field.partition(".")
    if key:
        values.setdefault(part, {})[key] = value
    else:
        values[field] = value
    with pytest.raises(InvalidArgument) as caught:
        RunSpec.from_dict(values)
    assert caught.value.field == field


@pytest.mark.parametrize("field", sorted(MINIMAL))
def test_missing_values_name_their_field(field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RunSpec.from_dict({key: value for key, value in MINIMAL.items() if key != field})
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["prompts", "heldout"])
def test_prompts_of_another_document_need_its_digest(field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RunSpec.from_dict(MINIMAL | {field: {"kind": "document", "digest": "prompts.jsonl"}})
    assert caught.value.field == f"{field}.digest"


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_what_is_no_run_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        RunSpec.from_json(text)
