"""The losses of context distillation: exact KLs over the full vocabulary, the top-k approximation, and likelihood.

All are means over the scored tokens, at temperature 1. Teacher and student share one frozen LM head, so hidden states
decide both distributions. `distill` multiplies them by the head in tiles of tokens and differentiates tile by tile:
whatever the number of tokens, at most one tile of logits exists at a time. What happens to a tile's logits takes many
passes over them. On CUDA it is compiled: few passes, without float32 copies. On a CPU it is done a few rows at a time.

Shape suffixes: N scored tokens, E hidden size, V vocabulary, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from foundry.errors import InvalidArgument
from foundry.identity import ObjectiveKind

# Numbers of one [tile, V] matrix. In float32 8 Mi are 32 MiB, of which an exact KL holds about six at a time.
_TILE_ELEMENTS = 8 * 1024 * 1024
# A product with fewer rows takes as long as reading the head. In bfloat16 these are 128 MiB, of which there are three.
_CUDA_TILE_ELEMENTS = 8 * _TILE_ELEMENTS
# Numbers of those rows of a tile that a CPU scores at a time: what is made of them stays in its cache.
_BLOCK_ELEMENTS = 512 * 1024


@dataclass(frozen=True, slots=True)
class Objective:
    """Which loss, and its parameter. Ranges are checked where a run is asked for."""

    kind: ObjectiveKind
    # jsd only, the teacher's weight in the mixture: 0 < beta < 1.
    beta: float = 0.5
    # topk only: how many of the teacher's most likely tokens are matched one by one.
    k: int = 20
    # Of the loss on tokens that are known to be right: how much is their likelihood (hard labels) beside what the
    # teacher says of them (soft labels), https://arxiv.org/abs/1503.02531.
    hard_label_weight: float = 0.0
    # The largest importance weight, of answers that an older version gave.
    importance_ratio_max: float = 2.0

    @property
    def needs_hidden(self) -> bool:
        """Whether the teacher has to send hidden states; otherwise its top k suffice."""
        return self.kind != "topk"


@dataclass(frozen=True, slots=True)
class TopK:
    """The teacher's most likely tokens at each scored position, and the log of the remaining mass."""

    ids_NK: Tensor
    logprobs_NK: Tensor
    tail_logprob_N: Tensor


@dataclass(frozen=True, slots=True)
class Distilled:
    """What one pass over the scored tokens gives; everything but `loss` is detached."""

    loss: Tensor
    token_loss_N: Tensor
    # The student's logprob of the token that stands at each position, and its entropy in nats.
    chosen_logprob_N: Tensor
    entropy_N: Tensor


def tile_rows(head_VE: Tensor, tile_elements: int | None = None) -> int:
    """Tokens whose logits [tile, V] are computed at a time."""
    elements = tile_elements or (_CUDA_TILE_ELEMENTS if head_VE.is_cuda else _TILE_ELEMENTS)
    return max(1, elements // head_VE.shape[0])


def forward_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """KL(teacher || student) [N]: the student must cover what the teacher finds likely."""
    return (teacher_logprobs_NV.exp() * (teacher_logprobs_NV - student_logprobs_NV)).sum(-1)


def reverse_kl(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor) -> Tensor:
    """KL(student || teacher) [N]: the student must avoid what the teacher finds unlikely."""
    return (student_logprobs_NV.exp() * (student_logprobs_NV - teacher_logprobs_NV)).sum(-1)


def jsd(student_logprobs_NV: Tensor, teacher_logprobs_NV: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence [N] of https://arxiv.org/abs/2306.13649, equation 4.

    beta KL(teacher || M) + (1 - beta) KL(student || M) with M = beta teacher + (1 - beta) student.
    """
    mixture_NV = torch.logaddexp(teacher_logprobs_NV + math.log(beta), student_logprobs_NV + math.log(1 - beta))
    return beta * forward_kl(mixture_NV, teacher_logprobs_NV) + (1 - beta) * forward_kl(mixture_NV, student_logprobs_NV)


def topk_kl(student_logprobs_NV: Tensor, topk: TopK) -> Tensor:
    """KL [N] between the top k plus one bucket that holds the rest of the vocabulary, teacher to student."""
    student_NK = student_logprobs_NV.gather(-1, topk.ids_NK)
    # log(1 - sum of the k), with the sum kept below 1 where rounding would take it past.
    student_tail_N = torch.log1p(-student_NK.logsumexp(-1).exp().clamp(max=1 - 1e-7))
    heads_N = (topk.logprobs_NK.exp() * (topk.logprobs_NK - student_NK)).sum(-1)
    # A teacher tail of no mass is log 0: its term is 0, not nan.
    tail_mass_N = topk.tail_logprob_N.exp()
    tails_N = torch.where(tail_mass_N > 0, tail_mass_N * (topk.tail_logprob_N - student_tail_N), 0.0)
    return heads_N + tails_N


def distill(
    objective: Objective,
    student_hidden_NE: Tensor,
    teacher: Tensor | TopK,
    head_VE: Tensor,
    token_ids_N: Tensor,
    verbatim_N: Tensor | None = None,
    weight_N: Tensor | None = None,
    *,
    tile_elements: int | None = None,
) -> Distilled:
    """Mean loss over N scored tokens; its gradient reaches `student_hidden_NE` only.

    `teacher` is hidden states [N, E] for the exact objectives and a TopK for `topk`; `token_ids_N` are the tokens at
    the scored positions, for `chosen_logprob_N`; `verbatim_N` says which of them are known to be right, by default
    none; `weight_N` multiplies the losses; `tile_elements` is for tests. The gradient is computed here, tile by tile,
    and handed to autograd as a ready vector. Raises InvalidArgument if the lengths differ.
    """
    num_tokens = student_hidden_NE.shape[0]
    teacher_rows = teacher.ids_NK.shape[0] if isinstance(teacher, TopK) else teacher.shape[0]
    if not num_tokens == teacher_rows == token_ids_N.shape[0] or num_tokens == 0:
        raise InvalidArgument(
            f"scored tokens do not line up: {num_tokens} student rows, {teacher_rows} teacher rows, "
            f"{token_ids_N.shape[0]} token ids"
        )
    rows = tile_rows(head_VE, tile_elements)
    hidden_NE = student_hidden_NE.detach()
    grad_NE = torch.empty_like(hidden_NE) if student_hidden_NE.requires_grad else None
    # Written in place: small results allocated between the tiles would leave holes that no later tile fits into.
    token_loss_N, chosen_N, entropy_N = torch.empty(3, num_tokens, device=hidden_NE.device)
    for begin in range(0, num_tokens, rows):
        tile = slice(begin, begin + rows)
        with torch.no_grad():
            logits_NV = F.linear(hidden_NE[tile], head_VE)
            tile_teacher = _tile_teacher(objective, teacher, tile, head_VE)
        for block in _blocks(logits_NV):
            scored = slice(begin + block.start, begin + block.stop)
            verbatim = None if verbatim_N is None else verbatim_N[scored]
            weight = None if weight_N is None else weight_N[scored]
            token_loss_N[scored], chosen_N[scored], entropy_N[scored] = _score_block(
                objective,
                logits_NV[block],
                _rows(tile_teacher, block),
                token_ids_N[scored],
                verbatim,
                weight,
                differentiate=grad_NE is not None,
            )
        if grad_NE is not None:
            torch.mm(logits_NV, head_VE, out=grad_NE[tile])
    mean = token_loss_N.mean()
    if grad_NE is not None:
        mean = _WithGradient.apply(student_hidden_NE, mean, grad_NE / num_tokens)  # type: ignore[no-untyped-call]
    return Distilled(mean, token_loss_N, chosen_N, entropy_N)


@torch.no_grad()
def _tile_teacher(objective: Objective, teacher: Tensor | TopK, tile: slice, head_VE: Tensor) -> Tensor | TopK | None:
    """The teacher's logits [N, V] of a tile or its TopK; nothing where the loss does not ask."""
    if objective.kind == "nll":
        return None
    if isinstance(teacher, TopK):
        return TopK(teacher.ids_NK[tile].long(), teacher.logprobs_NK[tile], teacher.tail_logprob_N[tile])
    return F.linear(teacher[tile], head_VE)


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    num_rows, vocab_size = logits_NV.shape
    step = num_rows if logits_NV.is_cuda else max(1, _BLOCK_ELEMENTS // vocab_size)
    return (slice(begin, min(begin + step, num_rows)) for begin in range(0, num_rows, step))


def _rows(teacher: Tensor | TopK | None, rows: slice) -> Tensor | TopK | None:
    if isinstance(teacher, TopK):
        return TopK(teacher.ids_NK[rows], teacher.logprobs_NK[rows], teacher.tail_logprob_N[rows])
    return None if teacher is None else teacher[rows]


def _score_block(
    objective: Objective,
    logits_NV: Tensor,
    teacher: Tensor | TopK | None,
    token_ids_N: Tensor,
    verbatim_N: Tensor | None,
    weight_N: Tensor | None,
    *,
    differentiate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `_scores`; with `differentiate` the sum of losses' gradient is left in the place of the logits."""
    scores_of = _compiled_scores() if logits_NV.is_cuda else _scores
    leaf_NV = logits_NV.detach().requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        loss_N, chosen_N, entropy_N = scores_of(objective, leaf_NV, teacher, token_ids_N, verbatim_N, weight_N)
    if differentiate:
        (grad_NV,) = torch.autograd.grad(loss_N.sum(), leaf_NV)
        logits_NV.copy_(grad_NV)
    return loss_N.detach(), chosen_N, entropy_N


def _scores(
    objective: Objective,
    logits_NV: Tensor,
    teacher: Tensor | TopK | None,
    token_ids_N: Tensor,
    verbatim_N: Tensor | None,
    weight_N: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a tile: losses, and detached logprobs of the tokens that stand there and entropies."""
    logprobs_NV = F.log_softmax(logits_NV.float(), dim=-1)
    chosen_N = logprobs_NV.gather(-1, token_ids_N[:, None]).squeeze(-1)
    loss_N = _losses(objective, logprobs_NV, teacher, chosen_N)
    if verbatim_N is not None:
        hard_N = objective.hard_label_weight * verbatim_N
        loss_N = (1 - hard_N) * loss_N - hard_N * chosen_N
    if weight_N is not None:
        loss_N = weight_N * loss_N
    fixed_NV = logprobs_NV.detach()
    return loss_N, chosen_N.detach(), -(fixed_NV.exp() * fixed_NV).sum(-1)


def _losses(objective: Objective, logprobs_NV: Tensor, teacher: Tensor | TopK | None, chosen_N: Tensor) -> Tensor:
    if teacher is None:
        return -chosen_N
    if isinstance(teacher, TopK):
        return topk_kl(logprobs_NV, teacher)
    teacher_logprobs_NV = F.log_softmax(teacher.float(), dim=-1)
    if objective.kind == "forward_kl":
        return forward_kl(logprobs_NV, teacher_logprobs_NV)
    if objective.kind == "reverse_kl":
        return reverse_kl(logprobs_NV, teacher_logprobs_NV)
    return jsd(logprobs_NV, teacher_logprobs_NV, objective.beta)


@cache
def _compiled_scores() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    # Not at import: it reads a compiler that a CPU has no use for.
    return torch.compile(_scores)


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to `hidden` is already known."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, hidden: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * upstream[0], None, None
