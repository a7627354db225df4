"""What a run is when little is said of it."""

from __future__ import annotations

from typing import Any

import pytest

from foundry.errors import InvalidArgument
from foundry.recipes import choose, describe
from foundry.store import RunRequest, RunSpec
from foundry.store.spec import CHOSEN
from tests.store_data import DOCUMENT

RECIPES = ("quick", "standard", "thorough")


def request(**values: Any) -> RunRequest:
    return RunRequest(name="report", document=DOCUMENT, **values)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("num_context_tokens", [17, 60, 2000, 100_000])
def test_a_recipe_is_a_run_for_a_document_of_any_length(recipe: str, num_context_tokens: int) -> None:
    spec = choose(request(recipe=recipe), num_context_tokens)
    assert type(spec) is RunSpec
    assert 16 <= spec.num_tokens <= num_context_tokens
    assert spec.num_tokens == max(16, round(num_context_tokens / 4))
    assert spec.mode == "hybrid"
    assert 0 < spec.num_off_policy_steps < spec.num_steps
    assert spec.warmup_steps < spec.num_steps
    assert 0 < spec.heldout_every <= spec.num_steps
    assert RunSpec.from_json(spec.to_json()) == spec


def test_a_longer_document_takes_more_steps_and_a_thorough_recipe_too() -> None:
    steps = [[choose(request(recipe=recipe), tokens).num_steps for tokens in (2000, 8000)] for recipe in RECIPES]
    assert all(short < long for short, long in steps)
    assert steps[0] < steps[1] < steps[2]


def test_what_is_asked_for_stays() -> None:
    asked: dict[str, Any] = {"mode": "on", "num_steps": 7, "batch_size": 3, "heldout_every": 0, "families": ["cloze"]}
    spec = choose(request(num_tokens=33, **asked), 2000)
    assert (spec.num_tokens, spec.families) == (33, ("cloze",))
    assert {key: getattr(spec, key) for key in asked if key != "families"} == {
        key: value for key, value in asked.items() if key != "families"
    }
    assert choose(request(compression=8), 2000).num_tokens == 250


def test_what_holds_more_takes_smaller_steps() -> None:
    rates = {ratio: choose(request(compression=ratio), 2000).learning_rate for ratio in (1, 2, 4, 8, 16)}
    assert rates == {1: 0.0035, 2: 0.007, 4: 0.014, 8: 0.028, 16: 0.028}
    assert choose(request(compression=2, learning_rate=0.03), 2000).learning_rate == 0.03
    # Longer than the document, which is refused for that and for nothing else.
    assert choose(request(num_tokens=2**20), 2000).learning_rate == rates[1]


def test_prompts_that_somebody_brings_are_written_too() -> None:
    prompts = {"kind": "document", "digest": DOCUMENT}
    assert "question" in choose(request(prompts=prompts), 2000).families
    assert choose(request(prompts=prompts, recipe="quick"), 2000).families[-1] == "question"
    assert choose(request(prompts=prompts, families=["recite"]), 2000).families == ("recite",)


def test_without_the_documents_length_it_must_be_said() -> None:
    assert choose(request(num_tokens=64, num_steps=10), None).num_tokens == 64
    with pytest.raises(InvalidArgument, match="num_tokens would follow from the document's length"):
        choose(request(num_steps=10), None)
    with pytest.raises(InvalidArgument, match="num_steps would follow"):
        choose(request(num_tokens=64), None)


def test_length_is_said_once() -> None:
    with pytest.raises(InvalidArgument, match="either num_tokens or compression"):
        request(num_tokens=64, compression=4)


def test_the_choice_is_told_in_two_lines() -> None:
    spec = choose(request(recipe="quick"), 1960)
    first, second = describe(spec, "quick", 1960)
    assert f"{spec.num_tokens} tokens stand in for 1960, 4.0 to 1" in first
    assert f"quick: {spec.num_steps} steps of {spec.batch_size} answers" in second
    assert (
        f"{spec.num_off_policy_steps} steps on written answers, then {spec.num_steps - spec.num_off_policy_steps}"
        in second
    )


def test_without_steps_none_are_told_of() -> None:
    spec = choose(request(num_steps=0), 1960)
    assert "no steps" in describe(spec, "standard", 1960)[1]


def test_what_is_said_to_be_the_recipes_is() -> None:
    """And in no schema has it a default."""
    plain = RunSpec(name="report", document=DOCUMENT)
    chosen = [choose(request(recipe=recipe, compression=2), 2000) for recipe in RECIPES]
    # As everywhere where no recipe has a reason for another one.
    same = {
        name for name in RunSpec.model_fields if all(getattr(spec, name) == getattr(plain, name) for spec in chosen)
    }
    assert RunSpec.model_fields.keys() - same - {"resources"} == CHOSEN
    schema = RunRequest.model_json_schema()["properties"]
    assert {name for name in RunSpec.model_fields if "default" not in schema[name]} == {*CHOSEN, "name"}
