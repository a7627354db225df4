"""The built-in engine: `schedule -> run -> postprocess` over any model that `FrozenLM` takes."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from services.rollout.engine import EngineStats, SequenceRequest, TokenOutput
from services.rollout.engine.answer import AnswerProgress
from services.rollout.engine.torch.attention import StepAttention
from services.rollout.engine.torch.kv import SlotKV
from services.rollout.engine.torch.sampler import sample
from services.rollout.engine.torch.scheduler import Scheduled, Scheduler
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
        self._kv = SlotKV(lm, max_sequences, max_sequence_tokens)
        self._scheduler = Scheduler(Slots(self._kv), prefill_tokens_per_step)
        self._cartridges: dict[str, LoadedCartridge] = {}
        self._sequences: dict[int, Sequence] = {}
        self._upload = Upload(lm.device, lm.dtype) if lm.device.type == "cuda" else None
        self._num_heads = lm.model.config.get_text_config().num_attention_heads

    def admit(self, requests: Mapping[int, SequenceRequest]) -> None:
        for sequence_id, request in requests.items():
            cartridges = [self._cartridges[digest] for digest in request.digests]
            progress = AnswerProgress(request.sampling, self._lm.info.text, self._lm.eos_ids)
            self._sequences[sequence_id] = Sequence(sequence_id, request, cartridges, progress)
        self._scheduler.add(self._sequences[sequence_id] for sequence_id in requests)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        batch = self._scheduler.schedule()
        if not batch:
            return []
        hidden_TE = self._run(batch)
        return self._postprocess(batch, hidden_TE)

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

    def _run(self, batch: SequenceOf[Scheduled]) -> Tensor:
        ids: list[int] = []
        for sequence, num_tokens in batch:
            begin = sequence.num_computed_tokens
            ids += sequence.token_ids[begin : begin + num_tokens]
        plan = StepAttention(self._kv, batch, self._num_heads)
        return self._lm.hidden(torch.tensor(ids, device=self._lm.device), plan.positions_T, plan)

    def _postprocess(self, batch: SequenceOf[Scheduled], hidden_TE: Tensor) -> list[TokenOutput]:
        ready, rows, row = [], [], -1
        for sequence, num_tokens in batch:
            row += num_tokens
            sequence.num_computed_tokens += num_tokens
            if sequence.num_pending_tokens == 0:
                ready.append(sequence)
                rows.append(row)
        if not ready:
            return []
        logits_NV = self._lm.logits(hidden_TE[rows])
        return [
            self._take(sequence, *sampled) for sequence, sampled in zip(ready, sample(logits_NV, ready), strict=True)
        ]

    def _take(
        self, sequence: Sequence, token_id: int, logprob: float, top_logprobs: tuple[tuple[int, float], ...]
    ) -> TokenOutput:
        text, finish_reason = sequence.append(token_id)
        if finish_reason is not None:
            self.cancel(sequence.id)
        return TokenOutput(
            sequence_id=sequence.id,
            token_id=token_id,
            logprob=logprob,
            top_logprobs=top_logprobs,
            text=text,
            finish_reason=finish_reason,
            digests=sequence.digests,
            cartridge_tokens=sequence.offset,
            cached_tokens=sequence.num_cached_tokens,
            scheduled_at=sequence.scheduled_at,
        )
