"""How the gateway writes tokens and where they stand."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from services.gateway.openai.tokens import TokenSpelling, by_text, finite, places_of
from tests.tiny import build_tokenizer


def test_byte_level_tokens_are_spelt_with_their_bytes(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    spelling = TokenSpelling(tmp_path / "tokenizer.json")
    text = "The treaty, signé à 東京 🎏"
    spelt = [spelling.spell(token_id) for token_id in tokenizer.encode(text)]
    assert b"".join(bytes(content or []) for _, content in spelt).decode() == text
    assert spelt[0][0] == bytes(spelt[0][1] or []).decode()
    assert (r"bytes:\xf0", [0xF0]) in spelt
    # None is spelled as another.
    assert len({spelling.spell(token_id)[0] for token_id in range(len(tokenizer))}) == len(tokenizer)
    assert spelling.spell(2) == ("<|im_end|>", list(b"<|im_end|>"))


def test_sentencepiece_tokens_are_spelt_with_their_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"\u2581The": 0, "<0xE6>": 1, "</s>": 2}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    spelling = TokenSpelling(tmp_path / "tokenizer.json")
    assert spelling.spell(0) == (" The", list(b" The"))
    assert spelling.spell(1) == (r"bytes:\xe6", [0xE6])
    assert spelling.spell(2) == ("</s>", list(b"</s>"))
    assert spelling.spell(3) == ("token_id:3", None)
    assert TokenSpelling(None).spell(0) == ("token_id:0", None)


def test_tokens_that_are_spelled_alike_are_all_reported() -> None:
    # As "A" and <0x41> of SentencePiece. The first keeps the text, and may come again among its alternatives.
    told = [(7, "A", -1.0), (9, "B", -0.5), (7, "A", -1.0), (8, "A", -2.0)]
    assert by_text(told) == {"A": -1.0, "B": -0.5, "token_id:8": -2.0}


def test_tokens_of_one_character_share_its_place() -> None:
    text = [b"a", "é".encode()[:1], "é".encode()[1:], b"", "bç".encode()[:2], "ç!".encode()[1:], b"?", b"\x80"]
    assert places_of([*map(list, text), None, list(b"z")]) == [0, 1, 1, 2, 2, 3, 5, 5, 6, 6]


def test_impossible_tokens_have_a_logprob_that_json_can_write() -> None:
    assert (finite(float("-inf")), finite(-1.5)) == (-9999.0, -1.5)
