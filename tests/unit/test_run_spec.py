"""Run specifications: what can never work is refused with the name of the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from foundry.errors import CartridgeTooLong, InvalidArgument
from foundry.identity import content_digest
from foundry.store import Desired, DocumentPrompts, Resources, RunRequest, RunSpec, RunState, SelfStudyPrompts
from foundry.store.record import record_of
from tests.store_data import DOCUMENT, run_spec

MINIMAL: dict[str, Any] = {
    "name": "report",
    "document": DOCUMENT,
    "num_tokens": 8,
    "num_steps": 3,
    "prompts": {"kind": "selfstudy", "num_prompts": 4},
}
# As they are in stores: an early demo's, and one with a value of every kind.
WRITTEN = (
    (
        '{"batch_size": 16, "checkpoint_every": 10, '
        '"document": "blake3:cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd", '
        '"durable_every": 10, '
        '"heldout": {"digest": "blake3:0202020202020202020202020202020202020202020202020202020202020202", '
        '"kind": "document"}, "heldout_every": 4, "jsd_beta": 0.5, "learning_rate": 0.02, "max_new_tokens": 24, '
        '"model_fingerprint": "", "name": "handbook", "num_frozen": 1, "num_steps": 20, "num_tokens": 512, '
        '"objective": "forward_kl", "policy_mismatch_threshold": 0.05, "prompts": {"kind": "selfstudy", '
        '"max_prompt_tokens": 128, "num_prompts": 64}, "samples_per_prompt": 1, "seed": 0, "temperature": 1.0, '
        '"topk": 20}'
    ),
    (
        '{"batch_size": 16, "checkpoint_every": 1, '
        '"document": "blake3:cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd", '
        '"durable_every": 2, "heldout": {"kind": "selfstudy", "max_prompt_tokens": 32, "num_prompts": 2}, '
        '"heldout_every": 5, "jsd_beta": 0.1, "learning_rate": 1e-05, "max_new_tokens": 24, '
        '"model_fingerprint": "blake3:abababababababababababababababababababababababababababababababab", '
        '"name": "acme/report", "num_frozen": 4, "num_steps": 100, "num_tokens": 512, "objective": "jsd", '
        '"policy_mismatch_threshold": 1, '
        '"prompts": {"digest": "blake3:0101010101010101010101010101010101010101010101010101010101010101", '
        '"kind": "document"}, "resources": {"cpu": "1.5", "gpus": 0, "memory": "16Gi", "nodes": 2}, '
        '"samples_per_prompt": 2, "seed": 9223372036854775807, "temperature": 1, "topk": 50}'
    ),
)


@pytest.mark.parametrize("written", WRITTEN)
def test_what_was_written_before_there_was_a_choice_means_what_it_meant(written: str) -> None:
    spec = RunSpec.from_json(written)
    assert (spec.init, spec.mode, spec.num_off_policy_steps) == ("first_tokens", "on", 0)
    assert spec.matching_steps == spec.hard_label_weight == 0
    for field, value in json.loads(written).items():
        assert spec.model_dump(mode="json")[field] == value
    assert RunSpec.from_json(spec.to_json()) == spec
    # As the gateway answers.
    assert json.dumps(json.loads(spec.model_dump_json()), sort_keys=True) == spec.to_json()


def test_a_new_run_starts_compact_and_says_with_what() -> None:
    spec = RunSpec(**MINIMAL)
    assert spec.start == "compact, reference_tokens=16384, matching_steps=200"
    assert spec.digest != spec.model_copy(update={"num_tokens": 9}).digest
    assert spec.digest != spec.model_copy(update={"mode": "off"}).digest


def test_a_run_says_what_it_makes_small_and_whether_to_be_surer() -> None:
    spec = RunSpec(**MINIMAL)
    assert (spec.loss, spec.is_surer) == ("forward_kl", False)
    hard = spec.model_copy(update={"hard_label_weight": 0.5})
    assert (hard.loss, hard.is_surer) == ("forward_kl, 0.5 hard labels", True)
    assert spec.model_copy(update={"objective": "nll", "mode": "off"}).is_surer


@pytest.mark.parametrize(("mode", "steps"), [("on", 0), ("off", 3), ("hybrid", 1)])
def test_a_mode_is_a_number_of_steps(mode: str, steps: int) -> None:
    values = MINIMAL | {"mode": mode, "off_policy_share": 0.4}
    assert RunSpec(**values).num_off_policy_steps == steps


def test_a_record_of_redis_is_read() -> None:
    written, _ = WRITTEN
    fields = {"spec": written, "state": "paused", "attempt": "2", "desired": "pause", "worker": "w", "created": "1000"}
    record = record_of("run-a", fields | {"started": "2000", "last_event": '{"type": "step", "loss": 1}'})
    assert (record.state, record.desired, record.attempt) == (RunState.PAUSED, Desired.PAUSE, 2)
    assert record.spec == RunSpec.from_json(written)
    assert record.model_dump(mode="json", by_alias=True, exclude={"spec"}) == {
        "id": "run-a",
        "state": "paused",
        "attempt": 2,
        "desired": "pause",
        "worker": "w",
        "waiting_for": "",
        "created_at": "1970-01-01T00:00:01.000+00:00",
        "started_at": "1970-01-01T00:00:02.000+00:00",
        "finished_at": None,
        "error": None,
        "result": None,
        "last_event": {"type": "step", "loss": 1},
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


def test_a_run_that_no_answer_is_old_for_has_the_digest_that_it_always_had() -> None:
    assert not {"max_staleness", "importance_ratio_max"} & json.loads(run_spec().to_json()).keys()
    ahead = run_spec(max_staleness=1, importance_ratio_max=3.0)
    assert ahead.digest != run_spec().digest
    assert RunSpec.from_json(ahead.to_json()) == ahead


def test_minimal_json_is_enough() -> None:
    assert RunSpec.model_validate(MINIMAL) == run_spec()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "Bad Name"),
        ("name", 5),
        ("document", "report.txt"),
        ("num_tokens", 0),
        ("num_tokens", "8"),
        ("num_tokens", True),
        ("num_tokens", 8.0),
        ("num_tokens", 10**400),
        ("seed", 2**63),
        ("heldout", []),
        ("num_frozen", 8),
        ("num_frozen", -1),
        ("num_steps", -1),
        ("families", []),
        ("families", ["recite", "recite"]),
        ("general_share", 1),
        ("schedule", "linear"),
        ("warmup_steps", -1),
        ("max_grad_norm", -1),
        ("max_staleness", -1),
        ("max_staleness", 4),
        ("importance_ratio_max", 0.5),
        ("patience", -1),
        ("init_text", DOCUMENT),
        ("init_version", "handbook@3"),
        ("objective", "nll"),
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
        ("temperature", True),
        ("temperature", 10**400),
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
        ("prompts.num_prompts", True),
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
        RunSpec.model_validate(values)
    assert caught.value.field == field
    # Nobody asked pydantic.
    assert "pydantic" not in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("field", ["name", "document"])
def test_missing_values_name_their_field(field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RunSpec.model_validate({key: value for key, value in MINIMAL.items() if key != field})
    assert caught.value.field == field


@pytest.mark.parametrize("field", ["prompts", "heldout"])
def test_prompts_of_another_document_need_its_digest(field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RunSpec.model_validate(MINIMAL | {field: {"kind": "document", "digest": "prompts.jsonl"}})
    assert caught.value.field == f"{field}.digest"


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_what_is_no_run_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        RunSpec.from_json(text)


def test_a_document_may_come_with_its_run() -> None:
    request = RunRequest(name="report", text="The harbour is open.", title="Harbour")
    assert request.document == content_digest(b"The harbour is open.")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({}, "document"),
        ({"text": "a", "document": DOCUMENT}, "text"),
        ({"document": DOCUMENT, "title": "a"}, "title"),
        ({"text": 5}, "text"),
        ({"text": "\ud800"}, "text"),
        ({"text": "a", "title": "\ud800"}, "title"),
        ({"document": "report.txt"}, "document"),
    ],
)
def test_a_request_names_one_document(values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        RunRequest.model_validate({"name": "report", **values})
    assert caught.value.field == field


def test_a_cartridge_of_more_tokens_than_its_document_has_bytes_is_refused() -> None:
    RunRequest(name="report", text="x" * 1000, num_tokens=1000)
    with pytest.raises(CartridgeTooLong) as caught:
        RunRequest(name="report", text="x" * 1000, num_tokens=2000)
    assert caught.value.field == "num_tokens"
