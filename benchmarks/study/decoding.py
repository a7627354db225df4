"""Answers of the built-in engine, in this process: of the model alone, behind a document, or behind a policy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from torch import Tensor

from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.rpc.answers import Answer, Prompt
from services.rollout.engine import FinishReason, SamplingParams, SequenceRequest
from services.rollout.engine.torch.engine import TorchEngine

_PREFILL_TOKENS_PER_STEP = 4096


def as_cartridge(lm: FrozenLM, context_L2GPD: Tensor) -> Cartridge:
    """A context's own KV: a cartridge that nobody has trained."""
    return Cartridge(lm.spec.header(context_L2GPD.shape[3], 1, lm.dtype), context_L2GPD)


class Decoder:
    """Decodes as many sequences together as there are, up to `max_sequences` of `max_sequence_tokens` each."""

    def __init__(self, lm: FrozenLM, *, max_sequences: int, max_sequence_tokens: int) -> None:
        self._engine = TorchEngine(
            lm,
            max_sequences=max_sequences,
            max_sequence_tokens=max_sequence_tokens,
            prefill_tokens_per_step=_PREFILL_TOKENS_PER_STEP,
        )
        # The engine takes equal names for equal bytes.
        self._names = count()

    def answer(
        self,
        prompts: Sequence[Prompt],
        cartridge: Cartridge | None,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        stop: tuple[str, ...] = (),
    ) -> list[Answer]:
        """One answer to each prompt, in order, behind the cartridge if there is one."""
        digests: tuple[str, ...] = ()
        if cartridge is not None:
            digests = (str(next(self._names)),)
            # The engine copies on a stream of its own, which would not wait for whoever is still computing this one.
            self._engine.load(digests[0], Cartridge(cartridge.header, cartridge.kv_L2GPD.cpu()))
        requests = {
            place: SequenceRequest(
                tuple(prompt.ids), digests, SamplingParams(max_new_tokens, temperature, seed=prompt.seed, stop=stop)
            )
            for place, prompt in enumerate(prompts)
        }
        self._engine.admit(requests)
        ids: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        texts, truncated = [""] * len(prompts), [False] * len(prompts)
        while (stats := self._engine.stats()).num_running or stats.num_waiting:
            for output in self._engine.step():
                place = output.sequence_id
                ids[place].append(output.token_id)
                logprobs[place].append(output.logprob)
                texts[place] += output.text
                truncated[place] = output.finish_reason is FinishReason.LENGTH
        for digest in digests:
            self._engine.unload(digest)
        return [Answer(*each) for each in zip(ids, logprobs, texts, truncated, strict=True)]
