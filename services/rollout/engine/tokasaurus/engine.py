"""A server of Tokasaurus' cartridge branch, run by somebody else, behind the engine's protocol.

It says nothing of what it decoded with: that an answer is of a cartridge's bytes is claimed here and proved by nobody.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

from foundry.errors import AlignmentError, FoundryError
from foundry.model.cartridge import Cartridge
from foundry.model.info import ModelInfo
from services.rollout.engine import EngineStats, FinishReason, SequenceRequest, TokenOutput
from services.rollout.engine.answer import AnswerProgress
from services.rollout.engine.tokasaurus.directory import SharedDirectory
from services.rollout.engine.tokasaurus.packed import ExternalAnswer
from services.rollout.engine.tokasaurus.server import ExternalServer

# How long a step waits for answers, about as long as one that decodes: commands have their turn between two.
_STEP_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class _Open:
    """A sequence that has not ended."""

    request: SequenceRequest
    num_cartridge_tokens: int
    asked_at: float
    asked: Future[ExternalAnswer]


class TokasaurusEngine:
    """See `Engine`. A sequence's tokens come all in one step, since the server sends an answer when it has ended."""

    rotation = "the engine tokasaurus has one cartridge at a time"

    def __init__(
        self, info: ModelInfo, server: ExternalServer, directory: SharedDirectory, *, max_sequences: int
    ) -> None:
        """`max_sequences` are asked at once."""
        self._info, self._server, self._directory = info, server, directory
        self._max_sequences = max_sequences
        self._open: dict[int, _Open] = {}
        self._ended: deque[int] = deque()
        self._arrived = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tokasaurus", daemon=True)
        self._thread.start()

    def admit(self, requests: Mapping[int, SequenceRequest]) -> None:
        for sequence_id, request in requests.items():
            found = [self._directory.find(digest) for digest in request.digests]
            asking = self._server.ask(request, [name for name, _ in found])
            asked = asyncio.run_coroutine_threadsafe(asking, self._loop)
            num_cartridge_tokens = sum(num_tokens for _, num_tokens in found)
            self._open[sequence_id] = _Open(request, num_cartridge_tokens, time.perf_counter(), asked)
            asked.add_done_callback(partial(self._note, sequence_id))

    def step(self) -> list[TokenOutput]:
        self._arrived.wait(_STEP_SECONDS)
        self._arrived.clear()
        outputs: list[TokenOutput] = []
        while self._ended:
            sequence_id = self._ended.popleft()
            # One that was cancelled has ended too.
            if (each := self._open.pop(sequence_id, None)) is not None:
                outputs += self._outputs(sequence_id, each)
        return outputs

    def cancel(self, sequence_id: int) -> None:
        if (each := self._open.pop(sequence_id, None)) is not None:
            # Closes the connection, by which the server knows.
            each.asked.cancel()

    def load(self, digest: str, cartridge: Cartridge) -> None:
        """Raises PartialPage, Unavailable."""
        self._directory.write(digest, cartridge)

    def unload(self, digest: str) -> None:
        self._directory.remove(digest)

    def stats(self) -> EngineStats:
        """What the server's memory holds is not known: 0."""
        return EngineStats(len(self._open), 0, self._max_sequences, kv_bytes=0, kv_used_bytes=0)

    def close(self) -> None:
        """Ends what is asked, and leaves no cartridge behind."""
        for sequence_id in list(self._open):
            self.cancel(sequence_id)
        asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._directory.clear()

    def _note(self, sequence_id: int, _: Future[ExternalAnswer]) -> None:
        self._ended.append(sequence_id)
        self._arrived.set()

    def _outputs(self, sequence_id: int, each: _Open) -> Iterator[TokenOutput]:
        error = each.asked.exception()
        if error is None:
            answer = each.asked.result()
            progress = AnswerProgress(each.request.sampling, self._info.text, self._info.eos_ids)
            for token_id, logprob, alternatives in zip(answer.ids, answer.logprobs, answer.top_logprobs, strict=True):
                text, finish_reason = progress.append(token_id)
                yield replace(
                    _output(sequence_id, each),
                    token_id=token_id,
                    logprob=logprob,
                    top_logprobs=alternatives,
                    text=text,
                    text_offset=progress.text_offset,
                    finish_reason=finish_reason,
                    cached_tokens=answer.cached_tokens,
                )
                # What comes behind a token that the server does not know to be the last.
                if finish_reason is not None:
                    return
            error = AlignmentError(
                f"the Tokasaurus server ended an answer after {len(answer.ids)} tokens, of which none ends one: is the "
                "model that it serves this one?"
            )
        if not isinstance(error, FoundryError):
            raise error
        yield replace(_output(sequence_id, each), finish_reason=FinishReason.ERROR, error=error)


def _output(sequence_id: int, each: _Open) -> TokenOutput:
    """Of no token."""
    return TokenOutput(
        sequence_id=sequence_id,
        token_id=0,
        logprob=math.nan,
        top_logprobs=(),
        text="",
        text_offset=0,
        finish_reason=None,
        digests=each.request.digests,
        cartridge_tokens=each.num_cartridge_tokens,
        cached_tokens=0,
        scheduled_at=each.asked_at,
    )
