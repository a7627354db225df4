"""/v1/chat/completions: what is asked."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from foundry.errors import InvalidArgument
from foundry.v1 import rollout_pb2
from services.gateway.openai.grammar import calls_schema
from services.gateway.openai.requests.parameters import Parameters, Text
from services.gateway.openai.requests.sampling import IGNORED, MAX_TOP_LOGPROBS, NEUTRAL, SamplingRequest
from services.gateway.openai.requests.template import TemplateRequest

NEUTRAL_IN_CHAT: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (True,),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class NamedFunction(Parameters):
    name: Text


class NamedTool(Parameters):
    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(TemplateRequest, SamplingRequest):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL | NEUTRAL_IN_CHAT
    ignored: ClassVar[frozenset[str]] = IGNORED - {"parallel_tool_calls"}

    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """`none`: as if there were no tools; unset: `auto`. `required`: the answer is calls, held to that by a grammar, and
    a named tool: one of it."""

    parallel_tool_calls: bool | None = None
    """False: of several calls the first is answered."""

    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """OpenAI's newer name of `max_tokens`; it wins."""

    logprobs: bool | None = None
    """Report the logprob of every token, of the untempered distribution."""

    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Also report so many alternatives; needs `logprobs`."""

    @model_validator(mode="after")
    def _check_tool_choice(self) -> Self:
        if self.tool_choice in (None, "none", "auto"):
            return self
        names = [tool["function"]["name"] for tool in self.tools or []]
        if not names:
            raise InvalidArgument("tool_choice needs tools", field="tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise InvalidArgument(
                f"tool_choice is none of the tools: {', '.join(names)}"[:500], field="tool_choice.function.name"
            )
        return self

    @cached_property
    def grammar(self) -> tuple[str, rollout_pb2.Grammar] | None:
        """As of any request; where calls are asked for, their language."""
        asked = super().grammar
        if not self.forces_calls:
            return asked
        if asked is not None:
            raise InvalidArgument(f"{asked[0]} and a tool_choice can't be set both", field=asked[0])
        name = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        schema = calls_schema(self.tools or [], name, one_call=self.parallel_tool_calls is False)
        return "tools", rollout_pb2.Grammar(json_schema=json.dumps(schema))

    @property
    def forces_calls(self) -> bool:
        """Whether the answer is nothing but calls."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def shown_tools(self) -> list[dict[str, Any]]:
        """Those that the model is told of."""
        return self.tools if self.tools and self.tool_choice != "none" else []

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidArgument("top_logprobs needs logprobs", field="top_logprobs")
        return self

    @property
    def asked_max_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def max_tokens_name(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens is not None else "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
