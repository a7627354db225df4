"""An engine on a tiny model, requests to it, and what plain forwards of the same model say."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from services.rollout.engine import SamplingParams, SequenceRequest, TokenOutput
from services.rollout.engine.torch.engine import TorchEngine

# The engine merges two parts of a softmax, the reference computes it in one.
TOLERANCE = 1e-4
CHUNK = 16
SIZES = (1, 15, 16, 17, 64)
Outputs = dict[int, list[TokenOutput]]


def make_kv(lm: FrozenLM, num_tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * num_tokens + seed)
    return torch.randn(lm.spec.kv_shape(num_tokens), generator=generator)


class Bench:
    """An engine, the cartridges in it by name, and what the model says without it."""

    def __init__(
        self, lm: FrozenLM, max_sequences: int = 8, max_sequence_tokens: int = 128, engine: Any = None
    ) -> None:
        self.lm = lm
        self.engine = engine or TorchEngine(
            lm,
            max_sequences=max_sequences,
            max_sequence_tokens=max_sequence_tokens,
            prefill_tokens_per_step=CHUNK,
        )
        self.kv: dict[str, Tensor] = {}

    def load(self, name: str, kv: Tensor) -> None:
        self.kv[name] = kv
        self.engine.load(name, Cartridge(self.lm.spec.header(kv.shape[3], 1, kv.dtype), kv))

    def run(self, requests: Mapping[int, SequenceRequest]) -> Outputs:
        self.engine.admit(requests)
        return self.finish(requests)

    def finish(self, sequence_ids: Iterable[int]) -> Outputs:
        outputs: Outputs = {sequence_id: [] for sequence_id in sequence_ids}
        while (stats := self.engine.stats()).num_running or stats.num_waiting:
            for output in self.engine.step():
                outputs.setdefault(output.sequence_id, []).append(output)
        return outputs

    def expected_logprobs(self, request: SequenceRequest, ids: Sequence[int]) -> Tensor:
        """Of the answer `ids`, each over the whole vocabulary, by one forward without the engine."""
        prefix = torch.cat([self.kv[name] for name in request.digests], dim=3) if request.digests else None
        sequence = [*request.prompt_ids, *ids][:-1]
        with torch.no_grad():
            hidden = self.lm.packed_hidden([sequence], [prefix])
            return torch.log_softmax(self.lm.logits(hidden), dim=-1)[len(request.prompt_ids) - 1 :]

    def check(self, request: SequenceRequest, outputs: Sequence[TokenOutput]) -> None:
        expected = self.expected_logprobs(request, ids_of(outputs))
        chosen = expected.gather(1, torch.tensor(ids_of(outputs))[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(logprobs_of(outputs)), chosen, atol=TOLERANCE, rtol=0)


def ids_of(outputs: Sequence[TokenOutput]) -> list[int]:
    return [output.token_id for output in outputs]


def logprobs_of(outputs: Sequence[TokenOutput]) -> list[float]:
    return [output.logprob for output in outputs]


def bits(outputs: Outputs) -> dict[int, list[tuple[int, float]]]:
    """Ids and logprobs, to be compared exactly."""
    return {key: [(output.token_id, output.logprob) for output in each] for key, each in outputs.items()}


def random_ids(num_tokens: int, seed: int = 0) -> tuple[int, ...]:
    generator = random.Random(1000 * num_tokens + seed)
    return tuple(generator.randrange(3, 384) for _ in range(num_tokens))


def request(
    prompt: int | tuple[int, ...] = 20,
    *digests: str,
    seed: int = 0,
    max_new_tokens: int = 8,
    temperature: float = 1.0,
    skip_prefix_cache: bool = False,
    ignore_eos: bool = True,
    **sampling: Any,
) -> SequenceRequest:
    """A random prompt of so many tokens, or the given one."""
    prompt_ids = random_ids(prompt, seed) if isinstance(prompt, int) else prompt
    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, ignore_eos=ignore_eos, **sampling
    )
    return SequenceRequest(prompt_ids, digests, params, skip_prefix_cache)
