"""Prompts: read, split, ordered; and the questions that a model writes about a document."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from foundry.errors import InvalidArgument
from foundry.model.template import ChatTemplate
from foundry.rpc.rollout import Answer, Prompt
from foundry.seeds import derive_seed
from foundry.selfstudy.passages import pieces
from foundry.selfstudy.prompts import read_prompts
from foundry.selfstudy.questions import SEEDS, write_prompts
from services.trainer.curriculum import MAX_HELDOUT, Curriculum, HeldOut, Written, hold_out
from tests.tiny import CLOCK, build_tiny_model

DOCUMENT = Path(__file__).parents[2] / "examples" / "handbook.md"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(build_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    return ChatTemplate(tokenizer, CLOCK)


@given(num_turns=st.integers(1, 30), batch_size=st.integers(1, 20), seed=st.integers(0, 9))
def test_every_prompt_comes_once_an_epoch(num_turns: int, batch_size: int, seed: int) -> None:
    curriculum = Curriculum([[turn] for turn in range(num_turns)], [])
    asked = [turn[0] for step in range(3 * num_turns) for turn in curriculum.batch(step, batch_size, seed)]
    for epoch in range(len(asked) // num_turns):
        assert sorted(asked[epoch * num_turns : (epoch + 1) * num_turns]) == list(range(num_turns))


def test_order_depends_on_seed_and_epoch() -> None:
    curriculum = Curriculum([[turn] for turn in range(50)], [])
    first = curriculum.batch(0, 50, seed=0)
    assert first != curriculum.batch(1, 50, seed=0)
    assert first != curriculum.batch(0, 50, seed=1)
    assert first == curriculum.batch(0, 50, seed=0)


@given(num_turns=st.integers(1, 30), batch_size=st.integers(1, 80), seed=st.integers(0, 9), step=st.integers(0, 9))
def test_the_order_is_that_of_runs_before(num_turns: int, batch_size: int, seed: int, step: int) -> None:
    """Resumed runs, and their digests, rest on it."""
    asked = []
    for cursor in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(cursor, num_turns)
        order = list(range(num_turns))
        random.Random(derive_seed(seed, "epoch", epoch)).shuffle(order)
        asked.append([order[place]])
    assert Curriculum([[turn] for turn in range(num_turns)], []).batch(step, batch_size, seed) == asked


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled: list[int] = []
    shuffle = random.Random.shuffle

    def counted(self: random.Random, values: list[int]) -> None:
        shuffled.append(len(values))
        shuffle(self, values)

    monkeypatch.setattr(random.Random, "shuffle", counted)
    curriculum = Curriculum([[turn] for turn in range(101)], [])
    for step in range(20):
        curriculum.batch(step, 10, seed=77)
    assert shuffled == [101, 101], "200 prompts, which are two epochs"


@pytest.mark.parametrize(
    ("num_turns", "num_heldout"), [(1, 0), (5, 2), (8, 4), (100, 12), (512, 64), (2184, MAX_HELDOUT), (100_000, 64)]
)
def test_some_prompts_are_held_out_but_not_ever_more(num_turns: int, num_heldout: int) -> None:
    turns = [[turn] for turn in range(num_turns)]
    training, heldout = hold_out(turns)
    assert len(heldout) == num_heldout
    assert [*heldout, *training] == turns


def test_a_step_has_as_many_of_each_family() -> None:
    written = [Written([number], [1], "recite") for number in range(5)]
    written += [Written([number], [1], "cloze") for number in range(100, 130)]
    curriculum = Curriculum([], [], written)
    batches = [curriculum.written_batch(step, 7, seed=3) for step in range(10)]
    for batch in batches:
        assert sorted(item.family for item in batch) == ["cloze"] * 3 + ["recite"] * 4
    # Each family goes through its own epochs.
    completed = [item.turn_ids[0] for batch in batches for item in batch if item.family == "cloze"]
    assert sorted(completed) == list(range(100, 130))
    recited = [item.turn_ids[0] for batch in batches for item in batch if item.family == "recite"]
    assert all(sorted(recited[begin : begin + 5]) == list(range(5)) for begin in range(0, 40, 5))
    assert batches == [curriculum.written_batch(step, 7, seed=3) for step in range(10)]
    assert curriculum.written_batch(0, 7, seed=4) != batches[0]
    assert Curriculum.from_json(curriculum.to_json()).written_batch(3, 7, seed=3) == batches[3]


def test_curriculum_survives_its_store() -> None:
    curriculum = Curriculum([[1, 2], [3]], [HeldOut([4], [5, 6])])
    assert Curriculum.from_json(curriculum.to_json()) == curriculum


def test_prompts_file() -> None:
    rows = [
        {"prompt": "What is open?", "expected": ["harbour"]},
        {"prompt": [{"role": "user", "content": "What is open?"}]},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    assert read_prompts(text, field="prompts") == [[{"role": "user", "content": "What is open?"}]] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompts has no prompts"),
        ('{"prompt": "a"}\nnot json', "line 2 is not JSON"),
        ('{"prompt": []}', 'line 1 has no "prompt"'),
        ('{"prompt": [{"role": "user"}]}', 'line 1 has no "prompt"'),
        ("[1]", 'line 1 has no "prompt"'),
    ],
)
def test_bad_prompts_files_name_the_line(text: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        read_prompts(text, field="prompts")


@pytest.mark.parametrize("chunk_tokens", [16, 100, 100_000])
def test_chunks_are_the_document(tokenizer: PreTrainedTokenizerBase, chunk_tokens: int) -> None:
    document = DOCUMENT.read_text()
    chunks = pieces(document, tokenizer, chunk_tokens)
    assert "".join("".join(chunks).split()) == "".join(document.split())
    assert all(chunk.strip() for chunk in chunks)
    longest = max(len(tokenizer(chunk)["input_ids"]) for chunk in chunks)
    assert longest <= max(chunk_tokens, 200)


class Echo:
    """Answers each prompt with a question of its own, or always with the same."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str = "") -> None:
        self.tokenizer, self.text = tokenizer, text
        self.prompts: list[str] = []

    async def __call__(self, prompts: Sequence[Prompt]) -> list[Answer]:
        self.prompts += [str(self.tokenizer.decode(list(prompt.ids))) for prompt in prompts]
        return [Answer([1], [0.0], self.text or f'"What is number {prompt.seed}?"\nmore', False) for prompt in prompts]


async def ignore(done: int) -> None:
    """Nobody watches."""


async def write(document: str, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, ask: Echo) -> list[str]:
    return await write_prompts(
        document, template, tokenizer, ask, num_prompts=40, chunk_tokens=60, seed=3, progress=ignore
    )


async def test_self_study_asks_about_every_chunk(template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
    document = "".join(f"Fact {number} is that the grain of kind {number} is cheap. " for number in range(12))
    ask = Echo(tokenizer)
    questions = await write(document, template, tokenizer, ask)
    assert len(set(questions)) == len(questions) == 40
    assert all(question.startswith("What is number") and question.endswith("?") for question in questions)
    for chunk in pieces(document, tokenizer, 60):
        about = [prompt for prompt in ask.prompts if chunk in prompt]
        assert len(about) >= 2
        assert len({seed for seed, _ in SEEDS for prompt in about if prompt.rindex(seed) > prompt.rindex(chunk)}) >= 2
    again = Echo(tokenizer)
    assert await write(document, template, tokenizer, again) == questions


async def test_a_model_that_repeats_itself_is_an_error(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> None:
    ask = Echo(tokenizer, "What is it about?")
    with pytest.raises(InvalidArgument, match=r"wrote 1 different questions .* 40 were asked for"):
        await write("The harbour is open. " * 10, template, tokenizer, ask)
    assert len(ask.prompts) < 200
