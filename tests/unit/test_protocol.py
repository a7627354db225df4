"""The protocol keeps its promises in every interleaving, and each part of it is needed: without it one is broken."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from tests.store_protocol.explorer import explore
from tests.store_protocol.state import DEAD, DONE, Collector, Protocol, Publisher, Reader, State, Version
from tests.store_protocol.surroundings import without_redis

PROTOCOL = Protocol()
GC_BLOBS = Collector(step=PROTOCOL.collect.index("list_manifests"))
ACCIDENTS: dict[str, Any] = {"crashes_left": 1, "losses_left": 1}

FIRST, SECOND = Publisher(1, "a", durable=True), Publisher(2, "b", durable=True)
# Two attempts of a run, the second takes over at any moment; a reader; one of all dies, and Redis is lost.
TAKEOVER = State(publishers=(FIRST, SECOND), **ACCIDENTS)
HOT_TAKEOVER = State(
    publishers=(FIRST._replace(durable=False), SECOND._replace(durable=False)), reader=Reader(0), **ACCIDENTS
)
# A publisher's bytes have been in storage for long, and a collector is about to delete them.
ORPHAN = State(
    publishers=(FIRST,),
    collector=GC_BLOBS,
    blobs=frozenset("a"),
    old=frozenset("a"),
    reader=Reader(0),
    **ACCIDENTS,
)
# Two durable versions, the older of which is beyond retention; its bytes are published again meanwhile.
_BOTH = frozenset({(1, "a"), (2, "b")})
RETENTION = State(
    owner=1,
    counter=2,
    limit=3,
    stored_limit=3,
    handed_out=2,
    newest_attempt=1,
    visible=frozenset({Version(1, "a", True), Version(2, "b", True)}),
    latest=2,
    blobs=frozenset("ab"),
    old=frozenset("ab"),
    manifests=_BOTH,
    meanings=_BOTH,
    committed=_BOTH,
    collector=Collector(0, retiring=1),
    publishers=(FIRST,),
    **ACCIDENTS,
)
READ_WHILE_RETIRED = RETENTION._replace(publishers=(), reader=Reader(0))
TAGGED_WHILE_RETIRED = RETENTION._replace(publishers=(), tagger=0, losses_left=0)
ONLY_VERSION = RETENTION._replace(
    publishers=(),
    visible=frozenset({Version(1, "a", True)}),
    latest=1,
    manifests=frozenset({(1, "a")}),
    meanings=frozenset({(1, "a")}),
    committed=frozenset({(1, "a")}),
)
# The first attempt died between manifest and commit; the second and a collector meet that.
LEFT_BEHIND = State(
    owner=1,
    counter=1,
    limit=2,
    stored_limit=2,
    handed_out=1,
    newest_attempt=1,
    pending=frozenset({(1, 1, "a", True)}),
    blobs=frozenset("a"),
    old=frozenset("a"),
    staged=frozenset({1}),
    manifests=frozenset({(1, "a")}),
    publishers=(FIRST._replace(step=DEAD, number=1), SECOND),
    collector=GC_BLOBS,
    **ACCIDENTS,
)
# Lost once; the other loss may come while it is restored.
EMPTIED = without_redis(PROTOCOL, RETENTION._replace(collector=Collector()))
SCENARIOS = {
    "takeover": TAKEOVER,
    "hot takeover": HOT_TAKEOVER,
    "orphan": ORPHAN,
    "retention": RETENTION,
    "read while retired": READ_WHILE_RETIRED,
    "tagged while retired": TAGGED_WHILE_RETIRED,
    "only version": ONLY_VERSION,
    "left behind": LEFT_BEHIND,
    "emptied": EMPTIED,
}
# All actors at once: a minute or two.
EVERYBODY = TAKEOVER._replace(collector=GC_BLOBS, blobs=frozenset("a"), old=frozenset("a"), limit=2, stored_limit=2)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_interleaving_keeps_the_promises(scenario: str) -> None:
    explored = explore(PROTOCOL, SCENARIOS[scenario])
    assert explored.violation is None, explored.violation
    # The scenario did not stop at its first step.
    assert explored.num_states > 50


@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "nightly", reason="takes minutes: nightly")
def test_every_interleaving_of_everybody_keeps_the_promises() -> None:
    explored = explore(PROTOCOL, EVERYBODY)
    assert explored.violation is None, explored.violation


def _before(steps: tuple[str, ...], step: str, other: str) -> tuple[str, ...]:
    """The same steps, but `step` just before `other`."""
    remaining = [each for each in steps if each != step]
    remaining.insert(remaining.index(other), step)
    return tuple(remaining)


def _without(steps: tuple[str, ...], *left_out: str) -> tuple[str, ...]:
    return tuple(each for each in steps if each not in left_out)


NO_BYTES = "a visible version has no bytes"
NO_BLOB = "a manifest names no blob"
LOST = "a durable version is lost"
FENCED = "a fenced publisher's version is visible"
TWICE = "a number is handed out twice"


@pytest.mark.parametrize(
    ("start", "changes", "broken"),
    [
        pytest.param(
            TAKEOVER,
            {"publish": _before(PROTOCOL.publish, "commit", "put_blob")},
            NO_BYTES,
            id="commit before bytes",
        ),
        pytest.param(HOT_TAKEOVER, {"commit_asks_for_bytes": False}, NO_BYTES, id="commit does not ask for bytes"),
        pytest.param(
            TAKEOVER,
            {"publish": _before(PROTOCOL.publish, "put_manifest", "put_blob")},
            NO_BLOB,
            id="manifest before blob",
        ),
        pytest.param(
            TAKEOVER,
            {"publish": _before(PROTOCOL.publish, "commit", "put_manifest")},
            LOST,
            id="commit before manifest",
        ),
        pytest.param(TAKEOVER, {"commit_is_fenced": False}, FENCED, id="no fence at commit"),
        pytest.param(TAKEOVER, {"reserve_is_fenced": False}, FENCED, id="no fence at reserve"),
        pytest.param(TAKEOVER, {"tombstones": False}, FENCED, id="no tombstones"),
        pytest.param(TAKEOVER, {"limits_are_durable": False}, TWICE, id="limits in Redis only"),
        pytest.param(TAKEOVER, {"rebuild_begins_at_the_limit": False}, TWICE, id="rebuild begins at latest"),
        pytest.param(EMPTIED, {"rebuilds_have_tokens": False}, LOST, id="rebuild goes on after a loss"),
        pytest.param(ORPHAN, {"collect": _without(PROTOCOL.collect, "mark")}, NO_BLOB, id="no mark"),
        pytest.param(
            READ_WHILE_RETIRED, {"leases_ask_for_marks": False}, "leased bytes are collected", id="leases ignore marks"
        ),
        pytest.param(ORPHAN, {"reservations_ask_for_marks": False}, NO_BLOB, id="reservations ignore marks"),
        pytest.param(
            READ_WHILE_RETIRED, {"marks_ask_for_leases": False}, "leased bytes are collected", id="marks ignore leases"
        ),
        pytest.param(ORPHAN, {"marks_ask_for_reservations": False}, NO_BLOB, id="marks ignore reservations"),
        pytest.param(ORPHAN, {"marks_are_durable": False}, NO_BYTES, id="marks in Redis only"),
        # Either alone is enough while a blob is put again with each publication; both are kept.
        pytest.param(
            ORPHAN,
            {"collect": _without(PROTOCOL.collect, "recheck", "head")},
            NO_BYTES,
            id="no second look after the mark",
        ),
        pytest.param(
            ORPHAN,
            {"collect": _before(PROTOCOL.collect, "list_blobs", "list_manifests")},
            NO_BYTES,
            id="blobs listed before manifests",
        ),
        pytest.param(
            RETENTION, {"collect": _without(PROTOCOL.collect, "forget_retired")}, NO_BYTES, id="Redis not asked again"
        ),
        pytest.param(
            RETENTION,
            {"collect": _before(PROTOCOL.collect, "delete_manifest", "retire")},
            LOST,
            id="manifest deleted before Redis agreed",
        ),
        pytest.param(
            LEFT_BEHIND,
            {"collect": _without(PROTOCOL.collect, "forget_withdrawn")},
            NO_BYTES,
            id="withdrawn not forgotten",
        ),
        pytest.param(
            TAGGED_WHILE_RETIRED, {"retiring_asks_for_tags": False}, "a tagged version is collected", id="tags ignored"
        ),
        pytest.param(ONLY_VERSION, {"retiring_asks_for_latest": False}, "latest is collected", id="latest ignored"),
    ],
)
def test_without_a_part_of_it_a_promise_is_broken(start: State, changes: dict[str, object], broken: str) -> None:
    explored = explore(replace(PROTOCOL, **changes), start)  # type: ignore[arg-type]
    assert explored.violation is not None
    assert explored.violation.promise == broken, explored.violation


def test_what_is_not_promised_is_so_because_it_does_not_hold() -> None:
    """The exceptions that docs/store-protocol.md names are real ones: two losses of Redis, a tag during a loss."""
    two_losses = explore(PROTOCOL, TAKEOVER._replace(crashes_left=0, losses_left=2))
    assert two_losses.violation is not None
    assert two_losses.violation.promise == FENCED
    tag_and_loss = explore(PROTOCOL, TAGGED_WHILE_RETIRED._replace(crashes_left=0, losses_left=1))
    assert tag_and_loss.violation is not None
    assert "collected" in tag_and_loss.violation.promise


def test_the_scenarios_begin_where_they_say() -> None:
    assert TAKEOVER.collector.step == DONE
    assert PROTOCOL.collect[ORPHAN.collector.step] == "list_manifests"
