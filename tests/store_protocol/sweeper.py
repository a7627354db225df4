"""The sweeper's steps. A step returns None while it can't be made."""

from __future__ import annotations

from tests.store_protocol.state import TOMBSTONE, Protocol, State, Sweeper, hide


def _retire(protocol: Protocol, state: State) -> State | None:
    number = state.sweeper.retiring
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
        return _swept(state, retiring=0)
    if state.latest == number:
        state = state._replace(broken="latest is swept")
    if state.tag == number:
        state = state._replace(broken="a tagged version is swept")
    return _swept(
        state._replace(visible=state.visible - {version}, committed=state.committed - {(number, version.digest)})
    )


def _delete_manifest(protocol: Protocol, state: State) -> State | None:
    number = state.sweeper.retiring
    return _swept(
        state._replace(manifests=frozenset(each for each in state.manifests if not number or each[0] != number))
    )


def _forget_retired(protocol: Protocol, state: State) -> State | None:
    if not state.restored:
        return None
    number = state.sweeper.retiring
    if number and state.tag == number:
        state = state._replace(broken="a tagged version is swept")
    return _swept(hide(state, number) if number else state)


def _list_manifests(protocol: Protocol, state: State) -> State | None:
    return _swept(state, listed=state.manifests)


def _forget_withdrawn(protocol: Protocol, state: State) -> State | None:
    if not state.restored:
        return None
    for number, digest in state.sweeper.listed:
        if digest == TOMBSTONE and any(each.number == number and each.durable for each in state.visible):
            state = hide(state, number)
    return _swept(state)


def _list_blobs(protocol: Protocol, state: State) -> State | None:
    needed = {digest for _, digest in state.sweeper.listed}
    return _swept(state, digests=state.old - needed)


def _record(protocol: Protocol, state: State) -> State | None:
    return _swept(state._replace(recorded=state.sweeper.digests if protocol.marks_are_durable else frozenset()))


def _condemn(protocol: Protocol, state: State) -> State | None:
    if not state.restored:
        return None
    refused = {version.digest for version in state.visible} & state.hot
    if protocol.marks_ask_for_leases:
        refused |= state.leases
    if protocol.marks_ask_for_reservations:
        refused |= {digest for _, _, digest, _ in state.pending}
    condemned = state.sweeper.digests - refused
    return _swept(state._replace(marks=state.marks | condemned), digests=condemned)


def _recheck(protocol: Protocol, state: State) -> State | None:
    named = {digest for _, digest in state.manifests - state.sweeper.listed}
    return _swept(state, digests=state.sweeper.digests - named)


def _head(protocol: Protocol, state: State) -> State | None:
    return _swept(state, digests=state.sweeper.digests & state.old)


def _delete(protocol: Protocol, state: State) -> State | None:
    digests = state.sweeper.digests
    if digests & state.leases & state.blobs:
        state = state._replace(broken="leased bytes are swept")
    return _swept(state._replace(blobs=state.blobs - digests, old=state.old - digests))


def _absolve(protocol: Protocol, state: State) -> State | None:
    if not state.restored:
        return None
    return state._replace(marks=frozenset(), recorded=frozenset(), sweeper=Sweeper())


SWEEP = {
    "retire": _retire,
    "delete_manifest": _delete_manifest,
    "forget_retired": _forget_retired,
    "list_manifests": _list_manifests,
    "forget_withdrawn": _forget_withdrawn,
    "list_blobs": _list_blobs,
    "record": _record,
    "condemn": _condemn,
    "recheck": _recheck,
    "head": _head,
    "delete": _delete,
    "absolve": _absolve,
}


def _swept(state: State, **changes: object) -> State:
    """The sweeper goes on; `changes` are its own."""
    sweeper = state.sweeper._replace(**changes)  # type: ignore[arg-type]
    return state._replace(sweeper=sweeper._replace(step=sweeper.step + 1))
