"""Exact KLs against a dense reference written out term by term in float64."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from foundry.errors import InvalidArgument
from foundry.model.objectives import Objective, TopK, distill

N, E, V = 37, 16, 101
OBJECTIVES = [Objective("forward_kl"), Objective("reverse_kl"), Objective("jsd", beta=0.5), Objective("jsd", beta=0.1)]


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(N, E, generator=generator).requires_grad_()
    teacher = torch.randn(N, E, generator=generator)
    head = torch.randn(V, E, generator=generator)
    ids = torch.randint(V, (N,), generator=generator)
    return student, teacher, head, ids


def dense(objective: Objective, student: torch.Tensor, teacher: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Per-token losses from whole float64 probability tables."""
    q = torch.softmax(student.double() @ head.double().T, -1)
    p = torch.softmax(teacher.double() @ head.double().T, -1)
    if objective.kind == "forward_kl":
        return (p * torch.log(p / q)).sum(-1)
    if objective.kind == "reverse_kl":
        return (q * torch.log(q / p)).sum(-1)
    if objective.kind == "jsd":
        m = objective.beta * p + (1 - objective.beta) * q
        return (objective.beta * p * torch.log(p / m) + (1 - objective.beta) * q * torch.log(q / m)).sum(-1)
    top = p.topk(objective.k, -1)
    q_top = q.gather(-1, top.indices)
    p_tail, q_tail = 1 - top.values.sum(-1), 1 - q_top.sum(-1)
    return (top.values * torch.log(top.values / q_top)).sum(-1) + p_tail * torch.log(p_tail / q_tail)


@pytest.mark.parametrize("tile_elements", [1, V * 5, V * 1000])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_exact_objectives_equal_the_dense_reference(objective: Objective, tile_elements: int) -> None:
    student, teacher, head, ids = problem()
    distilled = distill(objective, student, teacher, head, ids, tile_elements=tile_elements)
    grad = torch.autograd.grad(distilled.loss, student)[0]
    expected = dense(objective, student, teacher, head)
    expected_grad = torch.autograd.grad(expected.mean(), student)[0]
    torch.testing.assert_close(distilled.token_loss_N.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(distilled.loss.double(), expected.mean(), atol=1e-5, rtol=0)
    torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 20, V - 1])
def test_topk_equals_the_dense_reference(k: int) -> None:
    student, teacher, head, ids = problem()
    objective = Objective("topk", k=k)
    logprobs = torch.log_softmax(teacher @ head.T, -1)
    top = logprobs.topk(k, -1)
    tail = logprobs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    distilled = distill(objective, student, TopK(top.indices, top.values, tail), head, ids, tile_elements=V * 5)
    grad = torch.autograd.grad(distilled.loss, student)[0]
    expected = dense(objective, student, teacher, head)
    expected_grad = torch.autograd.grad(expected.mean(), student)[0]
    torch.testing.assert_close(distilled.token_loss_N.double(), expected.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_hard_labels_count_where_tokens_are_known_to_be_right(weight: float, objective: Objective) -> None:
    student, teacher, head, ids = problem()
    verbatim = torch.arange(N) % 3 == 0
    objective = replace(objective, hard_label_weight=weight)
    distilled = distill(objective, student, teacher, head, ids, verbatim, tile_elements=V * 5)
    grad = torch.autograd.grad(distilled.loss, student)[0]
    likelihood = torch.log_softmax(student.double() @ head.double().T, -1)[torch.arange(N), ids]
    soft = dense(objective, student, teacher, head)
    expected = torch.where(verbatim, (1 - weight) * soft - weight * likelihood, soft)
    torch.testing.assert_close(distilled.token_loss_N.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.mean(), student)[0], atol=1e-5, rtol=0)


def test_equal_distributions_have_no_loss_and_no_gradient() -> None:
    student, _, head, ids = problem()
    for objective in OBJECTIVES:
        distilled = distill(objective, student, student.detach(), head, ids)
        assert distilled.loss.abs() < 1e-6
        assert torch.autograd.grad(distilled.loss, student)[0].abs().max() < 1e-6


def test_chosen_logprobs_and_entropy() -> None:
    student, teacher, head, ids = problem()
    distilled = distill(Objective("forward_kl"), student, teacher, head, ids, tile_elements=V * 5)
    logprobs = torch.log_softmax(student.detach() @ head.T, -1)
    torch.testing.assert_close(distilled.chosen_logprob_N, logprobs[torch.arange(N), ids], atol=1e-5, rtol=0)
    entropy = torch.distributions.Categorical(logits=logprobs).entropy()
    torch.testing.assert_close(distilled.entropy_N, entropy, atol=1e-5, rtol=0)


def test_rows_that_do_not_line_up_are_refused() -> None:
    student, teacher, head, ids = problem()
    with pytest.raises(InvalidArgument, match="37 student rows, 36 teacher rows"):
        distill(Objective("forward_kl"), student, teacher[1:], head, ids)


# Peak resident memory of a process that distils `tokens` tokens over a vocabulary of 50,000, in MiB.
MEASURE = """
import resource, sys, torch
from foundry.model.objectives import Objective, distill
tokens = int(sys.argv[1])
torch.set_num_threads(1)
student = torch.randn(tokens, 8, requires_grad=True)
head = torch.randn(50_000, 8)
ids = torch.zeros(tokens, dtype=torch.long)
distill(Objective("jsd"), student, torch.randn(tokens, 8), head, ids, tile_elements=2**20).loss.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    few, many = (
        int(subprocess.run([sys.executable, "-c", MEASURE, tokens], check=True, capture_output=True).stdout)
        for tokens in ("20", "1500")
    )
    # One [1500, 50000] float32 table alone would take 286 MiB more.
    assert many - few < 60
