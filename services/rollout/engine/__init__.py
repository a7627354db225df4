"""What the rollout service needs of an engine.

An engine decodes sequences behind cartridges that were loaded under their digests. It knows nothing of gRPC, asyncio
or the store. `admit`, `step` and `cancel` are called from one thread; `load`, `unload` and `stats` from any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from foundry.model.cartridge import Cartridge


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence is sampled. Temperature 0 is greedy, top_k 0 is off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    # Alternatives to report per token.
    num_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One completion of one prompt. `digests` are the cartridges before it, in order: distinct ones, all loaded."""

    prompt_ids: tuple[int, ...]
    digests: tuple[str, ...]
    sampling: SamplingParams
    # Compute every prompt token anew.
    skip_prefix_cache: bool = False
    # KV is reused among sequences of one tenant only.
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One sampled token. Logprobs are natural logs of the untempered distribution."""

    sequence_id: int
    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...]
    # What this token adds to the text; may be empty while a character or a stop string is incomplete.
    text: str
    # Where the token's own text begins: in characters of the answer, as it would be if no stop string ended it. Tokens
    # of one character share its place.
    text_offset: int
    # Set on the last token.
    finish_reason: FinishReason | None
    # Of the cartridges that the token was computed with.
    digests: tuple[str, ...]
    cartridge_tokens: int
    # Prompt tokens whose KV was reused.
    cached_tokens: int
    # When the sequence got its place in the batch, in `time.perf_counter()`.
    scheduled_at: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Sequences that have a place in the batch, and those that wait for one; the KV memory of all places, and what of
    it is filled."""

    num_running: int
    num_waiting: int
    num_slots: int
    kv_bytes: int
    kv_used_bytes: int


class Engine(Protocol):
    """Continuous batching behind cartridges."""

    def admit(self, requests: Mapping[int, SequenceRequest]) -> None:
        """Queue sequences under the caller's ids, together and in order."""
        ...

    def step(self) -> list[TokenOutput]:
        """One forward pass over everything that is ready, and the tokens that are known by then: they may be the pass
        before's. Empty when there is nothing to do, and while the first one computes; `stats` says which."""
        ...

    def cancel(self, sequence_id: int) -> None:
        """Forget a sequence; no output follows. Unknown or finished ones are ignored."""
        ...

    def load(self, digest: str, cartridge: Cartridge) -> None:
        """Make a cartridge usable by sequences admitted from now on."""
        ...

    def unload(self, digest: str) -> None:
        """Forget a cartridge that no sequence uses."""
        ...

    def stats(self) -> EngineStats:
        """As of now, or of the last step. Raises Unavailable if the engine has a process of its own and lost it."""
        ...
