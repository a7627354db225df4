"""Random weights, held to random schemas: every answer must be a value of its schema, behind a cartridge or not."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foundry.model.lm import FrozenLM
from foundry.v1 import rollout_pb2
from services.rollout.engine import FinishReason
from services.rollout.grammar import Grammars
from services.rollout.grammar_trial import Trials
from tests.unit.engine.bench import Bench, ids_of, make_kv, random_ids, request

NAMES = st.sampled_from(["a", "b c", 'q"', "é", "", "日本"])
SCALARS = st.sampled_from(
    [
        {"type": "null"},
        {"type": "boolean"},
        {"type": "integer", "minimum": -20, "maximum": 300},
        {"type": "string", "maxLength": 4},
        {"type": "string", "pattern": "^[ab]{1,3}é$"},
        {"enum": [1, "x\n", None, [2]]},
        {"const": {"deep": ["ü", 1.5]}},
    ]
)


def nested(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.builds(lambda items: {"type": "array", "items": items, "minItems": 1, "maxItems": 2}, children)
    objects = st.builds(
        lambda properties: {
            "type": "object",
            "properties": properties,
            "required": list(properties)[:2],
            "additionalProperties": False,
        },
        st.dictionaries(NAMES, children, max_size=3),
    )
    return arrays | objects | st.builds(lambda of: {"anyOf": of}, st.lists(children, min_size=1, max_size=2))


SCHEMAS = st.recursive(SCALARS, nested, max_leaves=4)


@pytest.fixture(scope="module")
def bench(lm: FrozenLM) -> Bench:
    bench = Bench(lm, max_sequences=4, max_sequence_tokens=512)
    bench.load("c", make_kv(lm, 5))
    return bench


@pytest.fixture(scope="module")
def grammars(lm: FrozenLM) -> Grammars:
    return Grammars(lm.info)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCHEMAS)
def test_every_answer_is_a_value_of_its_schema(bench: Bench, grammars: Grammars, schema: dict[str, Any]) -> None:
    grammar = grammars.compile(rollout_pb2.Grammar(json_schema=json.dumps(schema)))
    asked = {
        seed: request(random_ids(6), *digests, seed=seed, max_new_tokens=400, ignore_eos=False, grammar=grammar)
        for seed, digests in enumerate([(), ("c",), ("c",)])
    }
    for sequence_id, outputs in bench.run(asked).items():
        text = "".join(output.text for output in outputs)
        assert outputs[-1].finish_reason is FinishReason.STOP
        jsonschema.validate(json.loads(text), schema)
        # Told as the model's, not as the grammar's.
        bench.check(asked[sequence_id], outputs)


def test_an_answer_that_may_go_on_ends_with_an_end_token(bench: Bench, grammars: Grammars) -> None:
    grammar = grammars.compile(rollout_pb2.Grammar(regex="a+"))
    asked = {seed: request(4, seed=seed, max_new_tokens=400, ignore_eos=False, grammar=grammar) for seed in range(4)}
    for outputs in bench.run(asked).values():
        text = "".join(output.text for output in outputs)
        assert set(text) == {"a"}
        assert (outputs[-1].finish_reason is FinishReason.STOP) == (ids_of(outputs)[-1] in bench.lm.eos_ids)


def test_a_length_ends_an_answer_before_its_grammar_does(bench: Bench, grammars: Grammars) -> None:
    grammar = grammars.compile(rollout_pb2.Grammar(regex="[a-z]{50}"))
    outputs = bench.run({0: request(4, max_new_tokens=3, ignore_eos=False, grammar=grammar)})[0]
    assert (len(outputs), outputs[-1].finish_reason) == (3, FinishReason.LENGTH)


def test_a_grammar_that_is_too_much_in_the_middle_is_an_error_and_no_answer(
    bench: Bench, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its trial would see this one; those that lie behind many others it may not reach.
    monkeypatch.setattr(Trials, "fault", lambda self, spec: "")
    grammar = grammars.compile(rollout_pb2.Grammar(lark='start: "x" /(((a{100}){100}){100}){100}/'))
    outputs = bench.run({0: request(4, max_new_tokens=8, ignore_eos=False, grammar=grammar), 1: request(4)})
    assert outputs[0][-1].finish_reason is FinishReason.ERROR
    assert len(outputs[1]) == 8


def test_what_is_compiled_is_kept(grammars: Grammars) -> None:
    asked = rollout_pb2.Grammar(regex="kept")
    assert grammars.compile(asked) is grammars.compile(asked)
