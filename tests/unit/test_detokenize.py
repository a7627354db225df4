"""Text deltas: together they are the text, no character is cut, no part of a stop string is shown."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.rollout.engine.detokenize import TextStream
from tests.tiny import SPECIAL_TOKENS, build_tokenizer

TOKENIZER = build_tokenizer()
IDS = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40)


def decode(ids: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def id_of(token: str) -> int:
    found = TOKENIZER.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def deltas(ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """What is shown for each token until the stream stops, and what remains at the end."""
    stream = TextStream(decode, stop)
    shown = []
    for token_id in ids:
        shown.append(stream.push(token_id))
        if stream.stopped:
            return shown, stream
    return [*shown, stream.flush()], stream


@given(IDS)
def test_deltas_of_any_ids_are_the_full_text(ids: list[int]) -> None:
    assert "".join(deltas(ids)[0]) == decode(ids)


@given(st.text(max_size=40))
def test_deltas_of_any_text_are_that_text(text: str) -> None:
    shown, _ = deltas(encode(text))
    assert "".join(shown) == text
    assert "\ufffd" in text or not any("\ufffd" in delta for delta in shown)


@given(st.lists(st.sampled_from([" one", " two", "three", " ", ","]), max_size=12))
def test_a_tokenizer_that_strips_the_first_space_strips_no_other(pieces: list[str]) -> None:
    # As those of SentencePiece do.
    stream = TextStream(lambda ids: "".join(pieces[index] for index in ids).removeprefix(" "))
    shown = [stream.push(index) for index in range(len(pieces))]
    assert "".join([*shown, stream.flush()]) == "".join(pieces).removeprefix(" ")


def test_a_character_of_several_tokens_comes_whole() -> None:
    ids = encode("é😀")
    assert len(ids) == 6
    shown, _ = deltas(ids)
    assert [delta for delta in shown if delta] == ["é", "😀"]
    assert shown[0] == "", "half a character was shown"


def test_a_character_cut_by_the_end_is_flushed_as_the_decoder_writes_it() -> None:
    ids = encode("a😀")[:-1]
    assert "".join(deltas(ids)[0]) == decode(ids) == "a\ufffd"


def test_special_tokens_are_not_text() -> None:
    ids = [*encode("one"), id_of(SPECIAL_TOKENS[1]), *encode("two")]
    assert "".join(deltas(ids)[0]) == "onetwo"


@pytest.mark.parametrize("stop", ["\n\n", "END", "a", "😀!"])
def test_stop_string_ends_the_text_before_it(stop: str) -> None:
    shown, stream = deltas(encode(f"xyz {stop} more"), [stop])
    assert stream.stopped
    assert "".join(shown) == "xyz "


@given(st.text(alphabet="abc", max_size=30), st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3))
def test_no_stop_string_is_ever_in_the_shown_text(text: str, stop: list[str]) -> None:
    # One character a token: every way to come upon a stop string bit by bit.
    ids = [id_of(character) for character in text]
    shown, stream = deltas(ids, stop)
    ends = [text.find(each) + len(each) for each in stop if each in text]
    assert stream.stopped == bool(ends)
    if not ends:
        assert "".join(shown) == text
        return
    # The token that completes the first stop string ends the stream, which shows what precedes the longest one there.
    seen = text[: min(ends)]
    assert len(shown) == min(ends)
    assert "".join(shown) == seen[: min(seen.find(each) for each in stop if each in seen)]


def test_text_that_only_begins_like_a_stop_string_is_held_and_then_shown() -> None:
    ids = [id_of(character) for character in "xEEN"]
    shown, stream = deltas(ids, ["END"])
    assert shown == ["x", "", "E", "", "EN"]
    assert not stream.stopped
