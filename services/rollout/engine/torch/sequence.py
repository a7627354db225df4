"""One sequence from admission to its last token."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from services.rollout.engine import FinishReason, PromptLogprobs, SequenceRequest
from services.rollout.engine.answer import AnswerProgress
from services.rollout.engine.torch.adjust import Adjustment

_DRAWN = 64


@dataclass(frozen=True, slots=True)
class LoadedCartridge:
    """KV [L, 2, G, P, D] on the engine's device, under the digest of the bytes that it came from."""

    digest: str
    kv_L2GPD: Tensor

    @property
    def num_tokens(self) -> int:
        return self.kv_L2GPD.shape[3]


class Sequence:
    """Its tokens, how many of them have their KV in its slot, and the cartridges fixed at admission."""

    def __init__(
        self,
        sequence_id: int,
        request: SequenceRequest,
        cartridges: SequenceOf[LoadedCartridge],
        progress: AnswerProgress,
    ) -> None:
        self.id = sequence_id
        self.cartridges = tuple(cartridges)
        self.digests = tuple(cartridge.digest for cartridge in cartridges)
        # Position of the first own token.
        self.offset = sum(cartridge.num_tokens for cartridge in cartridges)
        self.prompt_ids = request.prompt_ids
        self.token_ids = list(request.prompt_ids)
        self.num_cached_tokens = 0
        self.num_computed_tokens = 0
        # Tokens that were sampled on the device and are not known here yet: the newest is in row `row` of the newest
        # step's results.
        self.num_in_flight = 0
        self.row = -1
        self.sampling = request.sampling
        self._max_tokens = len(request.prompt_ids) + request.sampling.max_new_tokens
        self.tenant = request.tenant
        self.skip_prefix_cache = request.skip_prefix_cache
        self.slot = -1
        self.scheduled_at = 0.0
        self._uniforms = _uniforms(request.sampling.seed)
        self._progress = progress
        self.adjustment: Adjustment | None = None
        if request.sampling.adjusts_logits:
            self.adjustment = Adjustment(request.sampling, request.prompt_ids, progress)
        # Of the prompt's tokens after the first, as far as they are computed.
        self.scored: list[PromptLogprobs] = []

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that the model has not seen: the rest of the prompt, or the one sampled last, known or not. None once
        as many were sampled as there may be."""
        num_tokens = len(self.token_ids) + self.num_in_flight
        return num_tokens - self.num_computed_tokens if num_tokens < self._max_tokens else 0

    @property
    def computed_ids(self) -> list[int]:
        return self.token_ids[: self.num_computed_tokens]

    @property
    def text_offset(self) -> int:
        """Where the text of the last token begins, in characters."""
        return self._progress.text_offset

    def draw(self) -> float:
        """The number in [0, 1) that decides its next token: its own, whoever else is in the batch."""
        return next(self._uniforms) if self.sampling.temperature > 0 else 0.0

    def append(self, token_id: int) -> tuple[str, FinishReason | None]:
        """Take a sampled token; returns the text that it completes and, if it was the last, why."""
        self.token_ids.append(token_id)
        self.num_in_flight -= 1
        if self.adjustment is not None:
            self.adjustment.append(token_id)
        return self._progress.append(token_id)


def _uniforms(seed: int) -> Iterator[float]:
    """In [0, 1). Drawn some at a time, which gives the same as one at a time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.rand(_DRAWN, dtype=torch.float64, generator=generator).tolist()
