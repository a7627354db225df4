"""Splitting a chat template into a context (the document) and a turn (everything after it).

Student and teacher must see the same ids after their prefix. For a template T:
    context = T([system(document)])
    turn    = T([system(document), user, ...], generation prompt) minus that context
so the student reads `cartridge + turn`, the teacher `context + turn`.

The same document has the same context on every machine and every day: nothing but the messages, the tokenizer and the
clock of the settings decides what is rendered.

Control tokens are those that the template writes. Where a document or a message spells one, it is text; so it is in
what tools are called, given and answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from foundry.errors import DocumentTooLong, DocumentUnreadable, InvalidArgument, TemplateUnsupported
from foundry.identity import content_digest
from foundry.model.literal import LiteralTokenizer, spelled
from foundry.model.pinning import clock_prefix, free_variables
from foundry.model.template_features import PROBE_CALL, PROBE_TOOLS, Features, probe
from foundry.model.token_bound import TokenBound
from foundry.roles import ROLES

# As OpenAI's, with the arguments of tool calls as objects; what is null is left out.
Messages = Sequence[Mapping[str, Any]]
# Two unlike documents: what their contexts share at the end is the template's closing.
_PROBES = ("Alpha.", "Omega one two three")
# Of a longer document it is looked first whether it can fit at all, and said by its beginning how dense it is.
_SAMPLE_CHARACTERS = 16 * 1024
# What rendering has for itself; special tokens have names of their own.
_RESERVED = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "strftime_now"),
        *("conversation", "chat_template", "tokenize", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
        "raise_exception",
    }
)
# What a template raises over data that it is not made for.
_REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Rendering:
    """How messages are rendered. `variables` are the template's own (`enable_thinking`); those that it does not have
    change nothing."""

    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    generation_prompt: bool = True
    # The last message is left open: the answer goes on with it.
    continue_final_message: bool = False


_PLAIN = Rendering()
_NO_PROMPT = Rendering(generation_prompt=False)


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
        self._reserved = _RESERVED | set(tokenizer.SPECIAL_TOKENS_ATTRIBUTES) | set(tokenizer.special_tokens_map)
        self.features = self._features()
        self._control = self._control_tokens()
        self._spelled = spelled(self._control)
        self.bound = TokenBound(tokenizer)
        # Before every turn, whose tokens don't depend on the document.
        self._probe_context = self._render([_system(_PROBES[0])], _NO_PROMPT)
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
            return self._render(messages, _NO_PROMPT)
        fewest = self._fewest(messages, _NO_PROMPT) if len(document) > _SAMPLE_CHARACTERS else 0
        if fewest > max_tokens:
            num_tokens = max(fewest, self._estimate(document))
            raise _document_too_long(document, f"about {num_tokens}", num_tokens, max_tokens)
        ids = self._render(messages, _NO_PROMPT)
        if len(ids) > max_tokens:
            raise _document_too_long(document, str(len(ids)), len(ids), max_tokens)
        return ids

    def turn(self, messages: Messages, how: Rendering = _PLAIN) -> list[int]:
        """Token ids that follow the context for a conversation, up to where the answer begins.

        They do not depend on the document. Where the template writes tools into the system turn, which is the
        document's, they stand in one of their own behind it, as in a plain conversation.

        Raises InvalidArgument for messages, tools and variables that the template refuses or can't render and for a
        role that nobody has, TemplateUnsupported if the longer rendering does not start with the shorter, token by
        token.
        """
        self._check(messages, how)
        context = self._probe_context
        if how.variables and context != self._render([_system(_PROBES[0])], Rendering((), how.variables, False)):
            raise InvalidArgument(
                "chat_template_kwargs would change the system turn, which is the cartridge's: leave them out",
                field="chat_template_kwargs",
            )
        whole = self._render([_system(_PROBES[0]), *messages], how)
        if whole[: len(context)] != context:
            if how.tools:
                return self._without_bos(self._render(messages, how))
            raise TemplateUnsupported(
                "the chat template does not render a conversation as a continuation of its system turn"
            )
        if len(whole) == len(context):
            raise TemplateUnsupported("the chat template renders no turn after the system turn")
        return whole[len(context) :]

    def prompt(self, messages: Messages, how: Rendering = _PLAIN) -> list[int]:
        """Token ids of a plain conversation, with no cartridge before it. Raises InvalidArgument as `turn`."""
        self._check(messages, how)
        return self._render(messages, how)

    def fewest(self, messages: Messages, how: Rendering = _PLAIN, *, behind_context: bool) -> int:
        """As many tokens `turn` (behind a context) or `prompt` has at least; known without tokenising, or 0.

        Raises InvalidArgument as they do.
        """
        self._check(messages, how)
        if not behind_context:
            return self._fewest(messages, how)
        return self._fewest([_system(_PROBES[0]), *messages], how) - len(self._probe_context)

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
        messages = [_user(_PROBES[0])]
        plain, turn = self.prompt(messages), self.turn(messages)
        if plain[len(plain) - len(turn) :] != turn:
            raise TemplateUnsupported(
                "the chat template renders a turn without a document otherwise than behind one: use general_share 0"
            )
        return plain[: len(plain) - len(turn)]

    def _closing(self) -> list[int]:
        first, second = self._probe_context, self._render([_system(_PROBES[1])], _NO_PROMPT)
        shared = 0
        while shared < min(len(first), len(second)) and first[-1 - shared] == second[-1 - shared]:
            shared += 1
        if shared == min(len(first), len(second)):
            raise TemplateUnsupported("the chat template ignores the system message, where the document would stand")
        return first[len(first) - shared :]

    def _features(self) -> Features:
        def render(messages: Messages, tools: Sequence[Mapping[str, Any]]) -> str:
            return str(self._applied(messages, Rendering(tools, {}, False), tokenize=False))

        return probe(render, free_variables(self._text) - self._reserved)

    def _control_tokens(self) -> dict[str, int]:
        """Ids by spelling: special tokens, which decoding leaves out, and others that stand around messages and what is
        said of tools."""
        around = set(self._applied([_system(_PROBES[0]), _user(_PROBES[1])], _PLAIN, tokenize=True))
        if "tool_calls" in self.features.renders:
            around |= set(self._applied(PROBE_CALL, _PLAIN, tokenize=True))
        if "tools" in self.features.renders:
            around |= set(self._applied([_user(_PROBES[1])], Rendering(PROBE_TOOLS), tokenize=True))
        added = self._tokenizer.added_tokens_decoder.items()
        return {token.content: number for number, token in added if token.special or number in around}

    @cached_property
    def _literal(self) -> LiteralTokenizer:
        # Only when it is needed: to copy a large tokenizer takes a second.
        return LiteralTokenizer(self._tokenizer, self._control)

    def _fewest(self, messages: Messages, how: Rendering) -> int:
        """Of what is rendered, since templates may drop a part of what they are given."""
        return self.bound.fewest(self._applied(messages, how, tokenize=False))

    def _estimate(self, document: str) -> int:
        """About how many tokens a document has, by its beginning."""
        sample = document[:_SAMPLE_CHARACTERS]
        return len(self._tokenizer(sample, add_special_tokens=False)["input_ids"]) * len(document) // len(sample)

    def _render(self, messages: Messages, how: Rendering) -> list[int]:
        variables = {name: value for name, value in how.variables.items() if name in self.features.variables}
        given = [list(messages), list(how.tools), variables]
        texts = list(_strings(given))
        if not any(map(self._spelled.search, texts)):
            return list(self._applied(messages, how, tokenize=True))

        def render(hidden: Sequence[str]) -> str:
            rewritten, tools, variables = _rewritten(given, iter(hidden))
            changed = Rendering(tools, variables, how.generation_prompt, how.continue_final_message)
            return str(self._applied(rewritten, changed, tokenize=False))

        return self._literal.ids(texts, render)

    def _applied(self, messages: Messages, how: Rendering, *, tokenize: bool) -> Any:
        variables = {name: value for name, value in how.variables.items() if name in self.features.variables}
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in how.tools] or None,
                documents=None,
                chat_template=self._text,
                add_generation_prompt=how.generation_prompt,
                continue_final_message=how.continue_final_message,
                tokenize=tokenize,
                return_dict=False,
                **variables,
            )
        except _REFUSALS as error:
            raise InvalidArgument(
                f"the model's chat template refuses these messages: {error}", field="messages"
            ) from error

    def _without_bos(self, ids: list[int]) -> list[int]:
        return ids[1:] if ids[:1] == [self._tokenizer.bos_token_id] else ids

    def _check(self, messages: Messages, how: Rendering) -> None:
        """What templates would pass over or write into a header as it is."""
        if not messages:
            raise InvalidArgument("messages is empty", field="messages")
        if how.continue_final_message and how.generation_prompt:
            raise InvalidArgument(
                "continue_final_message and add_generation_prompt exclude each other", field="continue_final_message"
            )
        if taken := sorted(set(how.variables) & self._reserved):
            raise InvalidArgument(
                f"chat_template_kwargs can't set {taken[0]}", field=f"chat_template_kwargs.{taken[0]}"
            )
        renders = self.features.renders
        if how.tools and "tools" not in renders:
            raise InvalidArgument("the model's chat template has no place for tools", field="tools")
        for index, message in enumerate(messages):
            role, where = message["role"], f"messages[{index}]"
            if role not in (ROLES if "tool_results" not in renders else (*ROLES, "tool")):
                known = ", ".join(ROLES)
                refused = " (the model's chat template has no place for the results of tools)" * (role == "tool")
                raise InvalidArgument(
                    f"{where}.role is {role[:100]!r}, must be one of {known}{refused}", field=f"{where}.role"
                )
            if message.get("tool_calls") and "tool_calls" not in renders:
                raise InvalidArgument(
                    "the model's chat template has no place for calls of tools", field=f"{where}.tool_calls"
                )


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


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _strings(value: Any) -> Iterator[str]:
    """Every string of a JSON value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _rewritten(value: Any, texts: Iterator[str]) -> Any:
    """The same value with other strings, in the order of `_strings`."""
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, Mapping):
        return {next(texts): _rewritten(inner, texts) for inner in value.values()}
    if isinstance(value, list | tuple):
        return [_rewritten(inner, texts) for inner in value]
    return value
