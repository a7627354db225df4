"""Steps in a few shapes, each captured once as a CUDA graph: a copy of tables, one launch, a copy back."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foundry.model.lm import FrozenLM
from services.rollout.engine.torch.cuda.attention import TableAttention, decode_shape, prompt_shape
from services.rollout.engine.torch.cuda.tables import StepShape, StepTables, fits
from services.rollout.engine.torch.kv import SlotKV
from services.rollout.engine.torch.runner import Done, Launched
from services.rollout.engine.torch.sampler import Sampled, invert, sample, scale
from services.rollout.engine.torch.scheduler import Scheduled
from services.rollout.engine.torch.scoring import has_unscored, score_prompts
from services.rollout.engine.torch.sequence import Sequence


class CapturedStep:
    """One shape of step: its tables, the graph, and the memory that its results come to."""

    def __init__(self, lm: FrozenLM, kv: SlotKV, shape: StepShape, last_ids_N: Tensor) -> None:
        """`last_ids_N`: what the newest step sampled, whichever its shape."""
        self._lm = lm
        self.shape = shape
        self._last_ids_N = last_ids_N
        self._tables = StepTables(shape, kv)
        self._plan = TableAttention(kv, self._tables, lm.num_heads)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_BV: Tensor
        self._results_2B: Tensor

    def capture(self, pool: Any) -> None:
        # Once before: kernels are compiled and libraries take their memory at the first call.
        self._compute()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            self._compute()
        self._graph = graph

    def launch(self, batch: SequenceOf[Scheduled]) -> Launched:
        ready = [sequence for sequence, num_tokens in batch if sequence.num_pending_tokens == num_tokens]
        uniforms = [sequence.draw() for sequence in ready]
        self._tables.fill(batch, uniforms)
        if self._graph is not None:
            self._graph.replay()
        else:
            score_prompts(self._lm, self._compute(), batch)
        if any(_is_filtered(sequence) for sequence in ready):
            return Done(ready, sample(self._logits_BV[: len(ready)], ready, uniforms))
        return _OnItsWay(ready, self._results_2B)

    def _compute(self) -> Tensor:
        """Logits and results into their memory; returns hidden states [T, E]."""
        at = self._tables.at
        ids_T = torch.where(at["sources"] < 0, at["ids"], self._last_ids_N[at["sources"].clamp(min=0)])
        hidden_TE = self._lm.hidden(ids_T, at["positions"], self._plan)
        self._logits_BV = self._lm.logits(hidden_TE[at["sampled_rows"]])
        greedy_B = at["temperatures"] == 0
        temperatures_B = torch.where(greedy_B, 1.0, at["temperatures"]).float()
        drawn_B = invert(scale(self._logits_BV, temperatures_B), at["uniforms"])
        ids_B = torch.where(greedy_B, self._logits_BV.argmax(dim=-1), drawn_B)
        self._last_ids_N[: len(ids_B)] = ids_B
        logprobs_B = self._logits_BV.gather(1, ids_B[:, None])[:, 0] - self._logits_BV.logsumexp(dim=-1)
        # Ids are exact in float64: one copy brings both.
        self._results_2B = torch.stack([ids_B.double(), logprobs_B.double()])
        return hidden_TE


class _OnItsWay:
    """A step whose results come to host memory when it has ended."""

    done = False

    def __init__(self, sequences: SequenceOf[Sequence], results_2B: Tensor) -> None:
        self.sequences = sequences
        self._results_2B = torch.empty(results_2B.shape, dtype=results_2B.dtype, pin_memory=results_2B.is_cuda)
        self._results_2B.copy_(results_2B, non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if results_2B.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def results(self) -> SequenceOf[Sampled]:
        if self._arrived is not None:
            self._arrived.synchronize()
        ids, logprobs = self._results_2B[:, : len(self.sequences)].tolist()
        return [Sampled(int(token_id), logprob, ()) for token_id, logprob in zip(ids, logprobs, strict=True)]


class CapturedRunner:
    """Decoding steps and steps with prompts, in shapes of so many tokens that at most a third of a step is padding."""

    def __init__(self, lm: FrozenLM, kv: SlotKV, *, prefill_tokens_per_step: int, capture: bool = True) -> None:
        """With `capture` False steps are computed operator after operator, as on a CPU for tests."""
        self._lm, self._kv = lm, kv
        self._last_ids_N = torch.zeros(kv.num_slots, dtype=torch.int64, device=kv.device)
        max_sequences = kv.num_slots
        decoding = [decode_shape(num_tokens, kv, lm.num_heads) for num_tokens in _sizes(1, max_sequences)]
        most = prefill_tokens_per_step + max_sequences
        prompts = [prompt_shape(num_tokens, max_sequences, kv, lm.num_heads) for num_tokens in _sizes(16, most)]
        # Largest first: the smaller ones then find their memory in what those have taken.
        self._decoding, self._prompts = (
            [CapturedStep(lm, kv, shape, self._last_ids_N) for shape in reversed(shapes)]
            for shapes in (decoding, prompts)
        )
        if capture:
            pool = torch.cuda.graph_pool_handle()
            for step in (*self._prompts, *self._decoding):
                step.capture(pool)

    def launch(self, batch: SequenceOf[Scheduled]) -> Launched:
        # Neighbours behind one cartridge read it together.
        batch = sorted(batch, key=lambda each: each.sequence.digests)
        num_tokens = sum(each.num_tokens for each in batch)
        steps = self._decoding if num_tokens == len(batch) else self._prompts
        step = next(each for each in reversed(steps) if each.shape.num_tokens >= num_tokens)
        shape = step.shape
        if not fits(batch, shape):
            num_cartridges = max(len(sequence.cartridges) for sequence, _ in batch)
            tiles = num_cartridges * shape.num_tokens
            shape = replace(shape, max_cartridges=num_cartridges, num_cartridge_tiles=tiles)
        if shape is not step.shape or has_unscored(batch):
            # Many cartridges before one sequence, or a prompt that is scored: rare, so its step is not captured.
            step = CapturedStep(self._lm, self._kv, shape, self._last_ids_N)
        return step.launch(batch)


def _is_filtered(sequence: Sequence) -> bool:
    sampling = sequence.sampling
    filtered = sampling.temperature > 0 and (sampling.top_k or sampling.top_p < 1 or sampling.min_p)
    return bool(sampling.num_logprobs or filtered or sampling.adjusts_logits)


def _sizes(least: int, most: int) -> Iterator[int]:
    """Powers of two, and what lies half-way to the next, up to `most`."""
    size = least
    while size < most:
        yield size
        if size > 1 and size + size // 2 < most:
            yield size + size // 2
        size *= 2
    yield most
