"""The protocol's steps and safeguards, its actors, and what Redis and object storage hold."""

from __future__ import annotations

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
    collect: tuple[str, ...] = (
        "retire",
        "delete_manifest",
        "forget_retired",
        "list_manifests",
        "forget_withdrawn",
        "list_blobs",
        "record",
        "mark",
        "recheck",
        "head",
        "delete",
        "unmark",
    )
    reserve_is_fenced: bool = True
    commit_is_fenced: bool = True
    tombstones: bool = True
    commit_asks_for_bytes: bool = True
    limits_are_durable: bool = True
    rebuild_begins_at_the_limit: bool = True
    rebuilds_have_tokens: bool = True
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


class Collector(NamedTuple):
    """`step` indexes Protocol.collect; `retiring` is the number beyond retention, 0 for none."""

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
    # Object storage. `old` blobs are beyond the grace period, `recorded` are the digests that a collector may delete.
    stored_limit: int = 0
    blobs: frozenset[str] = frozenset()
    old: frozenset[str] = frozenset()
    manifests: frozenset[tuple[int, str]] = frozenset()
    stored_tag: int = 0
    recorded: frozenset[str] = frozenset()
    # Actors
    publishers: tuple[Publisher, ...] = ()
    collector: Collector = Collector()
    reader: Reader = Reader()
    # 0: to be set, 1: set in Redis
    tagger: int = DONE
    # What a rebuild has read, if one is under way, and whether it has written that to Redis.
    rebuilding: tuple[frozenset[tuple[int, str]], int, int] | None = None
    rewritten: bool = False
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


def with_publisher(state: State, index: int, publisher: Publisher) -> State:
    before, after = state.publishers[:index], state.publishers[index + 1 :]
    return state._replace(publishers=(*before, publisher, *after))


def hide(state: State, number: int) -> State:
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
