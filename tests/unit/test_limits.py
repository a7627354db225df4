"""The arithmetic of limits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundry.store.api_keys import KeyLimits
from services.gateway.access.window import Window, duration

SECONDS = 60


def after(window: Window, seconds: float) -> Window:
    """The same window later, if nothing more is used. `current_left` counts to the end of the span after this one."""
    left = window.current_left - seconds
    if left > SECONDS:
        previous_left = max(0.0, window.previous_left - seconds)
        return Window(window.most, SECONDS, window.previous, previous_left, window.current, left)
    return Window(window.most, SECONDS, window.current, max(0.0, left), 0, 0.0)


@given(
    most=st.integers(1, 100),
    previous=st.integers(0, 1000),
    current=st.integers(0, 1000),
    turn=st.floats(0.01, SECONDS),
)
def test_there_is_room_when_it_was_said_and_not_before(most: int, previous: int, current: int, turn: float) -> None:
    window = Window(most, SECONDS, previous, turn, current, turn + SECONDS)
    wait = window.seconds_until_room
    assert wait is not None
    assert (wait == 0) == (window.remaining > 0)
    assert after(window, wait).seconds_until_room == 0
    if wait > 0.01:
        assert after(window, wait - 0.01).seconds_until_room != 0
    reset = after(window, window.seconds_until_reset)
    assert (reset.used, reset.remaining) == (0, most)


def test_a_limit_of_nothing_never_has_room() -> None:
    window = Window(0, SECONDS, 0, 0.0, 0, 0.0)
    assert (window.seconds_until_room, window.remaining) == (None, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0121, "13ms"), (0.9999, "1s"), (1, "1s"), (59.2, "1m0s"), (90, "1m30s"), (360, "6m0s")],
)
def test_times_are_spelt_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_key_has_its_own_limits_and_else_the_defaults() -> None:
    own = KeyLimits(requests_per_minute=0, steps_per_run=7)
    defaults = KeyLimits(requests_per_minute=5, tokens_per_minute=9)
    assert own.or_else(defaults) == KeyLimits(requests_per_minute=0, steps_per_run=7, tokens_per_minute=9)
