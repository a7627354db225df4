"""The collector's steps. A step returns None while it can't be made."""

from __future__ import annotations

from tests.store_protocol.state import TOMBSTONE, Collector, Protocol, State, hide


def _retire(protocol: Protocol, state: State) -> State | None:
    number = state.collector.retiring
    version = next((each for each in state.visible if each.number == number and each.durable), None)
    if not state.restored:
        return None
    kept = (
        version is None
        or (protocol.retiring_asks_for_latest and state.latest == number)
        or (protocol.retiring_asks_for_tags and state.tag == number)
        or version.digest in state.leases
    )
    if kept or version is None:
        return _collected(state, retiring=0)
    if state.latest == number:
        state = state._replace(broken="latest is collected")
    if state.tag == number:
        state = state._replace(broken="a tagged version is collected")
    return _collected(
        state._replace(visible=state.visible - {version}, committed=state.committed - {(number, version.digest)})
    )


def _delete_manifest(protocol: Protocol, state: State) -> State | None:
    number = state.collector.retiring
    return _collected(
        state._replace(manifests=frozenset(each for each in state.manifests if not number or each[0] != number))
    )


def _forget_retired(protocol: Protocol, state: State) -> State | None:
    if not state.restored:
        return None
    number = state.collector.retiring
    if number and state.tag == number:
        state = state._replace(broken="a tagged version is collected")
    return _collected(hide(state, number) if number else state)


def _list_manifests(protocol: Protocol, state: State) -> State | None:
    return _collected(state, listed=state.manifests)


def _forget_withdrawn(protocol: Protocol, state: State) -> State | None:
    if not state.restored:
        return None
    for number, digest in state.collector.listed:
        if digest == TOMBSTONE and any(each.number == number and each.durable for each in state.visible):
            state = hide(state, number)
    return _collected(state)


def _list_blobs(protocol: Protocol, state: State) -> State | None:
    needed = {digest for _, digest in state.collector.listed}
    return _collected(state, digests=state.old - needed)


def _record(protocol: Protocol, state: State) -> State | None:
    return _collected(state._replace(recorded=state.collector.digests if protocol.marks_are_durable else frozenset()))


def _mark(protocol: Protocol, state: State) -> State | None:
    if not state.restored:
        return None
    refused = {version.digest for version in state.visible} & state.hot
    if protocol.marks_ask_for_leases:
        refused |= state.leases
    if protocol.marks_ask_for_reservations:
        refused |= {digest for _, _, digest, _ in state.pending}
    marked = state.collector.digests - refused
    return _collected(state._replace(marks=state.marks | marked), digests=marked)


def _recheck(protocol: Protocol, state: State) -> State | None:
    named = {digest for _, digest in state.manifests - state.collector.listed}
    return _collected(state, digests=state.collector.digests - named)


def _head(protocol: Protocol, state: State) -> State | None:
    return _collected(state, digests=state.collector.digests & state.old)


def _delete(protocol: Protocol, state: State) -> State | None:
    digests = state.collector.digests
    if digests & state.leases & state.blobs:
        state = state._replace(broken="leased bytes are collected")
    return _collected(state._replace(blobs=state.blobs - digests, old=state.old - digests))


def _unmark(protocol: Protocol, state: State) -> State | None:
    if not state.restored:
        return None
    return state._replace(marks=frozenset(), recorded=frozenset(), collector=Collector())


COLLECT = {
    "retire": _retire,
    "delete_manifest": _delete_manifest,
    "forget_retired": _forget_retired,
    "list_manifests": _list_manifests,
    "forget_withdrawn": _forget_withdrawn,
    "list_blobs": _list_blobs,
    "record": _record,
    "mark": _mark,
    "recheck": _recheck,
    "head": _head,
    "delete": _delete,
    "unmark": _unmark,
}


def _collected(state: State, **changes: object) -> State:
    """The collector goes on; `changes` are its own."""
    collector = state.collector._replace(**changes)  # type: ignore[arg-type]
    return state._replace(collector=collector._replace(step=collector.step + 1))
