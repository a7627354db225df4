"""Text deltas: together they are the text, no character is cut, no part of a stop string is shown."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders
from tokenizers.pre_tokenizers import ByteLevel

from services.rollout.engine import SamplingParams
from services.rollout.engine.answer import AnswerProgress
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


def spelled(text: str) -> list[str]:
    """Byte by byte, however these could be merged."""
    return [character for part, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(text) for character in part]


def offsets(ids: Sequence[int], stop: Sequence[str] = ()) -> list[int]:
    """Of tokens until the answer ends."""
    sampling = SamplingParams(max_new_tokens=len(ids), stop=tuple(stop))
    progress, found = AnswerProgress(sampling, decode, {id_of("<|im_end|>")}), []
    for token_id in ids:
        _, reason = progress.append(token_id)
        found.append(progress.text_offset)
        if reason is not None:
            break
    return found


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), min_size=1, max_size=6)


@given(st.lists(st.tuples(WORDS | st.sampled_from([" the", "’", "😀", "END"]), st.booleans()), min_size=1, max_size=8))
def test_a_token_begins_where_the_character_of_its_first_byte_does(words: list[tuple[str, bool]]) -> None:
    ids, begins, text = [], [], ""
    for word, in_bytes in words:
        some = [id_of(each) for each in spelled(word)] if in_bytes else encode(word)
        num_bytes = 0
        for token_id in some:
            ids.append(token_id)
            # Of the characters before it those count that are whole.
            begins.append(len(text) + len(word.encode()[:num_bytes].decode(errors="ignore")))
            num_bytes += len(TOKENIZER.convert_ids_to_tokens(token_id))
        text += word
    assert offsets(ids) == begins
    # Whether something is held back for a stop string, and where the answer is cut, changes none.
    for stop in ("END", "’x", text[len(text) // 2 :]):
        found = offsets(ids, [stop])
        assert found == begins[: len(found)]
        assert len(found) == len(ids) or stop in text


@given(IDS.filter(bool))
def test_in_any_stream_a_tokens_text_stands_at_its_offset(ids: list[int]) -> None:
    found, text = offsets(ids), decode(ids)
    assert found == sorted(found)
    for token_id, offset in zip(ids, found, strict=False):
        own = decode([token_id])
        if "\ufffd" not in own:
            assert text[offset : offset + len(own)] == own
        else:
            assert text[offset : offset + 1]


def test_byte_tokens_that_decode_together_share_a_place() -> None:
    # As of SentencePiece: a run of bytes is one text, or a replacement character for each.
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    pieces = ["a", "<0xE2>", "<0x80>", "<0x99>", "b", "<0xE2>", "<0x80>", "c"]
    stream, found = TextStream(lambda ids: str(decoder.decode([pieces[index] for index in ids]))), []
    for index in range(len(pieces)):
        stream.push(index)
        found.append(stream.offset)
    assert found == [0, 1, 1, 1, 2, 3, 3, 5]
    assert decoder.decode(pieces) == "a’b\ufffd\ufffdc"


def test_an_end_token_stands_behind_the_text() -> None:
    ids = [*encode("a😀")[:-1], id_of("<|im_end|>")]
    assert decode(ids) == "a\ufffd"
    assert offsets(ids)[-1] == 2
