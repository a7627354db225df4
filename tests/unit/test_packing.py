"""The training forward: packed equals single, and gradients go where they should and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.model.packing import fitting_tokens, kept_bytes_per_token, micro_batch_tokens
from services.trainer.sample import Sample
from services.trainer.update.gradient import Signal, distill_samples
from services.trainer.update.step import TrainingStep
from tests.tiny import build_tiny_model

FORWARD = Objective("forward_kl")
P = 12


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp(request.param), request.param))


def random_ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 380, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def make_samples(lengths: Sequence[tuple[int, int]]) -> list[Sample]:
    return [
        Sample(random_ids(turn, 10 + index), random_ids(answer, 50 + index), (), "", 0, truncated=False)
        for index, (turn, answer) in enumerate(lengths)
    ]


def make_signals(lm: FrozenLM, samples: Sequence[Sample]) -> list[Signal]:
    """The teacher: the same model behind a longer context."""
    context = lm.prefill(random_ids(60, 3))
    signals: list[Signal] = []
    for sample in samples:
        with torch.no_grad():
            hidden = lm.packed_hidden([sample.ids[:-1]], [context])
        signals.append(hidden[sample.score_from - 1 :])
    return signals


def make_cartridge(lm: FrozenLM, num_frozen: int = 1) -> TrainableCartridge:
    return TrainableCartridge(lm, lm.prefill(random_ids(P, 4)), num_frozen=num_frozen)


LENGTHS = [(9, 14), (3, 1), (17, 30), (1, 5)]


def test_packed_loss_is_the_sum_of_single_losses(lm: FrozenLM) -> None:
    samples = make_samples(LENGTHS)
    signals = make_signals(lm, samples)
    cartridge = make_cartridge(lm)
    packed = distill_samples(lm, cartridge.cast(), FORWARD, samples, signals)
    packed_grad = torch.autograd.grad(packed.loss * packed.token_loss_N.shape[0], cartridge.master_L2GRD)[0]
    total, grad = 0.0, torch.zeros_like(packed_grad)
    for sample, signal in zip(samples, signals, strict=True):
        single = distill_samples(lm, cartridge.cast(), FORWARD, [sample], [signal])
        loss = single.loss * len(sample.answer_ids)
        grad += torch.autograd.grad(loss, cartridge.master_L2GRD)[0]
        total += loss.item()
    assert packed.token_loss_N.sum().item() == pytest.approx(total, abs=1e-4)
    torch.testing.assert_close(packed_grad, grad, atol=1e-4, rtol=1e-4)


def test_changing_one_sequence_changes_no_other(lm: FrozenLM) -> None:
    samples = make_samples(LENGTHS)
    signals = make_signals(lm, samples)
    changed = list(samples)
    changed[1] = Sample(random_ids(4, 99), random_ids(1, 98), (), "", 0, truncated=False)

    def per_sample(batch: Sequence[Sample]) -> tuple[torch.Tensor, ...]:
        distilled = distill_samples(lm, make_cartridge(lm).cast(), FORWARD, batch, signals)
        return distilled.token_loss_N.split([len(sample.answer_ids) for sample in batch])

    def gradient_of(batch: Sequence[Sample], index: int) -> torch.Tensor:
        """Of one sample's loss, computed in the packed forward of all."""
        cartridge = make_cartridge(lm)
        sequences = [sample.ids[:-1] for sample in batch]
        hidden = lm.packed_hidden(sequences, [cartridge.cast()] * len(batch))
        rows = hidden.split([len(sequence) for sequence in sequences])[index]
        return torch.autograd.grad(rows.square().sum(), cartridge.master_L2GRD)[0]

    before, after = per_sample(samples), per_sample(changed)
    assert not torch.allclose(before[1], after[1], atol=1e-3)
    for index in (0, 2, 3):
        torch.testing.assert_close(before[index], after[index], atol=1e-5, rtol=0)
        torch.testing.assert_close(gradient_of(samples, index), gradient_of(changed, index), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_frozen", [0, 1, 5])
def test_only_unfrozen_cartridge_tokens_get_gradient(lm: FrozenLM, num_frozen: int) -> None:
    samples = make_samples(LENGTHS)
    cartridge = make_cartridge(lm, num_frozen)
    before = cartridge.cast().detach().clone()
    step = TrainingStep(
        lm, cartridge, FORWARD, learning_rate=0.1, micro_batch_tokens=10_000, policy_mismatch_threshold=float("inf")
    )
    proven = [with_own_logprobs(lm, cartridge, sample) for sample in samples]
    step.run(proven, make_signals(lm, samples), prove_policy=True)
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    moved = (cartridge.cast().detach() != before).flatten(0, 2).any(dim=0).any(dim=-1)
    assert moved.tolist() == [False] * num_frozen + [True] * (P - num_frozen)


def with_own_logprobs(lm: FrozenLM, cartridge: TrainableCartridge, sample: Sample) -> Sample:
    with torch.no_grad():
        hidden = lm.packed_hidden([sample.ids[:-1]], [cartridge.cast()])[sample.score_from - 1 :]
    logprobs = lm.logits(hidden).log_softmax(-1).gather(-1, torch.tensor(sample.answer_ids)[:, None]).squeeze(-1)
    return Sample(sample.turn_ids, sample.answer_ids, logprobs.tolist(), "", 0, truncated=False)


def test_gradient_agrees_with_finite_differences(lm: FrozenLM) -> None:
    samples = make_samples(LENGTHS)
    signals = make_signals(lm, samples)
    cartridge = make_cartridge(lm)

    def loss() -> torch.Tensor:
        return distill_samples(lm, cartridge.cast(), FORWARD, samples, signals).loss

    grad = torch.autograd.grad(loss(), cartridge.master_L2GRD)[0]
    direction = torch.randn(grad.shape, generator=torch.Generator().manual_seed(0))
    direction = 0.5 * direction / direction.norm() + 0.5 * grad / grad.norm()
    step = 0.02
    with torch.no_grad():
        cartridge.master_L2GRD += step * direction
        above = loss().item()
        cartridge.master_L2GRD -= 2 * step * direction
        below = loss().item()
    assert (above - below) / (2 * step) == pytest.approx((grad * direction).sum().item(), rel=0.02)


def test_micro_batches_give_the_same_step(lm: FrozenLM) -> None:
    samples = make_samples(LENGTHS)
    signals = make_signals(lm, samples)
    masters = []
    for max_tokens in (10_000, 20):
        cartridge = make_cartridge(lm)
        proven = [with_own_logprobs(lm, cartridge, sample) for sample in samples]
        step = TrainingStep(
            lm,
            cartridge,
            FORWARD,
            learning_rate=1e-2,
            micro_batch_tokens=max_tokens,
            policy_mismatch_threshold=1e-6,
        )
        step.run(proven, signals, prove_policy=True)
        assert cartridge.master_L2GRD.grad is not None
        masters.append(cartridge.master_L2GRD.grad)
    torch.testing.assert_close(masters[0], masters[1], atol=1e-5, rtol=1e-4)


def test_free_memory_chooses_the_micro_batch(lm: FrozenLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of Llama-3.2-3B's shape: 61,440 bytes of a token in each of 28 layers."""
    config = SimpleNamespace(num_attention_heads=24, intermediate_size=8192)
    large: Any = SimpleNamespace(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config)),
        spec=SimpleNamespace(num_layers=28, num_kv_heads=8, head_dim=128, hidden_size=3072),
    )
    assert kept_bytes_per_token(large) == 28 * 61_440
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10**9)

    def chosen(free_bytes: float, beside_bytes: int = 0) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_bytes), 0))
        return micro_batch_tokens(large, fitting_tokens(large, beside_bytes))

    assert chosen(100e9) == 4608
    assert chosen(3e9) == int(0.8 * 5e9) // 1_720_320
    assert chosen(3e9, 10**9) == (int(0.8 * 5e9) - 10**9) // 1_720_320
    assert chosen(0, 10**10) == 1
    assert micro_batch_tokens(lm, fitting_tokens(lm, 10**18)) == 4096
