"""Every interleaving of the protocol's steps and of accidents, and the promises in each state."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from tests.store_protocol.collector import COLLECT
from tests.store_protocol.publisher import PUBLISH
from tests.store_protocol.state import DEAD, TOMBSTONE, Protocol, State, with_publisher
from tests.store_protocol.surroundings import read, rebuild, tag, time_passes, without_redis


class Violation(NamedTuple):
    promise: str
    trace: tuple[str, ...]


class Explored(NamedTuple):
    num_states: int
    violation: Violation | None


def explore(protocol: Protocol, start: State) -> Explored:
    """Every state that can be reached, breadth first, up to the first that breaks a promise (its trace is shortest)."""
    came_from: dict[State, tuple[State, str] | None] = {start: None}
    waiting = deque([start])
    while waiting:
        state = waiting.popleft()
        for label, after in steps(protocol, state):
            if after in came_from:
                continue
            came_from[after] = (state, label)
            if broken := after.broken or broken_promise(after) or _goes_back(state, after):
                return Explored(len(came_from), Violation(broken, _trace(came_from, after)))
            waiting.append(after)
    return Explored(len(came_from), None)


def steps(protocol: Protocol, state: State) -> Iterator[tuple[str, State]]:
    """What can happen next: every actor's next step, and every accident."""
    for index, publisher in enumerate(state.publishers):
        if publisher.step >= 0:
            step = protocol.publish[publisher.step]
            if (after := PUBLISH[step](protocol, state, index)) is not None:
                yield f"publisher {publisher.attempt}: {step}", after
            if state.crashes_left:
                dead = publisher._replace(step=DEAD)
                yield (
                    f"publisher {publisher.attempt} dies",
                    with_publisher(state._replace(crashes_left=state.crashes_left - 1), index, dead),
                )
    if state.collector.step >= 0:
        step = protocol.collect[state.collector.step]
        if (after := COLLECT[step](protocol, state)) is not None:
            yield f"collector: {step}", after
        if state.crashes_left:
            dead_collector = state.collector._replace(step=DEAD)
            yield "collector dies", state._replace(collector=dead_collector, crashes_left=state.crashes_left - 1)
    yield from read(protocol, state)
    yield from tag(state)
    yield from rebuild(protocol, state)
    yield from time_passes(protocol, state)
    if state.losses_left:
        yield "Redis is lost", without_redis(protocol, state)._replace(losses_left=state.losses_left - 1)


def broken_promise(state: State) -> str:
    """'' if all promises about a single state hold; those about a step are noted by the step."""
    if len({number for number, _ in state.meanings}) < len(state.meanings):
        return "a number means two digests"
    if not state.was_lost and any(digest not in state.blobs for _, digest in state.manifests if digest != TOMBSTONE):
        return "a manifest names no blob"
    if not state.restored:
        return ""
    for version in state.visible:
        if version.digest not in (state.blobs if version.durable else state.blobs | state.hot):
            return "a visible version has no bytes"
    shown = {(version.number, version.digest) for version in state.visible}
    if not state.committed <= shown:
        return "a durable version is lost"
    if state.tag and state.tag not in {version.number for version in state.visible}:
        return "a tagged version is collected"
    if state.visible and state.latest not in {version.number for version in state.visible}:
        return "latest means nothing"
    return ""


def _goes_back(before: State, after: State) -> str:
    return "latest goes back" if after.latest < before.latest and not after.was_lost else ""


def _trace(came_from: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    labels = []
    while (step := came_from[state]) is not None:
        state, label = step
        labels.append(label)
    return tuple(reversed(labels))
