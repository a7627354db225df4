"""Languages that answers can be held to: JSON schemas, regular expressions, choices and grammars, by llguidance.

All are written as one Lark grammar, which either engine reads. What a caller sends may be made to hurt: its size is
bounded, it is tried in another process first, and llguidance bounds its own work in every step.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property

import llguidance
import llguidance.hf
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from transformers import PreTrainedTokenizerFast

from foundry.errors import InvalidArgument
from foundry.model.info import ModelInfo
from foundry.v1 import rollout_pb2
from services.rollout.grammar_trial import LIMITS, Trials

FIELD = "sampling.grammar"
MAX_BYTES = 64 * 1024
MAX_CHOICES = 1024
# Grammars kept for those who ask again.
_KEPT = 32
# Between the parts of a JSON value. Without a bound a model may write blanks to the end.
_JSON_OPTIONS = {"whitespace_pattern": r"[ \n]{0,16}"}


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """See `services.rollout.engine.Grammar`."""

    spec: str
    end_id: int
    # Never moved: answers begin with copies of it.
    _matcher: LLMatcher = field(repr=False, compare=False)

    def begin(self) -> MatcherState:
        return MatcherState(self._matcher.deep_copy())


class MatcherState:
    """See `services.rollout.engine.GrammarState`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def ended(self) -> bool:
        return self._matcher.is_stopped()

    def mask(self) -> bytes | None:
        mask = self._matcher.compute_bitmask()
        return None if self._matcher.is_error() else mask

    def accept(self, token_id: int) -> bool:
        return self._matcher.consume_token(token_id)


class Grammars:
    """Compiles what requests ask for, from any thread; what it has compiled lately it has at hand."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self._kept: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, message: rollout_pb2.Grammar) -> CompiledGrammar:
        """Raises InvalidArgument."""
        if message.ByteSize() > MAX_BYTES:
            raise InvalidArgument(f"the grammar has {message.ByteSize()} bytes, at most {MAX_BYTES}", field=FIELD)
        spec = _lark(message)
        with self._lock:
            if spec in self._kept:
                self._kept.move_to_end(spec)
                return self._kept[spec]
        if fault := self._trials.fault(spec):
            raise InvalidArgument(f"the grammar can't be compiled: {fault[:500]}", field=FIELD)
        matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(spec), log_level=0, limits=LIMITS)
        compiled = CompiledGrammar(spec, self._tokenizer.eos_token, matcher)
        with self._lock:
            self._kept[spec] = compiled
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return compiled

    # A second for a large vocabulary, so not before somebody needs it.
    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return llguidance.hf.from_tokenizer(self._fast_tokenizer(), n_vocab=self._info.spec.vocab_size)

    @cached_property
    def _trials(self) -> Trials:
        text = self._fast_tokenizer().backend_tokenizer.to_str()
        return Trials(text, self._info.spec.vocab_size, self._tokenizer.eos_token)

    def _fast_tokenizer(self) -> PreTrainedTokenizerFast:
        if not isinstance(self._info.tokenizer, PreTrainedTokenizerFast):
            raise InvalidArgument("grammars need a model with a fast tokenizer", field=FIELD)
        return self._info.tokenizer


def _lark(message: rollout_pb2.Grammar) -> str:
    match message.WhichOneof("language"):
        case "json_schema":
            return f"start: %json {json.dumps(_schema(message.json_schema))}"
        case "regex":
            return f"start: /{llguidance.regex_to_lark(message.regex)}/"
        case "choice":
            texts = list(message.choice.texts)
            if not 1 <= len(texts) <= MAX_CHOICES or not all(texts):
                raise InvalidArgument(f"choice takes 1 to {MAX_CHOICES} texts, none of them empty", field=FIELD)
            return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        case "lark":
            try:
                return any_to_lark(message.lark)
            except Exception as error:
                raise InvalidArgument(f"the grammar is neither Lark's nor GBNF: {error}", field=FIELD) from error
    raise InvalidArgument("set json_schema, regex, choice or lark", field=FIELD)


def _schema(text: str) -> object:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"json_schema is no JSON: {error}", field=FIELD) from error
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidArgument("json_schema must be a JSON object", field=FIELD)
    return {**schema, "x-guidance": _JSON_OPTIONS}
