"""Splitting a chat template into a context (the document) and a turn (everything after it).

Student and teacher must see the same ids after their prefix. For a template T:
    context = T([system(document)])
    turn    = T([system(document), user, ...], generation prompt) minus that context
so the student reads `cartridge + turn`, the teacher `context + turn`.

The same document has the same context on every machine and every day: nothing but the messages, the tokenizer and the
clock of the settings decides what is rendered.

Control tokens are those that the template writes. Where a document or a message spells one, it is text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from foundry.errors import DocumentTooLong, DocumentUnreadable, InvalidArgument, TemplateUnsupported
from foundry.identity import content_digest
from foundry.model.literal import LiteralTokenizer, spelled
from foundry.model.pinning import clock_prefix
from foundry.model.token_bound import TokenBound
from foundry.roles import ROLES

Messages = Sequence[Mapping[str, str]]
# Two unlike documents: what their contexts share at the end is the template's closing.
_PROBES = ("Alpha.", "Omega one two three")
# Of a longer document it is looked first whether it can fit at all, and said by its beginning how dense it is.
_SAMPLE_CHARACTERS = 16 * 1024


class ChatTemplate:
    """The chat template of a tokenizer, split and checked; where it writes the date, that of `clock`.

    Of several templates it is the one called default. Raises TemplateUnsupported if it has no clean split, draws at
    random, or uses the date in a way that can't be pinned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, clock: datetime) -> None:
        if not tokenizer.chat_template:
            raise TemplateUnsupported("the model's tokenizer has no chat template")
        self._tokenizer = tokenizer
        try:
            text = tokenizer.get_chat_template()
        except ValueError as error:
            raise TemplateUnsupported("none of the tokenizer's chat templates is the default") from error
        dates = clock_prefix(text, clock)
        self._text = dates + text
        # The tokenizer itself is in the model's fingerprint; this names how it is used.
        self.digest = content_digest(json.dumps(tokenizer.chat_template, sort_keys=True).encode() + dates.encode())
        self._control = self._control_tokens()
        self._spelled = spelled(self._control)
        self.bound = TokenBound(tokenizer)
        self.closing = self._closing()
        self.turn([{"role": "user", "content": "?"}])

    def context(self, document: str, *, max_tokens: int | None = None) -> list[int]:
        """Token ids of the system turn that holds the document.

        Raises DocumentUnreadable if it is empty or holds control bytes, DocumentTooLong if it exceeds `max_tokens`.
        """
        if not document.strip():
            raise DocumentUnreadable("the document is empty", field="document")
        if "\0" in document:
            raise DocumentUnreadable("the document is binary: it contains NUL characters", field="document")
        messages = [_system(document)]
        if max_tokens is None:
            return self._render(messages, generation_prompt=False)
        fewest = self._fewest(messages, generation_prompt=False) if len(document) > _SAMPLE_CHARACTERS else 0
        if fewest > max_tokens:
            num_tokens = max(fewest, self._estimate(document))
            raise _document_too_long(document, f"about {num_tokens}", num_tokens, max_tokens)
        ids = self._render(messages, generation_prompt=False)
        if len(ids) > max_tokens:
            raise _document_too_long(document, str(len(ids)), len(ids), max_tokens)
        return ids

    def turn(self, messages: Messages) -> list[int]:
        """Token ids that follow the context for a conversation, up to where the answer begins.

        They do not depend on the document. Raises InvalidArgument for messages that the template refuses and for a role
        that is none of ROLES, TemplateUnsupported if the longer rendering does not start with the shorter, token by
        token.
        """
        _check(messages)
        context = self._render([_system(_PROBES[0])], generation_prompt=False)
        whole = self._render([_system(_PROBES[0]), *messages], generation_prompt=True)
        if whole[: len(context)] != context:
            raise TemplateUnsupported(
                "the chat template does not render a conversation as a continuation of its system turn"
            )
        if len(whole) == len(context):
            raise TemplateUnsupported("the chat template renders no turn after the system turn")
        return whole[len(context) :]

    def prompt(self, messages: Messages) -> list[int]:
        """Token ids of a plain conversation, with no cartridge before it. Raises InvalidArgument as `turn`."""
        _check(messages)
        return self._render(messages, generation_prompt=True)

    def fewest(self, messages: Messages, *, behind_context: bool) -> int:
        """As many tokens `turn` (behind a context) or `prompt` has at least; known without tokenising, or 0.

        Raises InvalidArgument as they do.
        """
        _check(messages)
        if not behind_context:
            return self._fewest(messages, generation_prompt=True)
        probe = [_system(_PROBES[0])]
        context = self._render(probe, generation_prompt=False)
        return self._fewest([*probe, *messages], generation_prompt=True) - len(context)

    def text(self, text: str) -> list[int]:
        """Token ids of a text that stands in an answer, without template."""
        if self._spelled.search(text):
            return self._literal.ids([text], lambda hidden: hidden[0])
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def bare(self) -> list[int]:
        """Token ids that stand before the turn of a plain conversation: a template's own system message, or nothing.

        Raises TemplateUnsupported if a plain conversation does not end with the turn that follows a document.
        """
        messages = [{"role": "user", "content": _PROBES[0]}]
        plain, turn = self.prompt(messages), self.turn(messages)
        if plain[len(plain) - len(turn) :] != turn:
            raise TemplateUnsupported(
                "the chat template renders a turn without a document otherwise than behind one: use general_share 0"
            )
        return plain[: len(plain) - len(turn)]

    def _closing(self) -> list[int]:
        first, second = (self._render([_system(probe)], generation_prompt=False) for probe in _PROBES)
        shared = 0
        while shared < min(len(first), len(second)) and first[-1 - shared] == second[-1 - shared]:
            shared += 1
        if shared == min(len(first), len(second)):
            raise TemplateUnsupported("the chat template ignores the system message, where the document would stand")
        return first[len(first) - shared :]

    def _control_tokens(self) -> dict[str, int]:
        """Ids by spelling: special tokens, which decoding leaves out, and others that stand around messages."""
        probe = [_system(_PROBES[0]), {"role": "user", "content": _PROBES[1]}]
        around = set(self._applied(probe, generation_prompt=True, tokenize=True))
        added = self._tokenizer.added_tokens_decoder.items()
        return {token.content: number for number, token in added if token.special or number in around}

    @cached_property
    def _literal(self) -> LiteralTokenizer:
        # Only when it is needed: to copy a large tokenizer takes a second.
        return LiteralTokenizer(self._tokenizer, self._control)

    def _fewest(self, messages: Messages, *, generation_prompt: bool) -> int:
        """Of what is rendered, since templates may drop a part of what they are given."""
        return self.bound.fewest(self._applied(messages, generation_prompt=generation_prompt, tokenize=False))

    def _estimate(self, document: str) -> int:
        """About how many tokens a document has, by its beginning."""
        sample = document[:_SAMPLE_CHARACTERS]
        return len(self._tokenizer(sample, add_special_tokens=False)["input_ids"]) * len(document) // len(sample)

    def _render(self, messages: Messages, *, generation_prompt: bool) -> list[int]:
        texts = [message["content"] for message in messages]
        if not any(map(self._spelled.search, texts)):
            return list(self._applied(messages, generation_prompt=generation_prompt, tokenize=True))

        def render(hidden: Sequence[str]) -> str:
            rewritten = [{**message, "content": text} for message, text in zip(messages, hidden, strict=True)]
            return str(self._applied(rewritten, generation_prompt=generation_prompt, tokenize=False))

        return self._literal.ids(texts, render)

    def _applied(self, messages: Messages, *, generation_prompt: bool, tokenize: bool) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None,
                documents=None,
                chat_template=self._text,
                add_generation_prompt=generation_prompt,
                tokenize=tokenize,
                return_dict=False,
            )
        except TemplateError as error:
            raise InvalidArgument(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error


def _system(document: str) -> dict[str, str]:
    return {"role": "system", "content": document}


def _document_too_long(document: str, said: str, num_tokens: int, max_tokens: int) -> DocumentTooLong:
    # Less than its share, since text is not equally dense everywhere.
    fits = max(1, int(0.95 * len(document) * max_tokens / num_tokens))
    return DocumentTooLong(
        f"the document takes {said} tokens with its template, the model has room for {max_tokens}: about {fits} of its "
        f"{len(document)} characters. Cut it into {-(-len(document) // fits)} parts or more, at the ends of sections, "
        "and train a cartridge for each",
        field="document",
    )


def _check(messages: Messages) -> None:
    if not messages:
        raise InvalidArgument("messages is empty", field="messages")
    for index, message in enumerate(messages):
        if message["role"] not in ROLES:
            raise InvalidArgument(
                f"messages[{index}].role is {message['role'][:100]!r}, must be one of {', '.join(ROLES)}",
                field=f"messages[{index}].role",
            )
