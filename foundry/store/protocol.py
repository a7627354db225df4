"""The store's protocol as a state machine small enough to try every interleaving, and why it is right.

What is promised. (1) A version that Redis shows can be read: its bytes are complete. (2) A name and version mean one
digest for ever; numbers are not used twice. (3) `latest` goes forward; after a loss of Redis it is the newest version
that object storage holds, and no durable version is lost. (4) Once a new owner has acquired a name, nothing of its
predecessor becomes visible. (5) What is latest, tagged or leased is not swept. The order of steps is the argument:

Bytes, manifest, pointer. A publisher sends the hot bytes to keys of its own, reserves a number, writes the blob, then
the manifest, then commits. The commit is one script: it checks fence, reservation and that all hot bytes are there,
moves them under their digest, shows the version, moves `latest` and announces. A crash before it leaves garbage,
never a pointer to garbage; a reader sees the version before or the whole new one, and fetches by digest, so that even
a race with the sweeper gives it the right bytes or NOT_FOUND. Rebuilding reads manifests only: one stands only where
the blob was written before, and is left out if the blob is gone all the same.

Fences. Acquiring raises the owner's attempt. Reserve and commit refuse everybody else, in the same script that acts:
at reserve a replaced publisher stops early; at commit is where it counts. A fence in Redis can't stop a manifest that
is on its way, so the new owner writes a tombstone over each number that its predecessors had reserved, before its
acquire returns: the late conditional put then fails. Tombstones stay for ever; they are a few bytes for each
publication that was cut off, and one is needed as long as its publisher may wake up.

Numbers. A number is handed out only below a limit that stands in object storage, and a rebuild begins at the limit,
so that numbers of versions that were lost with Redis, or only promised, are skipped.

Sweeper against publisher. A blob goes in this order: list manifests, list old blobs that none of them names, record
the digests in object storage, mark them in Redis (refused while the digest is leased, reserved or hot), list the
manifests that are new, look at the blob again, delete it, lift the mark. Publishers reserve before they write the
blob, whoever makes a hot version durable leases it, readers may lease too; all that is refused while the mark stands.
So either the mark is refused, or the publisher waits, or it had ended before, and then its manifest is new and its
blob young. The record in object storage lets a rebuild restore marks: a publisher that meets an empty Redis must not
write a blob that a sweeper, which has not noticed the loss, is about to delete. Durable versions leave Redis first
(which refuses), object storage second, and Redis once more, for a rebuild in between may have read the manifest.

Clocks are trusted in three places. A lease outlives the work under it. A mark outlives the deletion under it: none
begins 60 of its 300 seconds after it was set. The grace period is longer than the time between a publisher's blob and
its manifest.

What is not promised. Redis lost while a new owner's tombstone is on its way shows the predecessor's version again (it
is whole) until the tombstone is followed by `forget`; if the owner dies in between, the sweeper forgets it. Redis
lost before a predecessor's late manifest, and lost once more before the sweeper has removed that: it is shown, whole,
with a number that nobody else has. A tag that is set between a loss of Redis and the end of a deletion that began
before the loss goes with its version. A reader without Redis may see a version between its manifest and its commit.

Each part of the argument is a switch in `Protocol`; the tests turn them off one by one and see which promise breaks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

TOMBSTONE = ""
DONE, DEAD = -1, -2


@dataclass(frozen=True, slots=True)
class Protocol:
    """The order of steps, and the safeguards."""

    publish: tuple[str, ...] = (
        "acquire",
        "withdraw",
        "forget",
        "stage",
        "reserve",
        "put_blob",
        "put_manifest",
        "commit",
    )
    sweep: tuple[str, ...] = (
        "retire",
        "delete_manifest",
        "forget_retired",
        "list_manifests",
        "forget_withdrawn",
        "list_blobs",
        "record",
        "condemn",
        "recheck",
        "head",
        "delete",
        "absolve",
    )
    reserve_is_fenced: bool = True
    commit_is_fenced: bool = True
    tombstones: bool = True
    commit_asks_for_bytes: bool = True
    limits_are_durable: bool = True
    rebuild_begins_at_the_limit: bool = True
    leases_ask_for_marks: bool = True
    reservations_ask_for_marks: bool = True
    marks_ask_for_leases: bool = True
    marks_ask_for_reservations: bool = True
    marks_are_durable: bool = True
    retiring_asks_for_tags: bool = True
    retiring_asks_for_latest: bool = True


class Version(NamedTuple):
    number: int
    digest: str
    durable: bool


class Publisher(NamedTuple):
    """`step` indexes Protocol.publish; `withdrawing` are numbers of predecessors that need a tombstone."""

    attempt: int
    digest: str
    durable: bool
    step: int = 0
    number: int = 0
    raised: int = 0
    withdrawing: tuple[int, ...] = ()
    lost_reservation: bool = False


class Sweeper(NamedTuple):
    """`step` indexes Protocol.sweep; `retiring` is the number beyond retention, 0 for none."""

    step: int = DONE
    retiring: int = 0
    listed: frozenset[tuple[int, str]] = frozenset()
    digests: frozenset[str] = frozenset()


class Reader(NamedTuple):
    """Resolves a version, leases the digest, fetches."""

    step: int = DONE
    found: Version | None = None


class State(NamedTuple):
    """Of one name. Blobs and hot bytes in here are complete; what is being written is not there yet."""

    # Redis. `restored` is false from the moment in which all of it is lost.
    restored: bool = True
    owner: int = 0
    counter: int = 0
    limit: int = 0
    pending: frozenset[tuple[int, int, str, bool]] = frozenset()
    visible: frozenset[Version] = frozenset()
    latest: int = 0
    tag: int = 0
    hot: frozenset[str] = frozenset()
    staged: frozenset[int] = frozenset()
    leases: frozenset[str] = frozenset()
    marks: frozenset[str] = frozenset()
    # Object storage. `old` blobs are beyond the grace period, `recorded` are the digests that a sweeper may delete.
    stored_limit: int = 0
    blobs: frozenset[str] = frozenset()
    old: frozenset[str] = frozenset()
    manifests: frozenset[tuple[int, str]] = frozenset()
    stored_tag: int = 0
    recorded: frozenset[str] = frozenset()
    # Actors
    publishers: tuple[Publisher, ...] = ()
    sweeper: Sweeper = Sweeper()
    reader: Reader = Reader()
    # 0: to be set, 1: set in Redis
    tagger: int = DONE
    # What a rebuild has read, if one is under way.
    rebuilding: tuple[frozenset[tuple[int, str]], int, int] | None = None
    crashes_left: int = 0
    losses_left: int = 0
    was_lost: bool = False
    # What nobody knows but the promises speak of: numbers handed out, meanings, durable versions that were committed,
    # the newest attempt that asked for the name, and the digests of predecessors that stood when its acquire returned.
    handed_out: int = 0
    meanings: frozenset[tuple[int, str]] = frozenset()
    committed: frozenset[tuple[int, str]] = frozenset()
    newest_attempt: int = 0
    inherited: frozenset[str] | None = None
    broken: str = ""


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
        return "a tagged version is swept"
    if state.visible and state.latest not in {version.number for version in state.visible}:
        return "latest means nothing"
    return ""


def _goes_back(before: State, after: State) -> str:
    return "latest goes back" if after.latest < before.latest and not after.was_lost else ""


def steps(protocol: Protocol, state: State) -> Iterator[tuple[str, State]]:
    """What can happen next: every actor's next step, and every accident."""
    for index, publisher in enumerate(state.publishers):
        if publisher.step >= 0:
            step = protocol.publish[publisher.step]
            if (after := _PUBLISH[step](protocol, state, index)) is not None:
                yield f"publisher {publisher.attempt}: {step}", after
            if state.crashes_left:
                dead = publisher._replace(step=DEAD)
                yield (
                    f"publisher {publisher.attempt} dies",
                    _with(state._replace(crashes_left=state.crashes_left - 1), index, dead),
                )
    if state.sweeper.step >= 0:
        step = protocol.sweep[state.sweeper.step]
        if (after := _SWEEP[step](protocol, state)) is not None:
            yield f"sweeper: {step}", after
        if state.crashes_left:
            dead_sweeper = state.sweeper._replace(step=DEAD)
            yield "sweeper dies", state._replace(sweeper=dead_sweeper, crashes_left=state.crashes_left - 1)
    yield from _read(protocol, state)
    yield from _tag(state)
    yield from _rebuild(protocol, state)
    yield from _time_passes(protocol, state)
    if state.losses_left:
        yield "Redis is lost", _without_redis(state)._replace(losses_left=state.losses_left - 1)


# Publishers. A step returns None while it can't be made.


def _with(state: State, index: int, publisher: Publisher) -> State:
    before, after = state.publishers[:index], state.publishers[index + 1 :]
    return state._replace(publishers=(*before, publisher, *after))


def _next(protocol: Protocol, state: State, index: int, **changes: object) -> State:
    """The publisher goes on; `changes` are its own."""
    publisher = state.publishers[index]._replace(**changes)  # type: ignore[arg-type]
    step = publisher.step + 1
    return _with(state, index, publisher._replace(step=step if step < len(protocol.publish) else DONE))


def _goto(protocol: Protocol, state: State, index: int, step: str) -> State:
    return _with(state, index, state.publishers[index]._replace(step=protocol.publish.index(step)))


def _stop(state: State, index: int) -> State:
    return _with(state, index, state.publishers[index]._replace(step=DONE))


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
    state = _with(state, index, publisher._replace(step=protocol.publish.index("forget")))
    return _next(protocol, state, index)


def _entomb(state: State, number: int) -> State:
    manifests = frozenset(each for each in state.manifests if each[0] != number) | {(number, TOMBSTONE)}
    return state._replace(manifests=manifests)


def _forget(protocol: Protocol, state: State, index: int) -> State | None:
    publisher = state.publishers[index]
    if not state.restored:
        return None
    number, *others = publisher.withdrawing
    state = _hide(state, number)
    state = _with(state, index, publisher._replace(withdrawing=tuple(others)))
    return _goto(protocol, state, index, "withdraw")


def _hide(state: State, number: int) -> State:
    """FORGET: a version whose manifest is gone goes from Redis."""
    visible = frozenset(version for version in state.visible if version.number != number)
    return state._replace(
        pending=frozenset(each for each in state.pending if each[0] != number),
        visible=visible,
        # It can be visible only because a rebuild read its manifest, and then latest goes back to what storage holds.
        latest=max((version.number for version in visible), default=0) if state.latest == number else state.latest,
        tag=0 if state.tag == number else state.tag,
        committed=frozenset(each for each in state.committed if each[0] != number),
    )


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
            return _with(state, index, publisher._replace(raised=raised))
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
        state = _with(state, index, publisher._replace(lost_reservation=False))
        return _goto(protocol, state, index, "stage")
    if not state.restored:
        return None
    if protocol.commit_is_fenced and state.owner != publisher.attempt:
        return _stop(state, index)
    reservation = (publisher.number, publisher.attempt, publisher.digest, publisher.durable)
    if reservation not in state.pending:
        if any((version.number, version.digest) == reservation[::2] for version in state.visible):
            return _next(protocol, state, index)
        return _with(state, index, publisher._replace(lost_reservation=True))
    if protocol.commit_asks_for_bytes and publisher.attempt not in state.staged:
        return _goto(protocol, state, index, "stage")
    return _next(protocol, _show(state, publisher), index)


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


_PUBLISH = {
    "acquire": _acquire,
    "withdraw": _withdraw,
    "forget": _forget,
    "stage": _stage,
    "reserve": _reserve,
    "put_blob": _put_blob,
    "put_manifest": _put_manifest,
    "commit": _commit,
}


# The sweeper


def _swept(state: State, **changes: object) -> State:
    """The sweeper goes on; `changes` are its own."""
    sweeper = state.sweeper._replace(**changes)  # type: ignore[arg-type]
    return state._replace(sweeper=sweeper._replace(step=sweeper.step + 1))


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
    return _swept(_hide(state, number) if number else state)


def _list_manifests(protocol: Protocol, state: State) -> State | None:
    return _swept(state, listed=state.manifests)


def _forget_withdrawn(protocol: Protocol, state: State) -> State | None:
    if not state.restored:
        return None
    for number, digest in state.sweeper.listed:
        if digest == TOMBSTONE and any(each.number == number and each.durable for each in state.visible):
            state = _hide(state, number)
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


_SWEEP = {
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


# Readers, taggers, rebuilding, accidents


def _read(protocol: Protocol, state: State) -> Iterator[tuple[str, State]]:
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
        # By digest, so nothing but these bytes or NOT_FOUND comes back; the latter only if the version was swept.
        readable = reader.found.digest in state.hot | state.blobs
        broken = "" if readable or reader.found not in state.visible else "a visible version has no bytes"
        yield (
            "reader: fetch",
            state._replace(leases=state.leases - {reader.found.digest}, reader=Reader(), broken=state.broken or broken),
        )


def _tag(state: State) -> Iterator[tuple[str, State]]:
    """Tags number 1."""
    if state.tagger == 0 and state.restored:
        there = any(version.number == 1 and version.durable for version in state.visible)
        yield "tagger: tag in Redis", state._replace(tag=1 if there else state.tag, tagger=1 if there else DONE)
    elif state.tagger == 1:
        yield "tagger: tag in storage", state._replace(stored_tag=1, tagger=DONE)


def _without_redis(state: State) -> State:
    empty = State()
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
        rebuilding=None,
        was_lost=True,
    )


def _rebuild(protocol: Protocol, state: State) -> Iterator[tuple[str, State]]:
    if state.restored:
        return
    if state.rebuilding is None:
        whole = frozenset(each for each in state.manifests if each[1] in state.blobs)
        read = (whole, state.stored_limit, state.stored_tag)
        # The marks were read before.
        yield "rebuild: read", state._replace(rebuilding=read, marks=state.recorded)
        return
    manifests, limit, tag = state.rebuilding
    visible = frozenset(Version(number, digest, True) for number, digest in manifests)
    latest = max((version.number for version in visible), default=0)
    yield (
        "rebuild: restore",
        state._replace(
            restored=True,
            rebuilding=None,
            # The attempt in object storage (runs/<id>/attempts) is the newest that was given out.
            owner=state.newest_attempt,
            counter=limit if protocol.rebuild_begins_at_the_limit else latest,
            limit=limit,
            visible=visible,
            latest=latest,
            tag=tag if any(version.number == tag for version in visible) else 0,
            meanings=state.meanings | manifests,
            broken=state.broken or _shown_again(state, visible),
        ),
    )


def _shown_again(state: State, visible: frozenset[Version]) -> str:
    if state.inherited is None:
        return ""
    newest = {publisher.digest for publisher in state.publishers if publisher.attempt == state.newest_attempt}
    late = {version.digest for version in visible} - state.inherited - newest
    return "a fenced publisher's version is visible" if late else ""


def _time_passes(protocol: Protocol, state: State) -> Iterator[tuple[str, State]]:
    """Marks of the dead end, bytes that no commit took go, blobs age."""
    if state.sweeper.step < 0 and (state.marks or state.recorded):
        yield "marks of the dead end", state._replace(marks=frozenset(), recorded=frozenset())
    if state.staged:
        yield "staged bytes expire", state._replace(staged=frozenset())
    # Old means: beyond the grace period when the sweep begins.
    starting = state.sweeper.step >= 0 and protocol.sweep[state.sweeper.step] in ("retire", "list_manifests")
    if starting and (young := state.blobs - state.old):
        in_flight = {
            publisher.digest
            for publisher in state.publishers
            if protocol.publish.index("put_blob") < publisher.step <= protocol.publish.index("put_manifest")
        }
        if young - in_flight:
            yield "blobs age", state._replace(old=state.old | (young - in_flight))


def _trace(came_from: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    labels = []
    while (step := came_from[state]) is not None:
        state, label = step
        labels.append(label)
    return tuple(reversed(labels))
