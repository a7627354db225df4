"""The proof: what was not decoded with this policy is never trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from foundry.errors import InvalidArgument, PolicyMismatch
from foundry.lm import FrozenLM
from foundry.objectives import Objective
from foundry.store.names import CartridgeId
from services.trainer import checkpoint
from services.trainer.checkpoint import Progress
from services.trainer.curriculum import Curriculum, HeldOut
from services.trainer.step import TrainingStep
from tests.tiny import build_tiny_model
from tests.unit.test_packing import LENGTHS, make_cartridge, make_samples, make_signals, with_own_logprobs


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp("llama")))


def make_step(lm: FrozenLM) -> TrainingStep:
    return TrainingStep(
        lm,
        make_cartridge(lm),
        Objective("forward_kl"),
        learning_rate=0.02,
        micro_batch_tokens=4096,
        policy_mismatch_threshold=1e-4,
    )


def test_answers_of_another_version_are_refused_and_change_nothing(lm: FrozenLM) -> None:
    step = make_step(lm)
    samples = [with_own_logprobs(lm, step.cartridge, sample) for sample in make_samples(LENGTHS)]
    signals = make_signals(lm, samples)
    update = step.run(samples, signals)
    assert update.policy_mismatch_kl < 1e-9
    assert update.policy_mismatch_max < 1e-4
    # The cartridge has moved on: the same answers are stale now.
    before = step.cartridge.master_L2GRD.detach().clone()
    with pytest.raises(PolicyMismatch, match="nothing was trained"):
        step.run(samples, signals)
    assert torch.equal(step.cartridge.master_L2GRD, before)


def test_logprobs_shifted_by_one_position_are_refused(lm: FrozenLM) -> None:
    step = make_step(lm)
    samples = [with_own_logprobs(lm, step.cartridge, sample) for sample in make_samples(LENGTHS)]
    logprobs = list(samples[2].rollout_logprobs)
    samples[2] = replace(samples[2], rollout_logprobs=[*logprobs[1:], logprobs[0]])
    with pytest.raises(PolicyMismatch):
        step.run(samples, make_signals(lm, samples))


def test_nan_logprobs_are_refused(lm: FrozenLM) -> None:
    step = make_step(lm)
    samples = [with_own_logprobs(lm, step.cartridge, sample) for sample in make_samples(LENGTHS)]
    samples[0] = replace(samples[0], rollout_logprobs=[float("nan")] * len(samples[0].answer_ids))
    with pytest.raises(PolicyMismatch):
        step.run(samples, make_signals(lm, samples))


def test_a_step_after_a_checkpoint_is_the_step_without_it(lm: FrozenLM) -> None:
    progress = Progress(2, CartridgeId("name", 3, "blake3:" + "0" * 64), 100, "config", 1.5, 1.25)
    straight, interrupted, resumed = make_step(lm), make_step(lm), make_step(lm)

    def train(step: TrainingStep) -> None:
        samples = [with_own_logprobs(lm, step.cartridge, sample) for sample in make_samples(LENGTHS)]
        step.run(samples, make_signals(lm, samples))

    for step in (straight, interrupted):
        train(step)
        train(step)
    curriculum = Curriculum([[5, 6], [7]], [HeldOut([8], [9, 10])])
    content = checkpoint.write(progress, curriculum, interrupted)
    assert checkpoint.read(content, resumed, config="config") == (progress, curriculum)
    train(straight)
    train(resumed)
    assert torch.equal(straight.cartridge.cast(), resumed.cartridge.cast())
    with pytest.raises(InvalidArgument, match="configuration"):
        checkpoint.read(content, make_step(lm), config="another")
