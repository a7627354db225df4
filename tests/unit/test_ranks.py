"""Several ranks: the numbers are those of one, to rounding; through torchrun and gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from services.trainer.ranks.group import RankMessage
from services.trainer.ranks.share import Share, share_out
from services.trainer.update.gradient import Batch
from tests.tiny import build_tiny_model
from tests.unit import ranks_steps
from tests.unit.ranks_steps import CASES
from tests.unit.test_packing import make_cartridge, make_samples, make_signals


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def lm(model: Path) -> FrozenLM:
    return FrozenLM.load(model)


@pytest.fixture(scope="module", params=[2, 3])
def by_ranks(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    results = tmp_path_factory.mktemp("ranks") / "results.safetensors"
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={request.param}"]
    subprocess.run(
        [*torchrun, "-m", "tests.unit.ranks_steps", str(model), str(results)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=200,
    )
    return load_file(results)


@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_what_one_does(lm: FrozenLM, by_ranks: Mapping[str, Tensor], case: str) -> None:
    alone = ranks_steps.run(lm, None, CASES[case])
    assert not torch.distributed.is_initialized()
    for name, expected in alone.items():
        # Float32, summed in another order.
        torch.testing.assert_close(by_ranks[f"{case}/{name}"], expected, atol=2e-5, rtol=1e-4)


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 8))
def test_shares_are_even_and_complete(num_tokens: list[int], num_ranks: int) -> None:
    shares = share_out(num_tokens, num_ranks)
    assert sorted(index for share in shares for index in share) == list(range(len(num_tokens)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(num_tokens[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(num_tokens, default=0)
    assert not num_tokens or shares[0], "rank 0 has nothing to do while others work"


def test_a_share_arrives_as_it_was_sent(lm: FrozenLM) -> None:
    samples = make_samples([(9, 14), (5, 2), (3, 1)])
    samples[2] = replace(samples[2], verbatim=True)
    signals = make_signals(lm, samples)
    objective = Objective("jsd", beta=0.3, hard_label_weight=0.2)
    sent = Share.of(make_cartridge(lm).header, Batch(samples, signals, objective, 99, 64), [2, 0])
    found = Share.from_message(RankMessage.from_bytes(sent.to_message().to_bytes()))
    batch = found.batch
    assert found.prefix == sent.prefix
    assert (batch.objective, batch.num_tokens, batch.micro_batch_tokens) == (objective, 99, 64)
    assert [(sample.turn_ids, sample.answer_ids, sample.verbatim) for sample in batch.samples] == [
        (samples[index].turn_ids, samples[index].answer_ids, index == 2) for index in (2, 0)
    ]
    for arrived, signal in zip(batch.signals, [signals[2], signals[0]], strict=True):
        assert isinstance(arrived, Tensor)
        assert isinstance(signal, Tensor)
        assert torch.equal(arrived, signal)
