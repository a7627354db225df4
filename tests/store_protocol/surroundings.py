"""Readers and taggers, the loss of Redis and its rebuilding, and time."""

from __future__ import annotations

from collections.abc import Iterator

from tests.store_protocol.state import DONE, Protocol, Reader, State, Version


def read(protocol: Protocol, state: State) -> Iterator[tuple[str, State]]:
    reader = state.reader
    if not state.restored:
        return
    if reader.step == 0:
        for found in state.visible:
            yield f"reader: resolve {found.number}", state._replace(reader=Reader(1, found))
    elif reader.step == 1 and reader.found is not None:
        if not (protocol.leases_ask_for_marks and reader.found.digest in state.marks):
            leases = state.leases | {reader.found.digest}
            yield "reader: lease", state._replace(leases=leases, reader=reader._replace(step=2))
    elif reader.step == 2 and reader.found is not None:
        # By digest, so nothing but these bytes or NOT_FOUND comes back; the latter only if the version was collected.
        readable = reader.found.digest in state.hot | state.blobs
        broken = "" if readable or reader.found not in state.visible else "a visible version has no bytes"
        yield (
            "reader: fetch",
            state._replace(leases=state.leases - {reader.found.digest}, reader=Reader(), broken=state.broken or broken),
        )


def tag(state: State) -> Iterator[tuple[str, State]]:
    """Tags number 1."""
    if state.tagger == 0 and state.restored:
        there = any(version.number == 1 and version.durable for version in state.visible)
        yield "tagger: tag in Redis", state._replace(tag=1 if there else state.tag, tagger=1 if there else DONE)
    elif state.tagger == 1:
        yield "tagger: tag in storage", state._replace(stored_tag=1, tagger=DONE)


def without_redis(protocol: Protocol, state: State) -> State:
    empty = State()
    # A rebuild whose token is gone begins anew.
    going_on = not protocol.rebuilds_have_tokens
    return state._replace(
        restored=False,
        owner=0,
        counter=0,
        limit=0,
        pending=empty.pending,
        visible=empty.visible,
        latest=0,
        tag=0,
        hot=empty.hot,
        staged=empty.staged,
        leases=empty.leases,
        marks=empty.marks,
        rebuilding=state.rebuilding if going_on else None,
        rewritten=state.rewritten and going_on,
        was_lost=True,
    )


def rebuild(protocol: Protocol, state: State) -> Iterator[tuple[str, State]]:
    if state.restored:
        return
    if state.rebuilding is None:
        whole = frozenset(each for each in state.manifests if each[1] in state.blobs)
        read = (whole, state.stored_limit, state.stored_tag)
        # The marks were read before.
        yield "rebuild: read", state._replace(rebuilding=read, marks=state.recorded)
        return
    if state.rewritten:
        broken = state.broken or _shown_again(state, state.visible)
        yield "rebuild: finish", state._replace(restored=True, rebuilding=None, rewritten=False, broken=broken)
        return
    manifests, limit, tag = state.rebuilding
    visible = frozenset(Version(number, digest, True) for number, digest in manifests)
    latest = max((version.number for version in visible), default=0)
    yield (
        "rebuild: restore",
        state._replace(
            rewritten=True,
            # The attempt in object storage (runs/<id>/attempts) is the newest that was given out.
            owner=state.newest_attempt,
            counter=limit if protocol.rebuild_begins_at_the_limit else latest,
            limit=limit,
            visible=visible,
            latest=latest,
            tag=tag if any(version.number == tag for version in visible) else 0,
            meanings=state.meanings | manifests,
        ),
    )


def _shown_again(state: State, visible: frozenset[Version]) -> str:
    if state.inherited is None:
        return ""
    newest = {publisher.digest for publisher in state.publishers if publisher.attempt == state.newest_attempt}
    late = {version.digest for version in visible} - state.inherited - newest
    return "a fenced publisher's version is visible" if late else ""


def time_passes(protocol: Protocol, state: State) -> Iterator[tuple[str, State]]:
    """Marks of the dead end, bytes that no commit took go, blobs age."""
    if state.collector.step < 0 and (state.marks or state.recorded):
        yield "marks of the dead end", state._replace(marks=frozenset(), recorded=frozenset())
    if state.staged:
        yield "staged bytes expire", state._replace(staged=frozenset())
    # Old means: beyond the grace period when the collection begins.
    starting = state.collector.step >= 0 and protocol.collect[state.collector.step] in ("retire", "list_manifests")
    if starting and (young := state.blobs - state.old):
        in_flight = {
            publisher.digest
            for publisher in state.publishers
            if protocol.publish.index("put_blob") < publisher.step <= protocol.publish.index("put_manifest")
        }
        if young - in_flight:
            yield "blobs age", state._replace(old=state.old | (young - in_flight))
