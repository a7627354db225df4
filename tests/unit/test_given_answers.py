"""Answers that a file of prompts brings, in a run's data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foundry.errors import InvalidArgument
from foundry.model.lm import FrozenLM
from tests.store_data import run_spec
from tests.unit.test_dataset import FILE, Place, lm

__all__ = ["lm"]
GIVEN = [
    {
        "messages": [
            {"role": "user", "content": f"Of kind {number}?"},
            {"role": "assistant", "content": f"It is {number}."},
        ]
    }
    for number in range(30)
]


async def test_the_answers_of_a_file_are_trained_on(lm: FrozenLM, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        *GIVEN,
        {"prompt": "Of what?", "completion": [{"role": "assistant", "content": "Of grain."}]},
        {"prompt": "And whose?", "completion": "The miller's."},
        {"prompt": "Who says nothing?"},
    ]
    place = Place(lm, tmp_path, {FILE.digest: "\n".join(map(json.dumps, rows))})
    written = await place.write(prompts=FILE, mode="off", families=["given"], general_share=0)
    said = {each.prompt: str(lm.tokenizer.decode(list(each.answer_ids))) for each in written.written}
    held = {each.prompt for each in written.heldout}
    expected = {f"Of kind {number}?": f"It is {number}." for number in range(30)} | {"Of what?": "Of grain."}
    expected["And whose?"] = "The miller's."
    assert said == {
        prompt: answer[: len(said.get(prompt, ""))] for prompt, answer in expected.items() if prompt not in held
    }
    assert all(said.values())
    assert {each.author for each in written.written} == {"file"}
    # Its own answers are another's words: what is held out is answered by the model with the document.
    assert {each.author for each in written.heldout} == {"model"}
    # Nobody is asked for anything else.
    assert len(place.asked) == len(written.heldout)


async def test_a_file_without_answers_gives_none(lm: FrozenLM, tmp_path: Path) -> None:
    place = Place(lm, tmp_path, {FILE.digest: "\n".join(json.dumps({"prompt": f"{number}?"}) for number in range(20))})
    with pytest.raises(InvalidArgument, match="has an answer") as raised:
        await place.write(prompts=FILE, mode="off", families=["given"])
    assert raised.value.field == "prompts"
    with pytest.raises(InvalidArgument) as raised:
        run_spec(families=["given"], mode="off")
    assert raised.value.field == "families"
