"""The program of test_ranks.py: a few updates, by one rank or by all that torchrun has started.

torchrun -m tests.unit.ranks_steps MODEL RESULTS
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from foundry.errors import InvalidArgument, PolicyMismatch, ShapeMismatch
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective, TopK
from services.trainer.ranks.follower import follow
from services.trainer.ranks.group import Group, Rank
from services.trainer.ranks.leader import Leader
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal
from services.trainer.update.step import TrainingStep, Update
from tests.unit.test_packing import FORWARD, make_cartridge, make_samples, make_signals, with_own_logprobs

TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    # Tokens of turn and answer, of each sample.
    lengths: Sequence[tuple[int, int]]
    objective: Objective = FORWARD
    micro_batch_tokens: int = 4096


CASES = {
    "uneven": Case([(9, 14), (3, 1), (17, 30), (1, 5), (4, 4), (2, 21), (8, 3)]),
    "fewer samples than ranks": Case([(5, 9)]),
    "micro-batches": Case([(9, 14), (3, 11), (17, 30), (1, 5), (4, 4)], micro_batch_tokens=20),
    "topk": Case([(9, 14), (3, 1), (1, 5)], Objective("topk", k=4)),
}


def make_step(lm: FrozenLM, leader: Leader | None, case: Case) -> TrainingStep:
    return TrainingStep(
        lm,
        make_cartridge(lm),
        case.objective,
        learning_rate=0.02,
        micro_batch_tokens=case.micro_batch_tokens,
        policy_mismatch_threshold=1e-6,
        leader=leader,
    )


def signals_of(lm: FrozenLM, samples: Sequence[Sample], objective: Objective) -> list[Signal]:
    hidden = make_signals(lm, samples)
    if objective.needs_hidden:
        return hidden
    tops = []
    for hidden_NE in hidden:
        assert isinstance(hidden_NE, Tensor)
        logprobs_NK, ids_NK = lm.logits(hidden_NE).log_softmax(-1).topk(objective.k)
        tops.append(TopK(ids_NK, logprobs_NK, torch.log1p(-logprobs_NK.exp().sum(-1))))
    return list(tops)


def run(lm: FrozenLM, leader: Leader | None, case: Case) -> dict[str, Tensor]:
    """Two updates, and a third whose samples are stale."""
    step = make_step(lm, leader, case)
    found: dict[str, Tensor] = {}
    for index in range(2):
        samples = [with_own_logprobs(lm, step.cartridge, sample) for sample in make_samples(case.lengths)]
        signals = signals_of(lm, samples, case.objective)
        update: Update = step.run(samples, signals, prove_policy=True)
        assert update.proof is not None
        assert update.num_tokens == sum(answer for _, answer in case.lengths)
        found[f"update {index}"] = torch.tensor(
            [update.loss, update.entropy, update.grad_norm, update.proof.total.kl, update.proof.total.largest]
        )
        assert step.cartridge.master_L2GRD.grad is not None
        found[f"gradient {index}"] = step.cartridge.master_L2GRD.grad
        found[f"version {index}"] = step.cartridge.cast().detach()
    # Answers of the version before.
    older, claimed = step.cartridge.snapshot(), [with_own_logprobs(lm, step.cartridge, sample) for sample in samples]
    step.run(claimed, signals, prove_policy=True)
    update = step.run(claimed, signals, prove_policy=True, claimed=older)
    assert update.proof is not None
    assert update.importance is not None
    found["older"] = torch.tensor([update.loss, update.proof.total.kl, update.importance.mean_weight])
    assert step.cartridge.master_L2GRD.grad is not None
    found["older gradient"] = step.cartridge.master_L2GRD.grad
    found["newest"] = step.cartridge.cast().detach()
    # One token of one sample, on whatever rank it is computed.
    for index in range(len(samples)):
        fresh = [with_own_logprobs(lm, step.cartridge, sample) for sample in samples]
        first, *others = fresh[index].rollout_logprobs
        fresh[index] = replace(fresh[index], rollout_logprobs=[first - 0.5, *others])
        with pytest.raises(PolicyMismatch):
            step.run(fresh, signals, prove_policy=True)
        assert torch.equal(step.cartridge.cast(), found["newest"])
    return found


def fail_in_turn(lm: FrozenLM, leader: Leader) -> None:
    """Whoever fails, the next step is computed as if nothing had been."""
    case = CASES["uneven"]
    stranger = make_step(lm, leader, case)
    stranger.cartridge.header = replace(stranger.cartridge.header, model_fingerprint="blake3:" + "1" * 64)
    samples = [with_own_logprobs(lm, stranger.cartridge, sample) for sample in make_samples(case.lengths)]
    signals = signals_of(lm, samples, case.objective)
    with pytest.raises(ShapeMismatch, match="rank 1: cartridge is not for this model: model_fingerprint"):
        stranger.run(samples, signals, prove_policy=True)
    # The longest sample is rank 0's.
    samples[0] = Sample(samples[0].turn_ids, [5] * 600, [-1.0] * 600, "", 0, truncated=False)
    with pytest.raises(InvalidArgument, match=r"^sequence 0 has"):
        make_step(lm, leader, case).run(samples, signals, prove_policy=True)


def main() -> None:
    torch.set_num_threads(1)
    rank, lm = Rank.of_process(), FrozenLM.load(Path(sys.argv[1]))
    group = Group(rank, lm.device, TIMEOUT_SECONDS)
    if not rank.leads:
        raise SystemExit(follow(lm, group))
    leader = Leader(group)
    fail_in_turn(lm, leader)
    found = {name: run(lm, leader, case) for name, case in CASES.items()}
    again = run(lm, leader, CASES["uneven"])
    assert all(torch.equal(found["uneven"][name], tensor) for name, tensor in again.items()), "not the same bits again"
    save_file(
        {f"{case}/{name}": tensor.contiguous() for case, tensors in found.items() for name, tensor in tensors.items()},
        sys.argv[2],
    )
    leader.end(0)


if __name__ == "__main__":
    main()
