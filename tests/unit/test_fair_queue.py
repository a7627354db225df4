"""Whose turn it is, how many places each may have, and how long a call would wait."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count

import pytest

from services.rollout.fair_queue import MEMORY_SECONDS, FairQueue
from services.rollout.waiting_time import WaitingTime


class Site:
    """A queue whose sequences are named by client, call and place, and a clock."""

    def __init__(self, num_places: int) -> None:
        self.queue, self.now = FairQueue(num_places), 100.0
        self._ids = count()
        self.names: dict[int, str] = {}

    def add(self, client: str, num: int = 1, call: int = 0, *, repeatable: bool = False) -> list[int]:
        self.now += 0.001
        ids = [next(self._ids) for _ in range(num)]
        self.names |= {each: f"{client}{call}.{place}" for place, each in enumerate(ids)}
        self.queue.add(client, ids, self.now, repeatable=repeatable)
        return ids

    def take(self) -> list[str]:
        return [self.names[each] for each in self.queue.take(self.now)]

    def end(self, *ids: int) -> None:
        for each in ids:
            self.queue.end(each, self.now)

    def serve(self, ids: Sequence[int]) -> list[str]:
        """What gets places when each of `ids` ends in turn."""
        served = []
        for each in ids:
            self.end(each)
            served += self.take()
        return served


def test_a_call_alone_gets_all_places_in_order() -> None:
    site = Site(4)
    ids = site.add("a", 6)
    assert site.take() == ["a0.0", "a0.1", "a0.2", "a0.3"]
    assert site.serve(ids) == ["a0.4", "a0.5"]


def test_clients_take_turns_then_calls_then_sequences() -> None:
    site = Site(1)
    (first,) = site.add("x")
    site.take()
    site.add("a", 2, call=1)
    site.add("a", 2, call=2)
    site.add("b", 3)
    site.end(first)
    served = site.take()
    while site.queue.num_waiting:
        served += site.serve(list(site.queue.running))
    assert served == ["a1.0", "b0.0", "a2.0", "b0.1", "a1.1", "b0.2", "a2.1"]


@pytest.mark.parametrize(("num_hogs", "num_places"), [(1, 3), (2, 4)])
def test_who_comes_back_finds_a_place_beside_those_that_take_all_they_may(num_hogs: int, num_places: int) -> None:
    """Two: one whose every request is a client."""
    site = Site(8)
    polite = [site.add(f"p{number}")[0] for number in range(3)]
    site.take()
    hogs = {each for number in range(num_hogs) for each in site.add(f"hog{number}", 100)}
    # Of what three did not need, but for the last, each its share and half of the rest.
    assert len(site.take()) == num_places
    # They go and come one after the other, all at once, and for longer than anything is remembered.
    for together in (1, 3, 2) * 20:
        site.end(*polite[:together])
        assert site.take() == []
        site.now += MEMORY_SECONDS / 20
        polite[:together] = [site.add(f"p{number}")[0] for number in range(together)]
        assert len(site.take()) == together
    # Nor does somebody new wait.
    new = site.add("new")
    assert site.take() == ["new0.0"]
    site.end(*new)
    # A client that went is not waited for for ever.
    site.end(*polite)
    site.now += MEMORY_SECONDS + 1
    assert len(site.take()) == 8 - num_places
    assert len(site.queue.running & hogs) == 8


def test_requests_that_never_come_back_are_counted_as_they_were_there_at_once() -> None:
    site = Site(8)
    for number in range(50):
        ids = site.add(f"r{number}")
        site.take()
        site.end(*ids)
    site.add("hog", 100)
    # Its share, and half of the rest but for one.
    assert len(site.take()) == 4 + 1


def test_a_client_that_comes_back_keeps_no_place_for_itself() -> None:
    site = Site(8)
    for _ in range(3):
        ids = site.add("a", 100)
        assert len(site.take()) == 8
        site.end(*ids)


def test_what_others_want_is_theirs_up_to_a_share() -> None:
    site = Site(8)
    hog, ours = site.add("hog", 100), site.add("us", 3)
    # Ours have come before the first place is given.
    assert sum(name.startswith("us") for name in site.take()) == 3
    assert len(site.queue.running & set(hog)) == 4
    more = site.add("us", 50)
    for each in hog[:4]:
        site.serve([each])
    assert len(site.queue.running & {*ours, *more}) == 4


def test_places_of_one_that_was_alone_go_to_who_comes() -> None:
    site = Site(4)
    hog = site.add("hog", 100)
    site.take()
    site.add("us", 3)
    assert site.take() == []
    assert site.serve(hog[:2]) == ["us0.0", "us0.1"]


def test_a_quarter_is_never_kept_for_those_who_are_away() -> None:
    site = Site(8)
    burst = [site.add(f"p{number}")[0] for number in range(20)]
    while burst:
        site.take()
        site.end(burst.pop(0))
    site.add("hog", 100)
    assert len(site.take()) == 2


def test_what_must_give_equal_bits_is_decoded_as_on_a_server_of_its_own() -> None:
    site = Site(8)
    others = [site.add(f"p{number}")[0] for number in range(8)]
    site.take()
    site.end(*others)
    ids = site.add("run", 20, repeatable=True)
    assert len(site.take()) == 8
    # Beside somebody it is a client as others.
    site.add("us")
    site.end(*ids[:2])
    assert site.take() == (["us0.0"])


def test_what_waits_no_more_leaves_nothing_behind() -> None:
    site = Site(1)
    (running,) = site.add("a")
    site.take()
    waiting = site.add("b", 3)
    assert not site.queue.has_begun(waiting)
    site.end(*waiting, 1000)
    assert (site.queue.num_waiting, site.queue.num_of("b"), site.queue.num_of("a")) == (0, 0, 1)
    site.end(running)
    assert site.take() == []
    assert site.queue.has_begun([running])


@pytest.mark.parametrize("seed", range(20))
def test_no_place_is_idle_while_a_client_without_one_waits(seed: int) -> None:
    draw = random.Random(seed)
    site = Site(draw.choice([1, 2, 7, 16]))
    num_places = site.queue._num_places
    open_ids: list[int] = []
    for _ in range(300):
        site.now += draw.random()
        if draw.random() < 0.4:
            open_ids += site.add(draw.choice("abcdefgh"), draw.choice([1, 1, 2, 30]))
        elif open_ids:
            site.end(open_ids.pop(draw.randrange(len(open_ids))))
        copied = site.queue.copy()
        taken = site.queue.take(site.now)
        assert copied.take(site.now) == taken
        assert len(site.queue.running) <= num_places
        has_place = {site.queue._calls[each].client for each in site.queue.running}
        waiting = {call.client for each, call in site.queue._calls.items() if each not in site.queue.running}
        assert waiting <= has_place or len(site.queue.running) == num_places
    site.end(*open_ids)
    assert not site.queue._clients
    assert not site.queue._calls


def test_a_wait_is_played_forward() -> None:
    site, waiting_time = Site(2), WaitingTime()
    hog = site.add("hog", 2)
    site.take()
    queued = site.add("hog", 4, call=1)
    (ours,) = site.add("us")
    left = {hog[0]: 100, hog[1]: 40, **dict.fromkeys(queued, 60), ours: 10}
    assert waiting_time.seconds(site.queue.copy(), queued, left, site.now) == 0
    waiting_time.saw_step(0.5)
    waiting_time.saw_answer(50, cut_off=True)
    # 40 tokens at half a second each, after which it is our turn: we had none.
    assert waiting_time.seconds(site.queue.copy(), [ours], left, site.now) == pytest.approx(20)
    # Then the hog's, when ours has ended: one place is its share.
    assert waiting_time.seconds(site.queue.copy(), queued, left, site.now) == pytest.approx(50)
    assert site.queue.num_waiting == 5


def test_a_wait_beyond_what_is_played_goes_on_at_its_pace() -> None:
    site, waiting_time = Site(1), WaitingTime()
    waiting_time.saw_step(1.0)
    waiting_time.saw_answer(1, cut_off=True)
    calls = [site.add("hog", 2, call) for call in range(200)]
    site.take()
    left = {each: 10 for call in calls for each in call}
    # The first call has a sequence that runs, and one that waits until the others had their turn.
    assert waiting_time.seconds(site.queue.copy(), calls[-1], left, site.now) == pytest.approx(199 * 10, rel=0.1)


def test_how_long_answers_get_is_learned_from_what_they_say_and_not_from_what_they_may() -> None:
    waiting_time, generator = WaitingTime(), random.Random(0)
    # One in a hundred tokens is an end; three in four answers are cut off at a few tokens, as tools ask for.
    for _ in range(2000):
        most = generator.choice([4, 8, 16, 4096])
        ends_after = next(number for number in count(1) if generator.random() < 0.01)
        waiting_time.saw_answer(min(ends_after, most), cut_off=ends_after > most)
    assert waiting_time.expected_tokens(4096) == pytest.approx(100, rel=0.2)
    assert waiting_time.expected_tokens(8) == pytest.approx(8, rel=0.1)
    # Who may say twice as much will hardly say more.
    assert waiting_time.expected_tokens(8192) == pytest.approx(waiting_time.expected_tokens(4096), rel=0.01)
