"""The publisher's steps. A step returns None while it can't be made."""

from __future__ import annotations

from tests.store_protocol.state import DONE, TOMBSTONE, Protocol, Publisher, State, Version, hide, with_publisher


def _acquire(protocol: Protocol, state: State, index: int) -> State | None:
    publisher = state.publishers[index]
    if not state.restored:
        return None
    if publisher.attempt < state.owner:
        return _stop(state, index)
    stale = tuple(
        sorted(number for number, attempt, _, durable in state.pending if attempt != publisher.attempt and durable)
    )
    pending = frozenset(each for each in state.pending if each[1] == publisher.attempt or each[3])
    state = state._replace(
        owner=publisher.attempt, pending=pending, newest_attempt=max(state.newest_attempt, publisher.attempt)
    )
    return _next(protocol, state, index, withdrawing=stale)


def _withdraw(protocol: Protocol, state: State, index: int) -> State | None:
    publisher = state.publishers[index]
    if publisher.withdrawing and protocol.tombstones:
        return _next(protocol, _entomb(state, publisher.withdrawing[0]), index)
    # The acquire returns.
    if publisher.attempt == state.newest_attempt and publisher.attempt > 1:
        inherited = {version.digest for version in state.visible} | {digest for _, digest in state.manifests}
        state = state._replace(inherited=frozenset(inherited))
    state = with_publisher(state, index, publisher._replace(step=protocol.publish.index("forget")))
    return _next(protocol, state, index)


def _forget(protocol: Protocol, state: State, index: int) -> State | None:
    publisher = state.publishers[index]
    if not state.restored:
        return None
    number, *others = publisher.withdrawing
    state = hide(state, number)
    state = with_publisher(state, index, publisher._replace(withdrawing=tuple(others)))
    return _goto(protocol, state, index, "withdraw")


def _reserve(protocol: Protocol, state: State, index: int) -> State | None:
    publisher = state.publishers[index]
    if not state.restored:
        return None
    if protocol.reserve_is_fenced and state.owner != publisher.attempt:
        return _stop(state, index)
    wanted = (publisher.attempt, publisher.digest, publisher.durable)
    for number, *reserved in state.pending:
        if tuple(reserved) == wanted:
            return _next(protocol, state, index, number=number)
    if protocol.reservations_ask_for_marks and publisher.durable and publisher.digest in state.marks:
        return None
    if state.counter >= state.limit:
        # Object storage first: a limit that is only in Redis is lost with it.
        raised = state.counter + 1
        if protocol.limits_are_durable and publisher.raised < raised:
            state = state._replace(stored_limit=max(state.stored_limit, raised))
            return with_publisher(state, index, publisher._replace(raised=raised))
        return state._replace(limit=raised)
    number = state.counter + 1
    if number <= state.handed_out:
        state = state._replace(broken="a number is handed out twice")
    state = state._replace(counter=number, handed_out=number, pending=state.pending | {(number, *wanted)})
    return _next(protocol, state, index, number=number)


def _put_blob(protocol: Protocol, state: State, index: int) -> State | None:
    publisher = state.publishers[index]
    if not publisher.durable:
        return _next(protocol, state, index)
    blobs, old = state.blobs | {publisher.digest}, state.old - {publisher.digest}
    return _next(protocol, state._replace(blobs=blobs, old=old), index)


def _stage(protocol: Protocol, state: State, index: int) -> State | None:
    # Hot bytes, under a name of the upload's own; written without looking at the epoch, harmless until a commit.
    return _next(protocol, state._replace(staged=state.staged | {state.publishers[index].attempt}), index)


def _put_manifest(protocol: Protocol, state: State, index: int) -> State | None:
    publisher = state.publishers[index]
    if not publisher.durable:
        return _next(protocol, state, index)
    standing = dict(state.manifests).get(publisher.number)
    if standing is None:
        manifests = state.manifests | {(publisher.number, publisher.digest)}
        return _next(protocol, state._replace(manifests=manifests), index)
    return _next(protocol, state, index) if standing == publisher.digest else _stop(state, index)


def _commit(protocol: Protocol, state: State, index: int) -> State | None:
    publisher = state.publishers[index]
    if publisher.lost_reservation:
        # Another number is next; nothing may find this one when pointers are restored.
        state = _entomb(state, publisher.number) if publisher.durable else state
        state = with_publisher(state, index, publisher._replace(lost_reservation=False))
        return _goto(protocol, state, index, "stage")
    if not state.restored:
        return None
    if protocol.commit_is_fenced and state.owner != publisher.attempt:
        return _stop(state, index)
    reservation = (publisher.number, publisher.attempt, publisher.digest, publisher.durable)
    if reservation not in state.pending:
        if any((version.number, version.digest) == reservation[::2] for version in state.visible):
            return _next(protocol, state, index)
        return with_publisher(state, index, publisher._replace(lost_reservation=True))
    if protocol.commit_asks_for_bytes and publisher.attempt not in state.staged:
        return _goto(protocol, state, index, "stage")
    return _next(protocol, _show(state, publisher), index)


PUBLISH = {
    "acquire": _acquire,
    "withdraw": _withdraw,
    "forget": _forget,
    "stage": _stage,
    "reserve": _reserve,
    "put_blob": _put_blob,
    "put_manifest": _put_manifest,
    "commit": _commit,
}


def _entomb(state: State, number: int) -> State:
    manifests = frozenset(each for each in state.manifests if each[0] != number) | {(number, TOMBSTONE)}
    return state._replace(manifests=manifests)


def _show(state: State, publisher: Publisher) -> State:
    version = Version(publisher.number, publisher.digest, publisher.durable)
    broken = "" if publisher.attempt >= state.newest_attempt else "a fenced publisher's version is visible"
    visible = frozenset(each for each in state.visible if each.number != version.number) | {version}
    latest = max(state.latest, version.number)
    hot = state.hot | ({version.digest} if publisher.attempt in state.staged else set())
    # keep_hot is 1: bytes of others leave Redis, and versions that were only there are forgotten.
    pointed = {each.digest for each in visible if each.number in (latest, state.tag)}
    spared = pointed | state.leases | {version.digest}
    trimmed = {each for each in visible if each.digest in hot and each.digest not in spared}
    return state._replace(
        visible=visible - {each for each in trimmed if not each.durable},
        hot=hot - {each.digest for each in trimmed},
        staged=state.staged - {publisher.attempt},
        latest=latest,
        pending=frozenset(each for each in state.pending if each[0] != version.number),
        meanings=state.meanings | {version[:2]},
        committed=state.committed | ({version[:2]} if version.durable else set()),
        broken=state.broken or broken,
    )


def _next(protocol: Protocol, state: State, index: int, **changes: object) -> State:
    """The publisher goes on; `changes` are its own."""
    publisher = state.publishers[index]._replace(**changes)  # type: ignore[arg-type]
    step = publisher.step + 1
    return with_publisher(state, index, publisher._replace(step=step if step < len(protocol.publish) else DONE))


def _goto(protocol: Protocol, state: State, index: int, step: str) -> State:
    return with_publisher(state, index, state.publishers[index]._replace(step=protocol.publish.index(step)))


def _stop(state: State, index: int) -> State:
    return with_publisher(state, index, state.publishers[index]._replace(step=DONE))
