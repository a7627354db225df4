"""Prompts: read, split, ordered; and the questions that a model writes about a document."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from foundry.errors import InvalidArgument
from foundry.model.template import ChatTemplate
from foundry.rpc.answers import Answer, Prompt
from foundry.selfstudy.general import GENERAL_PROMPTS
from foundry.selfstudy.passages import num_tokens, pieces
from foundry.selfstudy.prompts import read_lines, read_prompts
from foundry.selfstudy.questions import SEEDS, Questioner
from foundry.selfstudy.wording import jumbled, normalised
from foundry.store import RunSpec
from services.trainer.data.conversation import Conversation
from services.trainer.data.curriculum import Curriculum
from tests.conversations import conversation
from tests.store_data import run_spec
from tests.tiny import CLOCK, build_tiny_model

DOCUMENT = Path(__file__).parents[2] / "examples" / "handbook.md"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(build_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def template(tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    return ChatTemplate(tokenizer, CLOCK)


def curriculum(num_asked: int = 0, **written: int) -> Curriculum:
    """Conversations told apart by their turns; each family's begin at another hundred."""
    asked = [conversation([number]) for number in range(num_asked)]
    answered = [
        conversation([100 * place + number], [1], family=family)
        for place, (family, count) in enumerate(written.items(), start=1)
        for number in range(count)
    ]
    general = [conversation([9000 + number], [1], family="general") for number in range(5)]
    return Curriculum("", asked, answered, [], general)


def numbers(batch: Sequence[Conversation]) -> list[int]:
    return [each.turn_ids[0] for each in batch]


@given(num_turns=st.integers(1, 30), batch_size=st.integers(1, 20), seed=st.integers(0, 9))
def test_every_prompt_comes_once_an_epoch(num_turns: int, batch_size: int, seed: int) -> None:
    spec = run_spec(batch_size=batch_size, seed=seed)
    asks = curriculum(num_turns)
    asked = [number for step in range(3 * num_turns) for number in numbers(asks.asked_batch(step, spec))]
    for epoch in range(len(asked) // num_turns):
        assert sorted(asked[epoch * num_turns : (epoch + 1) * num_turns]) == list(range(num_turns))


def test_order_depends_on_seed_and_epoch() -> None:
    asks, spec = curriculum(50), run_spec(batch_size=50)
    first = asks.asked_batch(0, spec)
    assert first != asks.asked_batch(1, spec)
    assert first != asks.asked_batch(0, run_spec(batch_size=50, seed=1))
    assert first == asks.asked_batch(0, spec)


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled: list[int] = []
    shuffle = random.Random.shuffle

    def counted(self: random.Random, values: list[int]) -> None:
        shuffled.append(len(values))
        shuffle(self, values)

    monkeypatch.setattr(random.Random, "shuffle", counted)
    asks, spec = curriculum(101), run_spec(batch_size=10, seed=77)
    for step in range(20):
        asks.asked_batch(step, spec)
    assert shuffled == [101, 101], "200 prompts, which are two epochs"


def test_a_step_has_as_many_of_each_family() -> None:
    asks, spec = curriculum(recite=5, cloze=30), run_spec(batch_size=7, seed=3)
    batches = [asks.written_batch(step, spec) for step in range(10)]
    for batch in batches:
        assert sorted(item.family for item in batch) == ["cloze"] * 3 + ["recite"] * 4
    # Each family goes through its own epochs.
    completed = [number for batch in batches for number in numbers(batch) if number >= 200]
    assert sorted(completed) == list(range(200, 230))
    recited = [number for batch in batches for number in numbers(batch) if number < 200]
    assert all(sorted(recited[begin : begin + 5]) == list(range(100, 105)) for begin in range(0, 40, 5))
    assert batches == [asks.written_batch(step, spec) for step in range(10)]
    assert asks.written_batch(0, run_spec(batch_size=7, seed=4)) != batches[0]


@pytest.mark.parametrize("batch", [Curriculum.asked_batch, Curriculum.written_batch])
def test_general_prompts_have_their_share_of_all_steps(
    batch: Callable[[Curriculum, int, RunSpec], list[Conversation]],
) -> None:
    asks, spec = curriculum(10, recite=10), run_spec(batch_size=8, general_share=0.05)
    batches = [batch(asks, step, spec) for step in range(50)]
    assert {len(each) for each in batches} == {8}
    general = [number for each in batches for number in numbers(each) if number >= 9000]
    assert len(general) == 0.05 * 50 * 8
    assert set(general) == set(range(9000, 9005)), "some are never asked"
    assert not [
        each for step in range(50) for each in numbers(batch(asks, step, run_spec(batch_size=8))) if each >= 9000
    ]


def test_prompts_file() -> None:
    rows = [
        {"prompt": "What is open?", "expected": ["harbour"]},
        {"prompt": [{"role": "user", "content": "What is open?"}]},
        {"messages": [{"role": "user", "content": "What is open?"}]},
        {"messages": [{"role": "user", "content": "What is open?"}, {"role": "assistant", "content": "The harbour."}]},
        # A chat's answer is left out, a prompt's is part of it.
        {"prompt": [{"role": "user", "content": "What is open?"}], "messages": "ignored"},
    ]
    text = "\n".join(json.dumps(row) for row in rows) + "\n\n"
    assert read_prompts(text, field="prompts") == [[{"role": "user", "content": "What is open?"}]] * 5
    begun = [{"role": "user", "content": "What is open?"}, {"role": "assistant", "content": "The"}]
    assert read_prompts(json.dumps({"prompt": begun}), field="prompts") == [begun]


def test_a_line_says_which_document_it_is_about() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "document": "d"},
        {"prompt": "a", "extra_info": {"document": "d", "index": 3}},
        {"prompt": "a", "extra_info": "none"},
        {"prompt": "a"},
    ]
    lines = read_lines("\n".join(map(json.dumps, rows)), field="prompts")
    assert [line.document for line in lines] == ["d", "d", None, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompts has no prompts"),
        ('{"prompt": "a"}\nnot json', "line 2 is not JSON"),
        ('{"prompt": []}', 'line 1 has no "prompt"'),
        ('{"prompt": [{"role": "user"}]}', 'line 1 has no "prompt"'),
        ('{"prompt": [{"role": "evil", "content": "a"}]}', r'line 1 has no "prompt" .*"system\|user\|assistant"'),
        ("[1]", 'line 1 has no "prompt"'),
        ('{"messages": [{"role": "assistant"}]}', 'line 1 has no "prompt"'),
        ('{"messages": 1}', 'line 1 has no "prompt"'),
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


def questioner(document: str, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase) -> Questioner:
    return Questioner(document, template, tokenizer, num_questions=40, passage_tokens=60, seed=3)


async def test_self_study_asks_about_every_passage_by_its_length(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> None:
    document = "".join(f"Fact {number} is that the grain of kind {number} is cheap. " for number in range(12)) + "End."
    echo = Echo(tokenizer)
    asks = questioner(document, template, tokenizer)
    questions = [*await asks.ask(range(32), echo), *await asks.ask(range(32, 40), echo)]
    assert len({question.prompt for question in questions}) == 40
    assert all(each.prompt.startswith("What is number") and each.prompt.endswith("?") for each in questions)
    passages = pieces(document, tokenizer, 60)
    total = sum(num_tokens(passage, tokenizer) for passage in passages)
    for place, passage in enumerate(passages):
        about = [each for each in questions if each.passage == place]
        assert abs(len(about) - 40 * num_tokens(passage, tokenizer) / total) <= 1
        assert len({each.kind for each in about}) >= min(len(about), 4)
        assert {each.passage_tokens for each in about} <= {num_tokens(passage, tokenizer)}
    assert {each.kind for each in questions} == {seed.kind for seed in SEEDS}
    assert len({seed.kind for seed in SEEDS}) >= 6
    assert await questioner(document, template, tokenizer).ask(range(32), Echo(tokenizer)) == questions[:32]
    # Tries beyond the first sweep ask for another kind at the same place.
    again = await asks.ask(range(40, 80), echo)
    assert [each.passage for each in again] == [each.passage for each in questions]
    assert all(first.kind != second.kind for first, second in zip(questions, again, strict=True))


async def test_requests_that_the_model_has_no_room_for_are_not_made(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> None:
    document = (
        "The grain is cheap. " + "The harbour, which is open again, is " + "very " * 40 + "old. The ferry is late."
    )
    every = Echo(tokenizer)
    asked = await questioner(document, template, tokenizer).ask(range(40), every)
    lengths = sorted(len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in every.prompts)
    limited = Echo(tokenizer)
    asks = Questioner(
        document, template, tokenizer, num_questions=40, passage_tokens=60, seed=3, max_request_tokens=lengths[-1] - 1
    )
    found = await asks.ask(range(40), limited)
    assert 0 < len(limited.prompts) == len(found) < 40
    assert found == [each for each in asked if each in found]
    nothing = Questioner(
        document, template, tokenizer, num_questions=40, passage_tokens=60, seed=3, max_request_tokens=8
    )
    assert await nothing.ask(range(40), limited) == []
    assert len(limited.prompts) == len(found)


@pytest.mark.parametrize("text", ["", "  \n", "Why?", '**"'])
async def test_what_is_no_question_is_left_out(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    echo = Echo(tokenizer, text or " ")
    assert await questioner("The harbour is open.", template, tokenizer).ask(range(3), echo) == []


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("What is the price?", "  what IS the Price ", True),
        ("What is the price?", "What\u3000is, the “price”…", True),
        ("Où est le café ?", "OU\u0300 EST LE CAFE\u0301?", True),
        ("Ｗｈａｔ？", "what", True),
        ("价格是多少？", "价格是多少", True),
        ("What is the price?", "What is the price of it?", False),
        ("Is A before B?", "Is B before A?", False),
    ],
)
def test_wordings(first: str, second: str, same: bool) -> None:
    assert (normalised(first) == normalised(second)) == same


def test_near_duplicates_have_the_same_words() -> None:
    assert jumbled("What is the price of the grain?") == jumbled(
        "The grain: what is the price of it, of what?".replace("it, ", "")
    )
    assert jumbled("What is the price?") != jumbled("What is the place?")


def test_general_prompts_differ() -> None:
    assert len({normalised(prompt) for prompt in GENERAL_PROMPTS}) == len(GENERAL_PROMPTS) > 64
