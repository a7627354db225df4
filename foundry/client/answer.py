"""A chat's answer, from the chunks in which it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foundry.client.wire import Json, stream_error
from foundry.errors import InvalidArgument, Unavailable


@dataclass(frozen=True, slots=True)
class CartridgeVersion:
    name: str
    version: int
    digest: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """An answer, what it was computed with and what it cost. `seconds` are since the request was sent."""

    text: str
    finish_reason: str
    model: str
    model_fingerprint: str
    template_digest: str
    cartridges: tuple[CartridgeVersion, ...]
    rope: str
    """Where keys of several cartridges stood: `keep`, as trained, or `shift`, each behind the ones before it."""
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cartridge_tokens: int
    seconds_to_first_token: float
    seconds: float
    logprobs: tuple[Json, ...] | None = None
    """One {token, logprob, bytes, top_logprobs} for each token, with `logprobs=True`."""
    token_ids: tuple[int, ...] | None = None
    """With `return_token_ids=True`."""
    tool_calls: tuple[Json, ...] = ()
    """The functions that the model wants called, as OpenAI writes them."""


def chat_body(model: str, messages: str | Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Json:
    """Raises InvalidArgument for what this client would take and lose."""
    if options.get("n") not in (None, 1):
        raise InvalidArgument("this client takes one choice at a time", field="n")
    for name in ("stream", "stream_options"):
        if name in options:
            raise InvalidArgument(f"{name} is this client's own: chat() or stream_chat()", field=name)
    spoken = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": model, "messages": spoken, **options, **streamed}


class AnswerParts:
    """What has come so far."""

    def __init__(self, model: str) -> None:
        self._model, self._began, self._first_token_at = model, time.monotonic(), 0.0
        self._text = self._finish_reason = ""
        self._logprobs: list[Json] | None = None
        self._token_ids: list[int] | None = None
        self._tool_calls: dict[int, Json] = {}
        self._foundry: Json = {}
        self._usage: Json = {}

    def add(self, data: str) -> str:
        """The text of a chunk. Raises the error that it carries."""
        chunk = json.loads(data)
        if "error" in chunk:
            raise stream_error(chunk["error"])
        self._first_token_at = self._first_token_at or time.monotonic()
        self._foundry = chunk.get("foundry", self._foundry)
        self._usage = chunk.get("usage") or self._usage
        return "".join(self._add_choice(choice) for choice in chunk["choices"])

    def _add_choice(self, choice: Json) -> str:
        self._finish_reason = choice["finish_reason"] or self._finish_reason
        if choice.get("logprobs"):
            self._logprobs = (self._logprobs or []) + choice["logprobs"]["content"]
        if choice.get("token_ids") is not None:
            self._token_ids = (self._token_ids or []) + choice["token_ids"]
        delta = choice["delta"]
        for part in delta.get("tool_calls") or ():
            self._add_tool_call(part)
        text = delta.get("content") or ""
        self._text += text
        return text

    def _add_tool_call(self, part: Json) -> None:
        # The first part has the id and the name, the others more of the arguments.
        call = self._tool_calls.setdefault(part["index"], {"type": "function", "function": {"arguments": ""}})
        function = dict(part.get("function") or {})
        call["function"]["arguments"] += function.pop("arguments", None) or ""
        call["function"] |= {key: value for key, value in function.items() if value is not None}
        call |= {key: part[key] for key in ("id", "type") if part.get(key)}

    def whole(self) -> ChatAnswer:
        """Once all has come. Raises Unavailable if nothing has."""
        if not self._first_token_at:
            raise Unavailable("the gateway ended the answer before it was complete")
        foundry, usage = self._foundry, self._usage
        return ChatAnswer(
            text=self._text,
            finish_reason=self._finish_reason,
            model=self._model,
            model_fingerprint=foundry["model_fingerprint"],
            template_digest=foundry["template_digest"],
            cartridges=tuple(CartridgeVersion(**cartridge) for cartridge in foundry["cartridges"]),
            # An older gateway keeps them, and does not say so.
            rope=foundry.get("rope", "keep"),
            prompt_tokens=usage["prompt_tokens"],
            completion_tokens=usage["completion_tokens"],
            cached_tokens=usage["prompt_tokens_details"]["cached_tokens"],
            cartridge_tokens=foundry["cartridge_tokens"],
            seconds_to_first_token=self._first_token_at - self._began,
            seconds=time.monotonic() - self._began,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            token_ids=None if self._token_ids is None else tuple(self._token_ids),
            tool_calls=tuple(call for _, call in sorted(self._tool_calls.items())),
        )
