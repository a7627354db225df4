"""Who gets the next place in the engine's batch.

Clients take turns, then the calls of a client, then the sequences of a call in their order. Turns alone don't do:
whoever decodes long answers gets a place at each turn and keeps it, and those with short ones wait. So places are kept:

- A client alone may have all of them.
- Beside others, each has its share: all places divided by the clients that were there at once lately. Below its share a
  client takes any place that is free.
- Beyond it, a client takes only what the others lately did not need. Kept for them are, of the most places that they
  wanted at once, up to a share each, those that they don't have, and one for who comes anew; never more than three
  quarters of all. So somebody who asks one question after the other gets a place at once.
- Of what is left a client takes half: each sequence more makes everybody's steps longer.
- Who comes when nobody is there finds a place kept for each client that was there before, at once.

It is counted how many places were wanted at once, not by whom: a client may be one request that never comes back.
Nothing that runs is interrupted: who finds all places taken by one that was alone waits until the first is free.

A call that must give equal bits each time gets all places while nobody else is there. What others wanted before would
else decide in which company its sequences are decoded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace

# How long places are kept for clients that left: the time in which somebody reads an answer and asks on.
MEMORY_SECONDS = 30.0


@dataclass(slots=True, eq=False)
class _Call:
    client: Hashable
    waiting: deque[int]
    repeatable: bool


@dataclass(slots=True)
class _Client:
    came_at: float
    # Most others that were there at once lately when it came.
    num_met: int
    num_running: int = 0
    num_waiting: int = 0
    # Those with sequences that wait; the next is the first.
    calls: deque[_Call] = field(default_factory=deque)

    @property
    def num_open(self) -> int:
        return self.num_running + self.num_waiting


class FairQueue:
    """Sequences by their ids, from `add` to `end`. Times are of one clock, in seconds."""

    def __init__(self, num_places: int) -> None:
        self._num_places = num_places
        # Those with a sequence here; the next is the first.
        self._clients: dict[Hashable, _Client] = {}
        # When the others left that were here lately, in that order.
        self._left: dict[Hashable, float] = {}
        self._calls: dict[int, _Call] = {}
        self.running: set[int] = set()
        self._most_clients, self._most_wanted = _RecentMost(), _RecentMost()
        # What counts of a client among those wanted: a share, as large as any client's.
        self._share = num_places

    @property
    def num_waiting(self) -> int:
        return len(self._calls) - len(self.running)

    @property
    def num_clients(self) -> int:
        return len(self._clients)

    def num_of(self, client: Hashable) -> int:
        """Sequences of a client that run or wait."""
        found = self._clients.get(client)
        return found.num_open if found is not None else 0

    def add(self, client: Hashable, sequence_ids: Iterable[int], now: float, *, repeatable: bool = False) -> None:
        """The sequences of a call."""
        call = _Call(client, deque(sequence_ids), repeatable)
        self._calls |= dict.fromkeys(call.waiting, call)
        if (found := self._clients.get(client)) is None:
            found = self._clients[client] = self._come(client, now)
        found.calls.append(call)
        found.num_waiting += len(call.waiting)
        self._count(now)

    def take(self, now: float) -> list[int]:
        """Those that get a place now, in order."""
        taken = []
        while self.num_waiting and (name := self._next(now)) is not None:
            # Whose turn it was is last.
            client = self._clients[name] = self._clients.pop(name)
            call = client.calls.popleft()
            taken.append(call.waiting.popleft())
            if call.waiting:
                client.calls.append(call)
            client.num_waiting -= 1
            client.num_running += 1
            self.running.add(taken[-1])
        return taken

    def end(self, sequence_id: int, now: float) -> None:
        """A sequence has ended, or waits no more. Nothing happens to one that is not here."""
        if (call := self._calls.pop(sequence_id, None)) is None:
            return
        client = self._clients[call.client]
        if sequence_id in self.running:
            self.running.remove(sequence_id)
            client.num_running -= 1
        else:
            call.waiting.remove(sequence_id)
            client.num_waiting -= 1
            if not call.waiting:
                client.calls.remove(call)
        if not client.num_running and not client.num_waiting:
            del self._clients[call.client]
            self._left[call.client] = now
        self._count(now)

    def num_before(self, sequence_id: int) -> int:
        """How many calls of its client have their turn before that of a sequence that waits."""
        call = self._calls[sequence_id]
        return self._clients[call.client].calls.index(call)

    def has_begun(self, sequence_ids: Iterable[int]) -> bool:
        """Whether any of them got a place, or has ended."""
        return any(each not in self._calls or each in self.running for each in sequence_ids)

    def copy(self) -> FairQueue:
        """To try out what will be."""
        copied = FairQueue(self._num_places)
        for name, client in self._clients.items():
            calls = deque(_Call(name, deque(call.waiting), call.repeatable) for call in client.calls)
            copied._clients[name] = replace(client, calls=calls)
            copied._calls |= {sequence_id: call for call in calls for sequence_id in call.waiting}
        copied._calls |= {sequence_id: self._calls[sequence_id] for sequence_id in self.running}
        copied.running, copied._left, copied._share = set(self.running), dict(self._left), self._share
        copied._most_clients, copied._most_wanted = self._most_clients.copy(), self._most_wanted.copy()
        return copied

    def _come(self, name: Hashable, now: float) -> _Client:
        while self._left and self._left[first := next(iter(self._left))] < now - MEMORY_SECONDS:
            del self._left[first]
        was_here = self._left.pop(name, None) is not None
        return _Client(now, max(0, self._most_clients.at(now) - was_here))

    def _next(self, now: float) -> Hashable | None:
        """The first client in turn that may have a place."""
        num_free = self._num_places - len(self.running)
        if not num_free:
            return None
        num_had = sum(min(each.num_running, self._share) for each in self._clients.values())
        return next(
            (
                name
                for name, client in self._clients.items()
                if client.calls and self._may_take(client, num_free, num_had, now)
            ),
            None,
        )

    def _may_take(self, client: _Client, num_free: int, num_had: int, now: float) -> bool:
        num_met = client.num_met if now < client.came_at + MEMORY_SECONDS else 0
        num_others = max(num_met, self._most_clients.at(now, client.came_at) - 1)
        num_beyond = client.num_running - self._share_of(num_others + 1)
        if num_beyond < 0:
            return True
        if client.calls[0].repeatable and len(self._clients) == 1:
            return True
        num_wanted = self._most_wanted.at(now, client.came_at) - min(client.num_open, self._share)
        num_kept = max(num_met, num_wanted) - (num_had - min(client.num_running, self._share))
        num_left = num_free - min(num_kept + (num_others > 0), self._num_places * 3 // 4)
        return num_left > (num_beyond if num_others else 0)

    def _share_of(self, num_clients: int) -> int:
        return max(1, self._num_places // max(1, num_clients))

    def _count(self, now: float) -> None:
        self._most_clients.set(len(self._clients), now)
        share = self._share_of(self._most_clients.at(now))
        if share < self._share:
            # More are there at once than ever lately: what they want now counts, not what fewer did.
            self._most_wanted = _RecentMost()
        self._share = share
        wanted = sum(min(each.num_open, share) for each in self._clients.values())
        self._most_wanted.set(wanted, now)


class _RecentMost:
    """The largest value that a number has had in the last MEMORY_SECONDS."""

    def __init__(self) -> None:
        self._value = 0
        # Values that were left, with the time, each smaller than the one before.
        self._left: deque[tuple[float, int]] = deque()

    def set(self, value: int, now: float) -> None:
        while self._left and self._left[-1][1] <= self._value:
            self._left.pop()
        self._left.append((now, self._value))
        self._value = value

    def at(self, now: float, since: float = float("-inf")) -> int:
        """Of the values that it had after `since`."""
        while self._left and self._left[0][0] < now - MEMORY_SECONDS:
            self._left.popleft()
        for left_at, value in self._left:
            if left_at > since:
                # The first of them is the largest.
                return max(self._value, value)
        return self._value

    def copy(self) -> _RecentMost:
        copied = _RecentMost()
        copied._value, copied._left = self._value, deque(self._left)
        return copied
