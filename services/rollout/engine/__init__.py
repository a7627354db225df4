"""What the rollout service needs of an engine.

An engine decodes sequences behind cartridges that were loaded under their digests. It knows nothing of gRPC, asyncio
or the store. `admit`, `step` and `cancel` are called from one thread; `load`, `unload` and `stats` from any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from foundry.errors import FoundryError
from foundry.model.cartridge import Cartridge
from foundry.model.rotation import KeyRotation


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    # The grammar can't be followed further, or the output's `error`.
    ERROR = "error"


class GrammarState(Protocol):
    """How far one answer has come in a language."""

    @property
    def ended(self) -> bool:
        """Whether nothing but an end may follow."""
        ...

    def mask(self) -> bytes | None:
        """What may come next: bit i % 8 of byte i // 8 is token i's. None if the grammar can't be followed further."""
        ...

    def accept(self, token_id: int) -> bool:
        """Take a token; False if it can't stand here."""
        ...


class Grammar(Protocol):
    """A language that an answer is to be a sentence of."""

    @property
    def spec(self) -> str:
        """As llguidance reads it."""
        ...

    @property
    def end_id(self) -> int:
        """The token that ends an answer as far as masks know."""
        ...

    def begin(self) -> GrammarState:
        """Of a new answer."""
        ...


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
    # End the answer, as the model's own end tokens do.
    stop_token_ids: tuple[int, ...] = ()
    # Before which nothing but max_new_tokens ends the answer.
    min_tokens: int = 0
    # Of the likeliest token's probability, at the temperature.
    min_p: float = 0.0
    # (token, what is added to its logit)
    logit_bias: tuple[tuple[int, float], ...] = ()
    # Of tokens that the answer has, once and as often as it has them.
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    # Of tokens that prompt or answer have.
    repetition_penalty: float = 1.0
    grammar: Grammar | None = None
    # Alternatives to report per token of the prompt. None: the prompt is not scored.
    num_prompt_logprobs: int | None = None

    @property
    def adjusts_logits(self) -> bool:
        """Whether tokens are drawn of other logits than the model's, which may depend on those before."""
        penalised = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1
        return bool(self.min_tokens or self.logit_bias or penalised or self.grammar)


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One completion of one prompt. `digests` are the cartridges before it, in order: distinct ones, all loaded.

    Of a copy whose keys were moved it is what the copy was loaded under (`services.rollout.copies`).
    """

    prompt_ids: tuple[int, ...]
    digests: tuple[str, ...]
    sampling: SamplingParams
    # Compute every prompt token anew.
    skip_prefix_cache: bool = False
    # KV is reused among sequences of one tenant only.
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of the tokens of a prompt but its first: logprobs [n] (natural, untempered), ranks [n] (1 is the likeliest), and
    the K most likely tokens in their places, ids and logprobs [n, K]. On the CPU."""

    logprobs_n: Tensor
    ranks_n: Tensor
    top_ids_nK: Tensor
    top_logprobs_nK: Tensor


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """One sampled token. Logprobs are natural logs of the model's own distribution: untempered, and not adjusted."""

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
    # With the first token, where they are asked for.
    prompt_logprobs: PromptLogprobs | None = None
    # Why the sequence can't be decoded; then the output is of no token.
    error: FoundryError | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Sequences that have a place in the batch, and those that wait for one; the KV memory of all places, and what of
    it is filled; 0 where that is not known."""

    num_running: int
    num_waiting: int
    num_slots: int
    kv_bytes: int
    kv_used_bytes: int


class Engine(Protocol):
    """Continuous batching behind cartridges."""

    @property
    def rotation(self) -> KeyRotation | str:
        """How their keys are moved, or in words why they can't be."""
        ...

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
