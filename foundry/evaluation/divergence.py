"""How far a student's distributions are from those of the model that reads the whole document, token by token.

The measure of the trainer's held-out KL, computed in one process by the frozen model itself: exact over the vocabulary,
along the answers that the teacher gives greedily. Shape suffixes as in `foundry.model.lm`, N answer tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.evaluation.questions import Question
from foundry.identity import CartridgeBytes
from foundry.model.attention.prefill import PrefillAttention
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective, distill
from foundry.model.packing import scored_hidden
from foundry.model.template import ChatTemplate

# What stands before a student's turn: a cartridge, a text in the system turn, or nothing.
Student = CartridgeBytes | str | None
_MEASURE = Objective("forward_kl")


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of one answer of the teacher: KL(teacher || student), summed over its tokens, in nats, and their number."""

    kl_sum: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Answered:
    """A prompt and its answer, as `scored_hidden` takes them."""

    ids: list[int]
    score_from: int


@torch.no_grad()
def divergences(
    lm: FrozenLM,
    template: ChatTemplate,
    document: str,
    students: Sequence[Student],
    questions: Sequence[Question],
    *,
    max_tokens: int,
) -> Iterator[list[Divergence]]:
    """Question by question, that of every student from the model behind the whole document.

    Answers have at most `max_tokens`, end-of-sequence included. Raises DocumentTooLong or InvalidArgument where the
    model's context is too short, and ShapeMismatch for a cartridge of another model.
    """
    teacher_L2GPD = lm.prefill(template.context(document, max_tokens=lm.spec.max_tokens))
    prefixes = [teacher_L2GPD if student == document else _prefix(lm, template, student) for student in students]
    for question in questions:
        turn = template.turn(question.messages)
        answer = greedy(lm, teacher_L2GPD, turn, max_tokens)
        answer_N = torch.tensor(answer, device=lm.device)
        behind = _Answered([*turn, *answer], len(turn))
        (teacher_NE,) = scored_hidden(lm, [behind], [teacher_L2GPD])
        # Without anything before it the prompt has a beginning of its own: that of the template.
        prompt = template.prompt(question.messages)
        alone = _Answered([*prompt, *answer], len(prompt))
        found = []
        for prefix_L2GPD in prefixes:
            (student_NE,) = scored_hidden(lm, [alone if prefix_L2GPD is None else behind], [prefix_L2GPD])
            kl_N = distill(_MEASURE, student_NE, teacher_NE, lm.head_VE, answer_N).token_loss_N
            found.append(Divergence(kl_N.double().sum().item(), len(answer)))
        yield found


@torch.no_grad()
def greedy(lm: FrozenLM, context_L2GPD: Tensor, turn: Sequence[int], max_tokens: int) -> list[int]:
    """Ids of the likeliest answer, token by token, behind a context's KV; with the end-of-sequence that ends it."""
    begin = context_L2GPD.shape[3]
    room = context_L2GPD.new_empty(lm.spec.kv_shape(len(turn) + max_tokens))
    kv_L2GPD = torch.cat([context_L2GPD, room], dim=3)
    answer: list[int] = []
    fresh = list(turn)
    while len(answer) < max_tokens and not (answer and answer[-1] in lm.eos_ids):
        plan = PrefillAttention(kv_L2GPD, begin, len(fresh))
        hidden_TE = lm.hidden(torch.tensor(fresh, device=lm.device), plan.positions_T, plan)
        begin += len(fresh)
        fresh = [int(lm.logits(hidden_TE[-1:]).argmax())]
        answer += fresh
    return answer


def _prefix(lm: FrozenLM, template: ChatTemplate, student: Student) -> Tensor | None:
    """KV [L, 2, G, P, D] in the model's own numbers."""
    if student is None:
        return None
    if isinstance(student, str):
        return lm.prefill(template.context(student))
    lm.spec.check(student.header)
    return Cartridge.from_bytes(student, lm.device).kv_L2GPD.to(lm.dtype)
