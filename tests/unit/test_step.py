"""The proof: what was not decoded with this policy is never trained on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from foundry.errors import InvalidArgument, PolicyMismatch
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.store.names import CartridgeId
from services.trainer import checkpoint
from services.trainer.checkpoint import Progress
from services.trainer.curriculum import Curriculum, HeldOut
from services.trainer.update.step import TrainingStep
from tests.tiny import build_tiny_model
from tests.unit.test_packing import LENGTHS, make_cartridge, make_samples, make_signals, with_own_logprobs


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp("llama")))


def make_step(lm: FrozenLM, threshold: float = 1e-4) -> TrainingStep:
    return TrainingStep(
        lm,
        make_cartridge(lm),
        Objective("forward_kl"),
        learning_rate=0.02,
        micro_batch_tokens=4096,
        policy_mismatch_threshold=threshold,
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


@pytest.mark.parametrize("wrong", ["shifted", "nan"])
def test_one_lying_server_among_many_is_named(lm: FrozenLM, wrong: str) -> None:
    step = make_step(lm, threshold=5e-5)
    samples = [
        replace(
            with_own_logprobs(lm, step.cartridge, sample),
            server=f"10.0.0.{index % 3}:7001",
            place=f"step 4, prompt {index}",
            digest="blake3:" + "5" * 64,
            version=5,
        )
        for index, sample in enumerate(make_samples([(3, 6)] * 9))
    ]
    honest = samples[7].rollout_logprobs
    lie = [honest[0] - 0.05, *honest[1:]] if wrong == "shifted" else [float("nan"), *honest[1:]]
    samples[7] = replace(samples[7], rollout_logprobs=lie)
    before = step.cartridge.master_L2GRD.detach().clone()
    signals = make_signals(lm, samples)
    with pytest.raises(PolicyMismatch) as caught:
        # A twentieth of a nat on one token of 54: over all servers together it would not be seen.
        step.run(samples, signals)
    message = caught.value.message
    assert "1 of 3 rollout servers" in message
    assert "Rollout 10.0.0.1:7001 claimed version 5, blake3:555" in message
    assert "over 18 tokens, first in step 4, prompt 7" in message
    assert ("nan" if wrong == "nan" else "|log ratio| 0.05 ") in message
    assert "10.0.0.0" not in message
    assert torch.equal(step.cartridge.master_L2GRD, before)
    samples[7] = replace(samples[7], rollout_logprobs=honest)
    update = step.run(samples, signals)
    assert {server: each.num_tokens for server, each in update.mismatch_by_server.items()} == {
        f"10.0.0.{index}:7001": 18 for index in range(3)
    }
    assert all(each.kl < 1e-9 for each in update.mismatch_by_server.values())


def test_a_step_after_a_checkpoint_is_the_step_without_it(lm: FrozenLM) -> None:
    progress = Progress(2, CartridgeId("name", 3, "blake3:" + "0" * 64), 100, "config", "template", 1.5, 1.25)
    straight, interrupted, resumed = make_step(lm), make_step(lm), make_step(lm)

    def train(step: TrainingStep) -> None:
        samples = [with_own_logprobs(lm, step.cartridge, sample) for sample in make_samples(LENGTHS)]
        step.run(samples, make_signals(lm, samples))

    for step in (straight, interrupted):
        train(step)
        train(step)
    curriculum = Curriculum([[5, 6], [7]], [HeldOut([8], [9, 10])])
    content = checkpoint.write(progress, curriculum, interrupted)
    assert checkpoint.read(content, resumed, config="config", template="template") == (progress, curriculum)
    # An older release's, which names no template.
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    values = json.loads(header["__metadata__"]["progress"])
    del values["template"]
    header["__metadata__"]["progress"] = json.dumps(values)
    older = json.dumps(header).encode()
    older = len(older).to_bytes(8, "little") + older + content[8 + length :]
    assert checkpoint.read(older, make_step(lm), config="config", template="template")[0] == progress
    train(straight)
    train(resumed)
    assert torch.equal(straight.cartridge.cast(), resumed.cartridge.cast())
    with pytest.raises(InvalidArgument, match="of configuration config"):
        checkpoint.read(content, make_step(lm), config="another", template="template")
    with pytest.raises(InvalidArgument, match="another configuration: its chat template is template"):
        checkpoint.read(content, make_step(lm), config="config", template="another")
