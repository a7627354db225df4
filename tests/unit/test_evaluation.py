"""What `foundry eval` measures: right answers, how sure they are, and the divergence from the whole document."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch

from foundry.errors import InvalidArgument, ShapeMismatch
from foundry.evaluation.divergence import divergences, greedy
from foundry.evaluation.questions import Question, read_questions
from foundry.evaluation.statistics import Estimate, Ratio, estimate
from foundry.identity import CartridgeBytes
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from tests.tiny import CLOCK, build_tiny_model

DOCUMENT = "The harbour is open again. The treaty was signed in the spring. The price of grain is twelve."
EXPECTING = Question([{"role": "user", "content": "What is open?"}], ("The harbour",))
MAX_TOKENS = 12


# Questions


def test_questions_are_read() -> None:
    conversation = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
    rows = [{"prompt": "What is open?", "expected": ["harbour", "port"], "id": 7}, {"prompt": conversation}]
    found = read_questions("\n\n".join(map(json.dumps, rows)), field="ask.jsonl")
    assert found == [
        Question([{"role": "user", "content": "What is open?"}], ("harbour", "port")),
        Question(conversation),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "ask.jsonl, line 3 is not JSON"),
        ('{"question": "What?"}', 'ask.jsonl, line 3 has no "prompt"'),
        ('{"prompt": "What?", "expected": "harbour"}', 'ask.jsonl, line 3 has an "expected"'),
        ('{"prompt": "What?", "expected": [12]}', 'ask.jsonl, line 3 has an "expected"'),
        # Would be in every answer.
        ('{"prompt": "What?", "expected": ["harbour", ""]}', 'ask.jsonl, line 3 has an "expected"'),
    ],
)
def test_a_bad_line_is_named(line: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as raised:
        read_questions(f'{{"prompt": "Who?"}}\n\n{line}\n', field="ask.jsonl")
    assert raised.value.field == "ask.jsonl"


def test_there_are_at_most_ten_thousand_questions() -> None:
    line = '{"prompt": "Who?"}\n'
    assert len(read_questions(line * 10_000, field="ask.jsonl")) == 10_000
    with pytest.raises(InvalidArgument, match="more than 10000"):
        read_questions(line * 10_001, field="ask.jsonl")


@pytest.mark.parametrize(
    ("answer", "right"),
    [("It is the HARBOUR, I think.", True), ("The harbor.", False), ("", False), ("Die große STRASSE", True)],
)
def test_an_answer_is_right_if_it_says_what_is_expected(answer: str, right: bool) -> None:
    assert Question([], ("the harbour", "straße")).is_right(answer) is right


def test_where_nothing_is_expected_nothing_is_right_or_wrong() -> None:
    assert Question([]).is_right("The harbour") is None


# Intervals


def test_intervals_cover_what_is_true() -> None:
    draw = random.Random(3)
    covered = 0
    for _ in range(60):
        found = estimate(Ratio([float(draw.random() < 0.6) for _ in range(50)], [1.0] * 50))
        covered += found.low <= 0.6 <= found.high
    # 57 would be 95 %; fewer than 50 come by chance once in a thousand times.
    assert covered >= 50


def test_an_interval_is_as_narrow_as_its_questions_are_many() -> None:
    few, many = (estimate(Ratio([1.0, 0.0, 1.0, 1.0] * times, [1.0] * 4 * times)) for times in (4, 64))
    assert few.value == many.value == 0.75
    assert 3 < (few.high - few.low) / (many.high - many.low) < 5


def test_estimates_are_the_same_again() -> None:
    ratio = Ratio([0.5, 2.0, 1.0], [3, 9, 4])
    assert estimate(ratio) == estimate(ratio)
    assert estimate(ratio).value == pytest.approx(3.5 / 16)


def test_longer_answers_count_more() -> None:
    """A mean over tokens, not over questions."""
    assert estimate(Ratio([10.0, 0.0], [1, 9])).value == 1.0


def test_differences_are_paired() -> None:
    hard = [float(number % 3 > 0) for number in range(30)]
    ones = [1.0] * 30
    same = estimate(Ratio(hard, ones), Ratio(hard, ones))
    assert same == Estimate(0.0, 0.0, 0.0)
    # One question of thirty more: the interval is far narrower than that of either share.
    better = [*hard[:-3], 1.0, *hard[-2:]]
    gained = estimate(Ratio(better, ones), Ratio(hard, ones))
    alone = estimate(Ratio(better, ones))
    assert gained.value == pytest.approx(1 / 30)
    assert gained.low == 0.0
    assert gained.high - gained.low < 0.5 * (alone.high - alone.low)


# The divergence


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def template(lm: FrozenLM) -> ChatTemplate:
    return ChatTemplate(lm.tokenizer, CLOCK)


@pytest.fixture(scope="module")
def cartridge(lm: FrozenLM) -> CartridgeBytes:
    spec = lm.spec
    noise = torch.randn(spec.kv_shape(9), generator=torch.Generator().manual_seed(5))
    return Cartridge(spec.header(9, 1, torch.float32), noise).to_bytes()


QUESTIONS = [EXPECTING, Question([{"role": "user", "content": "When was the treaty signed?"}])]


@torch.no_grad()
def dense_logprobs(lm: FrozenLM, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[N, V] in float64, of one forward over the whole sequence."""
    hidden = lm.packed_hidden([[*prompt, *answer[:-1]]], [None])
    return lm.logits(hidden[len(prompt) - 1 :]).double().log_softmax(-1)


@torch.no_grad()
def dense_greedy(lm: FrozenLM, prompt: list[int]) -> list[int]:
    answer: list[int] = []
    while len(answer) < MAX_TOKENS and not (answer and answer[-1] in lm.eos_ids):
        answer.append(int(lm.logits(lm.packed_hidden([[*prompt, *answer]], [None])[-1:]).argmax()))
    return answer


def test_kl_is_that_of_the_whole_distributions(lm: FrozenLM, template: ChatTemplate) -> None:
    cut = DOCUMENT[:26]
    students = [None, DOCUMENT, cut]
    found = list(divergences(lm, template, DOCUMENT, students, QUESTIONS, max_tokens=MAX_TOKENS))
    for question, (none, whole, behind_cut) in zip(QUESTIONS, found, strict=True):
        turn = template.turn(question.messages)
        teacher_prompt = [*template.context(DOCUMENT), *turn]
        answer = dense_greedy(lm, teacher_prompt)
        teacher = dense_logprobs(lm, teacher_prompt, answer)
        for divergence, prompt in (
            (none, template.prompt(question.messages)),
            (behind_cut, [*template.context(cut), *turn]),
        ):
            student = dense_logprobs(lm, prompt, answer)
            expected = (teacher.exp() * (teacher - student)).sum().item()
            assert divergence.num_tokens == len(answer)
            assert divergence.kl_sum / len(answer) == pytest.approx(expected / len(answer), abs=1e-5)
            assert expected > 0.1
        assert abs(whole.kl_sum) < 1e-6


def test_kl_of_a_cartridge_is_that_of_its_own_keys_and_values(
    lm: FrozenLM, template: ChatTemplate, cartridge: CartridgeBytes
) -> None:
    context = template.context(DOCUMENT)
    itself = Cartridge(lm.spec.header(len(context), 1, torch.float32), lm.prefill(context)).to_bytes()
    found = list(divergences(lm, template, DOCUMENT, [itself, cartridge], QUESTIONS, max_tokens=MAX_TOKENS))
    for as_document, noise in found:
        assert abs(as_document.kl_sum) < 1e-6
        assert noise.kl_sum / noise.num_tokens > 0.1


def test_a_cartridge_of_another_model_is_refused(
    lm: FrozenLM, template: ChatTemplate, cartridge: CartridgeBytes
) -> None:
    other = CartridgeBytes(replace(cartridge.header, model_fingerprint="blake3:" + "0" * 64), cartridge.data)
    with pytest.raises(ShapeMismatch, match="model_fingerprint"):
        list(divergences(lm, template, DOCUMENT, [other], QUESTIONS, max_tokens=MAX_TOKENS))


def test_an_answer_ends_with_its_end_of_sequence(
    lm: FrozenLM, template: ChatTemplate, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, turn = lm.prefill(template.context(DOCUMENT)), template.turn(QUESTIONS[0].messages)
    answer = greedy(lm, context, turn, MAX_TOKENS)
    assert len(answer) == MAX_TOKENS
    end = answer[5]
    monkeypatch.setattr(lm, "eos_ids", frozenset([end]))
    assert greedy(lm, context, turn, MAX_TOKENS) == answer[: answer.index(end) + 1]
