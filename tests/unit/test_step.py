"""The proof: what was not decoded with this policy is never trained on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from foundry.errors import InvalidArgument, PolicyMismatch
from foundry.identity import ObjectiveKind
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.store import ManifestDraft
from foundry.store.names import CartridgeId
from services.trainer import checkpoint
from services.trainer.checkpoint import Best, Progress
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal, distill_samples
from services.trainer.update.heldout import MEASURE, HeldOutSet
from services.trainer.update.importance import Importance, importance_weights
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


def test_a_warm_up_leaves_nothing_behind(lm: FrozenLM) -> None:
    warmed, cold = make_step(lm), make_step(lm)
    for objective, stale in ((Objective("topk", k=5), False), (warmed.objective, True), (warmed.objective, False)):
        warmed.objective = objective
        warmed.warm_up(10_000, stale=stale)
    assert warmed.cartridge.master_L2GRD.grad is None
    samples = make_samples(LENGTHS)
    signals = make_signals(lm, samples)
    assert warmed.run(samples, signals, prove_policy=False) == cold.run(samples, signals, prove_policy=False)
    assert torch.equal(warmed.cartridge.master_L2GRD, cold.cartridge.master_L2GRD)


@pytest.mark.parametrize(("num_tokens", "samples"), [(100, [2]), (3000, [3, 2]), (36_864, [4, 3, 2])])
def test_what_no_micro_batch_of_the_run_needs_is_not_compiled(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch, num_tokens: int, samples: list[int]
) -> None:
    step, warmed = make_step(lm), []
    monkeypatch.setattr(step, "_backward", lambda lm, cartridge, batch: warmed.append(len(batch.samples)))
    step.warm_up(num_tokens)
    assert warmed == samples


def test_answers_of_another_version_are_refused_and_change_nothing(lm: FrozenLM) -> None:
    step = make_step(lm)
    samples = [with_own_logprobs(lm, step.cartridge, sample) for sample in make_samples(LENGTHS)]
    signals = make_signals(lm, samples)
    update = step.run(samples, signals, prove_policy=True)
    assert update.proof is not None
    assert update.proof.total.kl < 1e-9
    assert update.proof.total.largest < 1e-4
    # The cartridge has moved on: the same answers are stale now.
    before = step.cartridge.master_L2GRD.detach().clone()
    with pytest.raises(PolicyMismatch, match="nothing was trained"):
        step.run(samples, signals, prove_policy=True)
    assert torch.equal(step.cartridge.master_L2GRD, before)


def moved_on(lm: FrozenLM, threshold: float = 1e-8) -> tuple[TrainingStep, list[Sample], Cartridge]:
    """A step whose cartridge has been trained since an older version gave these answers; and that version."""
    step = make_step(lm, threshold)
    older = step.cartridge.snapshot()
    samples = [with_own_logprobs(lm, step.cartridge, sample) for sample in make_samples(LENGTHS)]
    step.run(samples, make_signals(lm, samples), prove_policy=True)
    return step, samples, older


def test_answers_of_an_older_version_are_proved_against_its_bytes(lm: FrozenLM) -> None:
    step, samples, older = moved_on(lm)
    signals, before = make_signals(lm, samples), step.cartridge.master_L2GRD.detach().clone()
    # They claim the older version and are the present one's, or another's.
    present = [with_own_logprobs(lm, step.cartridge, sample) for sample in samples]
    with pytest.raises(PolicyMismatch, match="nothing was trained"):
        step.run(present, signals, prove_policy=True, claimed=older)
    another = Cartridge(older.header, older.kv_L2GPD + 0.05)
    with pytest.raises(PolicyMismatch, match="nothing was trained"):
        step.run(samples, signals, prove_policy=True, claimed=another)
    assert torch.equal(step.cartridge.master_L2GRD, before)
    update = step.run(samples, signals, prove_policy=True, claimed=older)
    assert update.proof is not None
    assert update.proof.total.kl < 1e-9
    assert not torch.equal(step.cartridge.master_L2GRD, before)


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("micro_batch_tokens", [4096, 20])
def test_an_older_version_s_answers_count_as_much_as_they_are_likelier_now(
    lm: FrozenLM, objective: ObjectiveKind, micro_batch_tokens: int
) -> None:
    _, samples, older = moved_on(lm)
    step = make_step(lm)
    step.objective = Objective(objective, importance_ratio_max=1.05)
    step._micro_batch_tokens = micro_batch_tokens
    with torch.no_grad():
        step.cartridge.master_L2GRD += 0.02 * torch.randn(
            step.cartridge.master_L2GRD.shape, generator=torch.Generator().manual_seed(3)
        )
    signals = make_signals(lm, samples)
    plain = distill_samples(lm, step.cartridge.cast(), step.objective, samples, signals)
    claimed_N = torch.tensor([logprob for sample in samples for logprob in sample.rollout_logprobs])
    lengths = [len(sample.answer_ids) for sample in samples]
    weight_N = importance_weights(plain.chosen_logprob_N - claimed_N, lengths, 1.05)
    # By autograd over plain losses, one by one.
    losses = [
        weight * distill_samples(lm, step.cartridge.cast(), step.objective, [cut], [signal]).loss
        for cut, signal, weight in _one_by_one(samples, signals, weight_N)
    ]
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), step.cartridge.master_L2GRD)
    update = step.run(samples, signals, prove_policy=True, claimed=older)
    assert step.cartridge.master_L2GRD.grad is not None
    torch.testing.assert_close(step.cartridge.master_L2GRD.grad, expected, atol=1e-6, rtol=1e-3)
    assert update.importance is not None
    assert update.importance.mean_weight == pytest.approx(weight_N.mean().item(), rel=1e-4)
    assert 0 < update.importance.truncated < 1
    assert update.loss == pytest.approx((weight_N * plain.token_loss_N).mean().item(), rel=1e-4)


def _one_by_one(
    samples: Sequence[Sample], signals: Sequence[Signal], weight_N: Tensor
) -> Iterator[tuple[Sample, Tensor, float]]:
    """Each answer token with what stands before it as the turn, its signal and its weight."""
    weights = iter(weight_N.tolist())
    for sample, signal in zip(samples, signals, strict=True):
        assert isinstance(signal, Tensor)
        for place, token in enumerate(sample.answer_ids):
            turn = [*sample.turn_ids, *sample.answer_ids[:place]]
            yield replace(sample, turn_ids=turn, answer_ids=[token]), signal[place : place + 1], next(weights)


def test_importance_weights_are_those_computed_by_hand() -> None:
    now, then = torch.tensor([0.6, 0.2, 0.9, 0.4, 0.5, 0.3, 0.8]), torch.tensor([0.3, 0.4, 0.3, 0.9, 0.5, 0.6, 0.1])
    # What a token counts is decided by those before it in its own answer: products of 2, 1/2, 3 and of 1, 1/2.
    weight_N = importance_weights(now.log() - then.log(), [4, 3], 2.5)
    torch.testing.assert_close(weight_N, torch.tensor([1.0, 2.0, 1.0, 2.5, 1.0, 1.0, 0.5]))
    importance = Importance.of(now.log() - then.log(), [4, 3], 2.5)
    assert importance.mean_weight == pytest.approx(9 / 7)
    assert importance.truncated == pytest.approx(1 / 7)


def test_a_version_that_has_not_moved_weighs_nothing(lm: FrozenLM) -> None:
    plain, weighted = make_step(lm), make_step(lm)
    samples = [with_own_logprobs(lm, plain.cartridge, sample) for sample in make_samples(LENGTHS)]
    signals = make_signals(lm, samples)
    assert plain.run(samples, signals, prove_policy=True).importance is None
    update = weighted.run(samples, signals, prove_policy=True, claimed=weighted.cartridge.snapshot())
    assert update.importance == Importance(mean_weight=1.0, truncated=0.0)
    assert torch.equal(plain.cartridge.master_L2GRD, weighted.cartridge.master_L2GRD)


def test_logprobs_shifted_by_one_position_are_refused(lm: FrozenLM) -> None:
    step = make_step(lm)
    samples = [with_own_logprobs(lm, step.cartridge, sample) for sample in make_samples(LENGTHS)]
    logprobs = list(samples[2].rollout_logprobs)
    samples[2] = replace(samples[2], rollout_logprobs=[*logprobs[1:], logprobs[0]])
    with pytest.raises(PolicyMismatch):
        step.run(samples, make_signals(lm, samples), prove_policy=True)


def test_nan_logprobs_are_refused(lm: FrozenLM) -> None:
    step = make_step(lm)
    samples = [with_own_logprobs(lm, step.cartridge, sample) for sample in make_samples(LENGTHS)]
    samples[0] = replace(samples[0], rollout_logprobs=[float("nan")] * len(samples[0].answer_ids))
    with pytest.raises(PolicyMismatch):
        step.run(samples, make_signals(lm, samples), prove_policy=True)


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
        step.run(samples, signals, prove_policy=True)
    message = caught.value.message
    assert "1 of 3 rollout servers" in message
    assert "Rollout 10.0.0.1:7001 claimed version 5, blake3:555" in message
    assert "over 18 tokens, first in step 4, prompt 7" in message
    assert ("nan" if wrong == "nan" else "|log ratio| 0.05 ") in message
    assert "10.0.0.0" not in message
    assert torch.equal(step.cartridge.master_L2GRD, before)
    samples[7] = replace(samples[7], rollout_logprobs=honest)
    update = step.run(samples, signals, prove_policy=True)
    assert update.proof is not None
    assert {server: each.num_tokens for server, each in update.proof.by_server.items()} == {
        f"10.0.0.{index}:7001": 18 for index in range(3)
    }
    assert all(each.kl < 1e-9 for each in update.proof.by_server.values())


def test_only_a_source_that_says_so_is_trained_on_unproved(lm: FrozenLM) -> None:
    # As of a data set: nobody's logprobs.
    samples = make_samples(LENGTHS)
    signals = make_signals(lm, samples)
    step = make_step(lm)
    before = step.cartridge.master_L2GRD.detach().clone()
    update = step.run(samples, signals, prove_policy=False)
    assert update.proof is None
    assert not torch.equal(step.cartridge.master_L2GRD, before)
    # The gradient is the one that is proved where they are the policy's.
    proved = make_step(lm)
    own = [with_own_logprobs(lm, proved.cartridge, sample) for sample in samples]
    assert proved.run(own, signals, prove_policy=True).loss == update.loss
    assert torch.equal(proved.cartridge.master_L2GRD, step.cartridge.master_L2GRD)
    stranger = make_step(lm)
    with pytest.raises(PolicyMismatch):
        stranger.run(
            [replace(each, rollout_logprobs=[-1.0] * len(each.answer_ids)) for each in samples],
            signals,
            prove_policy=True,
        )
    assert torch.equal(stranger.cartridge.master_L2GRD, before)
    with pytest.raises(TypeError, match="prove_policy"):
        step.run(samples, signals)  # type: ignore[call-arg]


def test_heldout_measures_are_means_over_all_tokens_however_they_are_packed(
    lm: FrozenLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = make_samples(LENGTHS)
    signals = make_signals(lm, samples)
    cartridge = make_cartridge(lm)
    expected = distill_samples(lm, cartridge.cast(), MEASURE, samples, signals)
    forwards: list[int] = []
    packed_hidden = lm.packed_hidden

    def counted(*packed: Any, **options: Any) -> Tensor:
        forwards[-1] += 1
        return packed_hidden(*packed, **options)

    monkeypatch.setattr(lm, "packed_hidden", counted)
    for micro_batch_tokens in (4096, 30, 1):
        forwards.append(0)
        heldout = HeldOutSet(samples, micro_batch_tokens)
        heldout.signals = signals
        # Float32, summed in another order.
        found = heldout.distance(lm, cartridge)
        assert found.kl == pytest.approx(expected.loss.item(), rel=1e-5)
        assert found.nll == pytest.approx(-expected.chosen_logprob_N.mean().item(), rel=1e-5)
    assert forwards == [1, 3, len(samples)]


def test_the_documents_own_words_are_told_by_the_sample(lm: FrozenLM) -> None:
    samples = [replace(sample, verbatim=place % 2 == 0) for place, sample in enumerate(make_samples(LENGTHS))]
    signals, cartridge = make_signals(lm, samples), make_cartridge(lm)
    soft = distill_samples(lm, cartridge.cast(), MEASURE, samples, signals)
    hard = distill_samples(lm, cartridge.cast(), replace(MEASURE, hard_label_weight=1.0), samples, signals)
    verbatim_N = torch.tensor([sample.verbatim for sample in samples for _ in sample.answer_ids])
    expected_N = torch.where(verbatim_N, -soft.chosen_logprob_N, soft.token_loss_N)
    torch.testing.assert_close(hard.token_loss_N, expected_N)


def test_a_step_after_a_checkpoint_is_the_step_without_it(lm: FrozenLM) -> None:
    progress = Progress(
        *(2, CartridgeId("name", 3, "blake3:" + "0" * 64), 100, "config", "template", "blake3:" + "1" * 64, 1.5, 1.25),
        best=Best(CartridgeId("name", 2, "blake3:" + "2" * 64), 1, 1.0, 2.0),
        num_no_better=1,
    )
    straight, interrupted, resumed = make_step(lm), make_step(lm), make_step(lm)

    def train(step: TrainingStep) -> None:
        samples = [with_own_logprobs(lm, step.cartridge, sample) for sample in make_samples(LENGTHS)]
        step.run(samples, make_signals(lm, samples), prove_policy=True)

    for step in (straight, interrupted):
        train(step)
        train(step)
    content = checkpoint.write(progress, interrupted)
    assert checkpoint.read_older(content, resumed) == []
    assert checkpoint.read(content, resumed, config="config", template="template") == progress
    train(straight)
    train(resumed)
    assert torch.equal(straight.cartridge.cast(), resumed.cartridge.cast())
    with pytest.raises(InvalidArgument, match="of configuration config"):
        checkpoint.read(content, make_step(lm), config="another", template="template")
    with pytest.raises(InvalidArgument, match="another configuration: its chat template is template"):
        checkpoint.read(content, make_step(lm), config="config", template="another")


def test_a_checkpoint_keeps_the_older_versions_that_steps_in_flight_claim(lm: FrozenLM) -> None:
    progress = Progress(2, CartridgeId("name", 3, "blake3:" + "0" * 64), 100, "config", "template", "")
    step = make_step(lm)
    older = []
    for number in (0, 1):
        draft = ManifestDraft(name="name", run="run-a", attempt=1, step=number, metrics={"loss": 0.1 * number})
        older.append((draft, step.cartridge.snapshot().to_bytes()))
        with torch.no_grad():
            step.cartridge.master_L2GRD += 0.1
    found = checkpoint.read_older(checkpoint.write(progress, step, older), make_step(lm))
    assert [draft for draft, _ in found] == [draft for draft, _ in older]
    assert [stored.digest() for _, stored in found] == [stored.digest() for _, stored in older]


def test_a_checkpoint_of_another_release_is_refused(lm: FrozenLM) -> None:
    progress = asdict(Progress(2, CartridgeId("name", 3, "blake3:" + "0" * 64), 100, "config", "template", ""))
    del progress["dataset"]
    # What was asked was a tensor in it.
    content = save({"curriculum": torch.zeros(4)}, metadata={"progress": json.dumps(progress)})
    with pytest.raises(InvalidArgument, match="another release"):
        checkpoint.read(content, make_step(lm), config="config", template="template")
    # The best version had no likelihood.
    progress |= {"dataset": "", "best": {"policy": progress["policy"], "step": 1, "kl": 0.5}}
    content = save({"curriculum": torch.zeros(4)}, metadata={"progress": json.dumps(progress)})
    with pytest.raises(InvalidArgument, match="another release"):
        checkpoint.read(content, make_step(lm), config="config", template="template")
