"""The losses of context distillation: exact KLs over the full vocabulary, the top-k approximation, and likelihood.

All are means over the scored tokens, at temperature 1. Teacher and student share one frozen LM head, so hidden states
decide both distributions. `distill` multiplies them by the head in tiles of tokens and differentiates tile by tile:
whatever the number of tokens, at most one tile of logits exists at a time.

Shape suffixes: N scored tokens, E hidden size, V vocabulary, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foundry.errors import InvalidArgument
from foundry.identity import ObjectiveKind

# Float32 values of one [tile, V] matrix: 8 Mi is 32 MiB, of which an exact KL holds about six at a time.
TILE_ELEMENTS = 8 * 1024 * 1024


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
    log_beta, log_rest = torch.log(torch.tensor([beta, 1 - beta], device=student_logprobs_NV.device))
    mixture_NV = torch.logaddexp(teacher_logprobs_NV + log_beta, student_logprobs_NV + log_rest)
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
    *,
    tile_elements: int = TILE_ELEMENTS,
) -> Distilled:
    """Mean loss over N scored tokens; its gradient reaches `student_hidden_NE` only.

    `teacher` is hidden states [N, E] for the exact objectives and a TopK for `topk`; `token_ids_N` are the tokens at
    the scored positions, for `chosen_logprob_N`; `verbatim_N` says which of them are known to be right, by default
    none. The gradient is computed here, tile by tile, and handed to autograd as a ready vector. Raises InvalidArgument
    if the lengths differ.
    """
    num_tokens = student_hidden_NE.shape[0]
    teacher_rows = teacher.ids_NK.shape[0] if isinstance(teacher, TopK) else teacher.shape[0]
    if not num_tokens == teacher_rows == token_ids_N.shape[0] or num_tokens == 0:
        raise InvalidArgument(
            f"scored tokens do not line up: {num_tokens} student rows, {teacher_rows} teacher rows, "
            f"{token_ids_N.shape[0]} token ids"
        )
    rows = max(1, tile_elements // head_VE.shape[0])
    hidden_NE = student_hidden_NE.detach()
    grad_NE = torch.empty_like(hidden_NE) if student_hidden_NE.requires_grad else None
    # Written in place: small results allocated between the tiles would leave holes that no later tile fits into.
    token_loss_N, chosen_N, entropy_N = torch.empty(3, num_tokens, device=hidden_NE.device)
    for begin in range(0, num_tokens, rows):
        tile = slice(begin, begin + rows)
        tile_hidden = hidden_NE[tile].requires_grad_(grad_NE is not None)
        with torch.set_grad_enabled(grad_NE is not None):
            logprobs = F.log_softmax(F.linear(tile_hidden, head_VE).float(), dim=-1)
            chosen = logprobs.gather(-1, token_ids_N[tile, None]).squeeze(-1)
            loss = -chosen if objective.kind == "nll" else _tile_loss(objective, logprobs, teacher, tile, head_VE)
            if verbatim_N is not None:
                weight_N = objective.hard_label_weight * verbatim_N[tile]
                loss = (1 - weight_N) * loss - weight_N * chosen
        if grad_NE is not None:
            (grad_NE[tile],) = torch.autograd.grad(loss.sum(), tile_hidden)
        with torch.no_grad():
            token_loss_N[tile] = loss
            chosen_N[tile] = chosen
            entropy_N[tile] = -(logprobs.exp() * logprobs).sum(-1)
    mean = token_loss_N.mean()
    if grad_NE is not None:
        mean = _WithGradient.apply(student_hidden_NE, mean, grad_NE / num_tokens)  # type: ignore[no-untyped-call]
    return Distilled(mean, token_loss_N, chosen_N, entropy_N)


def _tile_loss(objective: Objective, logprobs: Tensor, teacher: Tensor | TopK, tile: slice, head_VE: Tensor) -> Tensor:
    if isinstance(teacher, TopK):
        rows = TopK(teacher.ids_NK[tile].long(), teacher.logprobs_NK[tile], teacher.tail_logprob_N[tile])
        return topk_kl(logprobs, rows)
    with torch.no_grad():
        teacher_logprobs = F.log_softmax(F.linear(teacher[tile], head_VE).float(), dim=-1)
    if objective.kind == "forward_kl":
        return forward_kl(logprobs, teacher_logprobs)
    if objective.kind == "reverse_kl":
        return reverse_kl(logprobs, teacher_logprobs)
    return jsd(logprobs, teacher_logprobs, objective.beta)


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
