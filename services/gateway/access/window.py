"""A window that slides: how much of a limit is used, and when there is room again."""

from __future__ import annotations

import math
from dataclasses import dataclass

# What is used must sink below the limit, not to it; Redis counts time in milliseconds.
_TICK_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class Window:
    """Counts of two spans of `seconds` each: the current one, and the one before, of which the part counts that the
    sliding window still covers. Each stands with the seconds until nothing of it counts."""

    most: int
    seconds: float
    previous: int
    previous_left: float
    current: int
    current_left: float

    @property
    def used(self) -> float:
        return self.previous * self.previous_left / self.seconds + self.current

    @property
    def remaining(self) -> int:
        return max(0, self.most - math.floor(self.used))

    @property
    def seconds_until_room(self) -> float | None:
        """0 if there is room for one more; None if there never is."""
        if self.used < self.most:
            return 0.0
        if not self.most:
            return None
        if self.current < self.most:
            # As soon as the previous span's part is small enough.
            share = (self.most - self.current) / self.previous
            return self.previous_left - self.seconds * share + _TICK_SECONDS
        # The current span becomes the previous one, and then sinks. One answer may have taken many times the limit.
        return self.current_left - self.seconds * self.most / self.current + _TICK_SECONDS

    @property
    def seconds_until_reset(self) -> float:
        """Until nothing is used, if nothing more is."""
        return self.current_left if self.current else self.previous_left if self.previous else 0.0

    def headers(self, kind: str) -> dict[str, str]:
        """As OpenAI names and spells them; `kind` is `requests` or `tokens`."""
        return {
            f"x-ratelimit-limit-{kind}": str(self.most),
            f"x-ratelimit-remaining-{kind}": str(self.remaining),
            f"x-ratelimit-reset-{kind}": duration(self.seconds_until_reset),
        }


def duration(seconds: float) -> str:
    """Such as `12ms`, `1s`, `1m30s`; rounded up."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(math.ceil(milliseconds / 1000), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
