"""How long a call would wait for its first place: the queue played forward, with what steps and answers lately took."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from services.rollout.fair_queue import FairQueue

# Ends of sequences that are played, besides; what comes then goes on at their pace. It takes the event loop's time.
_NUM_ENDS = 16
# Of the newest step, or answer, in the means.
_WEIGHT = 0.1


class WaitingTime:
    """Until a step and an answer have been seen, nothing is known, and nobody seems to wait."""

    def __init__(self) -> None:
        self._step_seconds: float | None = None
        # How much of what they might have said answers did say.
        self._said: float | None = None

    def saw_step(self, seconds: float) -> None:
        self._step_seconds = _mean(self._step_seconds, seconds)

    def saw_answer(self, num_tokens: int, max_new_tokens: int) -> None:
        """Of one that ended by itself."""
        self._said = _mean(self._said, num_tokens / max_new_tokens)

    def seconds(self, queue: FairQueue, call: Sequence[int], tokens_left: Mapping[int, int], now: float) -> float:
        """Until one of the sequences of a call that has just joined the queue has a place. `tokens_left` is what each
        sequence may still say. The queue is used up."""
        if self._step_seconds is None or self._said is None:
            return 0.0
        ends = [(self._said * tokens_left[each], each) for each in queue.running]
        heapq.heapify(ends)
        num_ahead = queue.num_before(call[0])
        num_steps, at = 0.0, now
        # Every client has a turn in it, and some have more.
        for _ in range(queue.num_clients + _NUM_ENDS):
            for each in queue.take(at):
                heapq.heappush(ends, (num_steps + self._said * tokens_left[each], each))
            if queue.has_begun(call):
                return at - now
            num_steps, ended = heapq.heappop(ends)
            at = now + num_steps * self._step_seconds
            queue.end(ended, at)
        num_passed = num_ahead - queue.num_before(call[0])
        return (at - now) * (num_ahead + 1) / max(1, num_passed)


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _WEIGHT * (value - mean)
