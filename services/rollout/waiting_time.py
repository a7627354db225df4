"""How long a call would wait for its first place: the queue played forward, with what steps and answers lately took."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

from services.rollout.fair_queue import FairQueue

# Ends of sequences that are played, besides; what comes then goes on at their pace. It takes the event loop's time.
_NUM_ENDS = 16
# Of the newest step in the mean.
_WEIGHT = 0.1
# After which what answers did counts no more than a third.
_MEMORY_TOKENS = 20_000
# Ends of an answer by itself that are as good as none.
_NEGLIGIBLE = 1e-6


class WaitingTime:
    """Until a step and an answer have been seen, nothing is known, and nobody seems to wait.

    An answer ends by itself with the same probability at each token, or when it has said all that it may. That
    probability is what answers lately had: ends by tokens, so that those that were cut off count as far as they came.
    What they were allowed says little, since most are allowed all that the context has room for.
    """

    def __init__(self) -> None:
        self._step_seconds: float | None = None
        # Of answers lately.
        self._num_ends = self._num_tokens = 0.0

    def saw_step(self, seconds: float) -> None:
        self._step_seconds = _mean(self._step_seconds, seconds)

    def saw_answer(self, num_tokens: int, *, cut_off: bool) -> None:
        """`cut_off` is one that said all that it might."""
        left = math.exp(-num_tokens / _MEMORY_TOKENS)
        self._num_ends = left * self._num_ends + (not cut_off)
        self._num_tokens = left * self._num_tokens + num_tokens

    def expected_tokens(self, most: int) -> float:
        """Of a sequence that may say so many more."""
        rate = self._num_ends / self._num_tokens
        return -math.expm1(-rate * most) / rate if rate * most > _NEGLIGIBLE else most

    def seconds(self, queue: FairQueue, call: Sequence[int], tokens_left: Mapping[int, int], now: float) -> float:
        """Until one of the sequences of a call that has just joined the queue has a place. `tokens_left` is what each
        sequence may still say. The queue is used up."""
        if self._step_seconds is None or not self._num_tokens:
            return 0.0
        ends = [(self.expected_tokens(tokens_left[each]), each) for each in queue.running]
        heapq.heapify(ends)
        num_ahead = queue.num_before(call[0])
        num_steps, at = 0.0, now
        # Every client has a turn in it, and some have more.
        for _ in range(queue.num_clients + _NUM_ENDS):
            for each in queue.take(at):
                heapq.heappush(ends, (num_steps + self.expected_tokens(tokens_left[each]), each))
            if queue.has_begun(call):
                return at - now
            num_steps, ended = heapq.heappop(ends)
            at = now + num_steps * self._step_seconds
            queue.end(ended, at)
        num_passed = num_ahead - queue.num_before(call[0])
        return (at - now) * (num_ahead + 1) / max(1, num_passed)


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _WEIGHT * (value - mean)
