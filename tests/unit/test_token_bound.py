"""No text has fewer tokens than its bytes say; and of a tokenizer that may drop some nothing is said."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from foundry.model.token_bound import TokenBound

WORDS = ["The harbour is open again; café, señor, 東京."] * 2 + ["--------" * 8 + " " * 40 + "\n"] * 4


def byte_level(normalizer: normalizers.Normalizer | None = None, *, alphabet: list[str] | None = None) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet, show_progress=False
    )
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\s+|[^\s\d]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    return tokenizer


def composing() -> Tokenizer:
    """As Qwen's."""
    return byte_level(normalizers.NFC())


def without_some_bytes() -> Tokenizer:
    """As SmolLM2's: what its training never met is dropped."""
    return byte_level(alphabet=[])


def falling_back() -> Tokenizer:
    """As Llama 2's and Gemma's."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "ab", "\u2581ab"]
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581", "ab")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return tokenizer


def swallowing() -> Tokenizer:
    """One of its tokens takes all spaces beside it, as some of Phi's do."""
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)])
    return tokenizer


KINDS = [composing, without_some_bytes, falling_back, swallowing]


@cache
def made(kind: Callable[[], Tokenizer]) -> tuple[Tokenizer, TokenBound]:
    tokenizer = kind()
    return tokenizer, TokenBound(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


PIECES = [
    "the harbour",
    "----",
    " " * 40,
    "<mask>",
    "<|im_end|>",
    "é",
    "e\u0301",
    "\u1100\u1161\u11a8",
    "東",
    "👋",
    "\0",
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=20), max_size=20).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(TEXTS)
def test_no_text_has_fewer_tokens(kind: Callable[[], Tokenizer], text: str) -> None:
    tokenizer, bound = made(kind)
    assert bound.fewest(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_is_as_long_as_it_seems_is_known_to_be(kind: Callable[[], Tokenizer]) -> None:
    tokenizer, bound = made(kind)
    text = "The harbour is open again. " * 200
    assert bound.fewest(text) > len(tokenizer.encode(text).ids) / 40


def test_long_runs_that_are_one_token_do_not_hide_words() -> None:
    _, bound = made(composing)
    assert bound.fewest("-" * 6400) < 400 < bound.fewest("harbour" * 914)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Strip()),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Replace("a", "")),
        lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.Sequence([normalizers.StripAccents()])),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Whitespace()),
        lambda tokenizer: setattr(tokenizer, "pre_tokenizer", pre_tokenizers.Split("a", "removed")),
        lambda tokenizer: setattr(tokenizer, "model", models.WordLevel({"a": 0}, unk_token="a")),
        lambda tokenizer: setattr(tokenizer, "model", models.BPE({"<unk>": 0}, [], unk_token="<unk>", fuse_unk=True)),
    ],
)
def test_of_a_tokenizer_that_may_shorten_text_nothing_is_said(change: Callable[[Tokenizer], None]) -> None:
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    change(tokenizer)
    assert TokenBound(PreTrainedTokenizerFast(tokenizer_object=tokenizer)).fewest("The harbour. " * 99) == 0
