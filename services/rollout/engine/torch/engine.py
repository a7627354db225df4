"""The built-in engine: `schedule -> launch -> take` over any model that `FrozenLM` takes."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import torch

from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.model.rotation import KeyRotation
from services.rollout.engine import EngineStats, PromptLogprobs, SequenceRequest, TokenOutput
from services.rollout.engine.answer import AnswerProgress
from services.rollout.engine.torch.kv import SlotKV
from services.rollout.engine.torch.runner import EagerRunner, Launched, Runner
from services.rollout.engine.torch.sampler import Sampled
from services.rollout.engine.torch.scheduler import Scheduled, Scheduler
from services.rollout.engine.torch.scoring import joined
from services.rollout.engine.torch.sequence import LoadedCartridge, Sequence
from services.rollout.engine.torch.slots import Slots
from services.rollout.engine.torch.upload import Upload

# Of what torch allocates, and the store too (foundry.buffers).
_ALIGNMENT_BYTES = 64


class TorchEngine:
    """See `Engine`. Requests are checked before they come here: what does not fit is a fault of the caller."""

    def __init__(
        self, lm: FrozenLM, *, max_sequences: int, max_sequence_tokens: int, prefill_tokens_per_step: int
    ) -> None:
        self._lm = lm
        # Now, because it takes a forward: later ones are the thread's that decodes.
        self.rotation = KeyRotation.known(lm)
        self._kv = SlotKV(lm, max_sequences, max_sequence_tokens)
        self._scheduler = Scheduler(Slots(self._kv), prefill_tokens_per_step)
        self._cartridges: dict[str, LoadedCartridge] = {}
        self._sequences: dict[int, Sequence] = {}
        self._upload = Upload(lm.device, lm.dtype) if lm.device.type == "cuda" else None
        self._runner = _runner(lm, self._kv, prefill_tokens_per_step)
        self._in_flight: Launched | None = None

    def admit(self, requests: Mapping[int, SequenceRequest]) -> None:
        for sequence_id, request in requests.items():
            cartridges = [self._cartridges[digest] for digest in request.digests]
            progress = AnswerProgress(request.sampling, self._lm.info.text, self._lm.eos_ids)
            self._sequences[sequence_id] = Sequence(sequence_id, request, cartridges, progress)
        self._scheduler.add(self._sequences[sequence_id] for sequence_id in requests)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        batch = self._scheduler.schedule()
        behind, self._in_flight = self._in_flight, None
        outputs: list[TokenOutput] = []
        launched = self._launch(batch) if batch else None
        # What the step before gave is taken while this one computes.
        if behind is not None:
            outputs += self._take(behind)
        if launched is not None and launched.done:
            outputs += self._take(launched)
        else:
            self._in_flight = launched
        return outputs

    def cancel(self, sequence_id: int) -> None:
        if sequence_id in self._sequences:
            self._scheduler.finish(self._sequences.pop(sequence_id))

    def load(self, digest: str, cartridge: Cartridge) -> None:
        if self._upload is not None:
            kv_L2GPD = self._upload.copy(cartridge.kv_L2GPD)
        else:
            kv_L2GPD = cartridge.kv_L2GPD.to(self._lm.device, self._lm.dtype)
        if kv_L2GPD.data_ptr() % _ALIGNMENT_BYTES:
            # Products over memory that is aligned otherwise may differ in the last bit.
            kv_L2GPD = kv_L2GPD.clone()
        self._cartridges[digest] = LoadedCartridge(digest, kv_L2GPD)

    def unload(self, digest: str) -> None:
        del self._cartridges[digest]

    def stats(self) -> EngineStats:
        running = self._scheduler.running
        return EngineStats(
            num_running=len(running),
            num_waiting=len(self._scheduler.waiting),
            num_slots=self._kv.num_slots,
            kv_bytes=self._kv.num_slots * self._kv.max_tokens * self._kv.token_bytes,
            kv_used_bytes=sum(sequence.num_computed_tokens for sequence in running) * self._kv.token_bytes,
        )

    def _launch(self, batch: SequenceOf[Scheduled]) -> Launched:
        launched = self._runner.launch(batch)
        for sequence, num_tokens in batch:
            sequence.num_computed_tokens += num_tokens
        for row, sequence in enumerate(launched.sequences):
            sequence.num_in_flight += 1
            sequence.row = row
        return launched

    def _take(self, launched: Launched) -> list[TokenOutput]:
        return [
            self._take_one(sequence, sampled)
            for sequence, sampled in zip(launched.sequences, launched.results(), strict=True)
            # It may have ended since.
            if self._sequences.get(sequence.id) is sequence
        ]

    def _take_one(self, sequence: Sequence, sampled: Sampled) -> TokenOutput:
        prompt_logprobs: PromptLogprobs | None = None
        num_alternatives = sequence.sampling.num_prompt_logprobs
        if num_alternatives is not None and len(sequence.token_ids) == len(sequence.prompt_ids):
            prompt_logprobs = joined(sequence.scored, num_alternatives)
            sequence.scored.clear()
        text, finish_reason = sequence.append(sampled.token_id)
        if finish_reason is not None:
            self.cancel(sequence.id)
        return TokenOutput(
            sequence_id=sequence.id,
            token_id=sampled.token_id,
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
            text=text,
            text_offset=sequence.text_offset,
            finish_reason=finish_reason,
            digests=sequence.digests,
            cartridge_tokens=sequence.offset,
            cached_tokens=sequence.num_cached_tokens,
            scheduled_at=sequence.scheduled_at,
            prompt_logprobs=prompt_logprobs,
        )


def _runner(lm: FrozenLM, kv: SlotKV, prefill_tokens_per_step: int) -> Runner:
    if lm.device.type != "cuda":
        return EagerRunner(lm, kv)
    # Only here: it needs Triton, which comes with torch for CUDA.
    from services.rollout.engine.torch.cuda.runner import CapturedRunner

    with torch.inference_mode():
        return CapturedRunner(lm, kv, prefill_tokens_per_step=prefill_tokens_per_step)
