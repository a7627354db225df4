"""OpenAI's requests, as far as a frozen language model can honour them.

A parameter is honoured, or neutral (it has no effect at the value given), or documented as ignored, or refused: none is
dropped in silence. Extensions: `cartridges`, `return_token_ids`, and vLLM's `top_k`, `min_p`, `min_tokens`,
`stop_token_ids`, `repetition_penalty`, `ignore_eos`, `prompt_logprobs` and `structured_outputs`.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, model_validator

from foundry.errors import InvalidArgument
from foundry.v1 import rollout_pb2
from foundry.validation import FirstError, Strict, of_field
from services.gateway.openai.grammar import GUIDED, asked_grammar, calls_schema

# Neither these nor their values change an answer: labels, hints and bookkeeping of OpenAI's own platform.
IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "return_mm_kwargs",
        "safety_identifier",
        "service_tier",
        "session_id",
        "store",
        "stream_interval",
        "user",
    }
)
# These would change an answer, and can't: only null and the values that change nothing are taken.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": ([],),
    "cache_salt": (),
    "ec_transfer_params": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "priority": (0,),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "thinking_token_budget": (),
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
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
NEUTRAL_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "best_of": (1,),
    "prompt_embeds": (),
    "suffix": ("",),
}
NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {"annotations": ([],), "audio": (), "refusal": ()}
MAX_TOP_LOGPROBS = 20
# Of one request: each takes much longer to check than to send.
MAX_MESSAGES = MAX_PROMPTS = 2048
MAX_TOOLS = 128
MAX_REFERENCE_CHARACTERS = 512
_CARTRIDGE = re.compile(r"<cartridge>\s*\{")
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PROMPTS = "expected a string, a list of strings, a list of token ids or a list of such lists"


class _Request(Strict):
    """Null stands for unset."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, value in values.items():
            if name in cls.neutral and value is not None and value not in cls.neutral[name]:
                taken = ", ".join(json.dumps(each) for each in (None, *cls.neutral[name]))
                raise of_field(name, f"is not supported: only {taken} can be taken")
        return {name: value for name, value in values.items() if name not in cls.neutral and name not in cls.ignored}


def _strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _text(value: Any) -> Any:
    """Content as text: OpenAI's list of parts is joined by newlines, as vLLM does."""
    if not isinstance(value, list):
        return value
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("only parts of type 'text' are supported")
    return "\n".join(part["text"] for part in value)


def _tools(value: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As they are, since a chat template writes them so."""
    for place, tool in enumerate(value):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise ValueError(f'{place} is no tool: {{"type": "function", "function": {{"name": …}}}}')
        if not isinstance(name := function.get("name"), str) or not _TOOL_NAME.fullmatch(name):
            raise ValueError(f"{place} has no name of at most 64 letters, digits, '_', '.' and '-'")
        if not isinstance(function.get("parameters", {}), dict):
            raise ValueError(f"{place} has parameters that are no JSON schema")
    if len({tool["function"]["name"] for tool in value}) < len(value):
        raise ValueError("two tools have one name")
    return value


def _prompts(value: Any) -> list[str | list[int]]:
    """OpenAI's four spellings of a prompt, as a list of texts or of token ids."""
    # Ids are looked at once: there may be many.
    if not isinstance(value, str | list) or value == []:
        raise ValueError(_PROMPTS)
    prompts = [value] if isinstance(value, str) or type(value[0]) is int else value
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts, at most {MAX_PROMPTS} can be taken")
    if not all(isinstance(each, str) or is_ids(each) for each in prompts):
        raise ValueError(_PROMPTS)
    if not all(prompts):
        raise ValueError("a prompt is empty: it needs at least one token")
    return [_unicode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def is_ids(value: Any) -> bool:
    """Whether these may be token ids."""
    return isinstance(value, list) and all(type(token) is int and 0 <= token < 2**32 for token in value)


def _tokens(biases: dict[str, float]) -> dict[str, float]:
    """By token, which JSON can only write as text."""
    if not all(token.isascii() and token.isdecimal() and int(token) < 2**32 for token in biases):
        raise ValueError("keys are token ids")
    return biases


def _unicode(value: str) -> str:
    # JSON can spell half a surrogate pair, which is no character and travels nowhere.
    value.encode()
    return value


Text = Annotated[str, AfterValidator(_unicode)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
Bias = Annotated[float, Field(ge=-100, le=100)]
ModelReference = Annotated[Text, Field(max_length=MAX_REFERENCE_CHARACTERS)]


class StreamOptions(_Request):
    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: bool | None = None
    """Send one more chunk, without choices, that carries the usage."""

    continuous_usage_stats: bool | None = None
    """Extension, vLLM's: every chunk carries the usage so far, of all choices."""


class SamplingRequest(_Request):
    """What chat and text completions share."""

    ignored: ClassVar[frozenset[str]] = IGNORED
    # Unless asked otherwise; None: what is left of the context. As OpenAI has it, and vLLM.
    default_max_tokens: ClassVar[int | None] = None

    model: ModelReference
    """The base model or a cartridge: `name`, `name@17`, `name@latest`, `name@tag`, `name@blake3:HEX`."""

    cartridges: Annotated[list[ModelReference], FirstError(), Field(min_length=1, max_length=16)] | None = None
    """Extension: cartridge references that stand before the conversation in this order; `model` is the base model."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 is greedy; unset: 1."""

    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the smallest set of tokens with this much mass; unset: 1."""

    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    """Extension: sample from the k most likely tokens; 0 or -1: from all."""

    n: Annotated[int, Field(ge=1)] | None = None
    """Choices per prompt; choice i is sampled with seed + i."""

    stop: (
        Annotated[
            list[Annotated[Text, Field(min_length=1)]],
            FirstError(),
            BeforeValidator(_strings, json_schema_input_type=str | list[str]),
            Field(max_length=16),
        ]
        | None
    ) = None
    """The answer ends before the first of these strings."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Equal requests with equal seeds get equal answers; unset: a seed of the server's choice."""

    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Most tokens of the answer; unset: as many as the context has room for, of a completion 16 of these. 0 only
    scores the prompt."""

    stop_token_ids: Annotated[list[TokenId], FirstError(), Field(max_length=128)] | None = None
    """Extension: the answer ends with the first of these tokens, which is not part of the text."""

    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Extension: no end token, stop token or stop string ends the answer before so many tokens."""

    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Extension: leave out tokens less likely, at the temperature, than this share of the likeliest one."""

    logit_bias: Annotated[dict[str, Bias], FirstError(), AfterValidator(_tokens), Field(max_length=1024)] | None = None
    """Added to the logits of these tokens."""

    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from the logits of tokens that the answer has."""

    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from the logits of tokens as often as the answer has them."""

    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    """Extension: divides the logits (multiplies negative ones) of tokens that prompt or answer have. Cartridges count
    as nothing."""

    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Extension: report the logprob of every prompt token and so many alternatives; not with `stream`."""

    response_format: dict[str, Any] | None = None
    """`{"type": "json_object"}` or `{"type": "json_schema", "json_schema": {"schema": …}}`: the answer is such a value
    and ends with it, unless `max_tokens` ends it before."""

    structured_outputs: dict[str, Any] | None = None
    """Extension: `json`, `json_object`, `regex`, `choice` or `grammar` (Lark or GBNF), as vLLM has them."""

    guided_json: dict[str, Any] | str | bool | None = None
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    ignore_eos: bool | None = None
    """Extension: go on past the end-of-sequence token."""

    return_token_ids: bool | None = None
    """Extension: add the answer's `token_ids` to each choice."""

    stream: bool | None = None
    """Send the answer as server-sent events."""

    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_scored(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidArgument("prompt_logprobs can't be streamed", field="prompt_logprobs")
        if self.asked_max_tokens == 0 and self.num_prompt_logprobs is None:
            raise InvalidArgument(
                "max_tokens 0 samples nothing: it is for echo and prompt_logprobs", field="max_tokens"
            )
        return self

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Alternatives per prompt token; None if the prompt need not be scored."""
        return self.prompt_logprobs

    @cached_property
    def grammar(self) -> tuple[str, rollout_pb2.Grammar] | None:
        """The language that the answer is asked to be of, and the parameter that asks. Raises InvalidArgument."""
        guided = {name: getattr(self, name) for name in GUIDED}
        return asked_grammar(self.response_format, self.structured_outputs, guided)

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def asked_max_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def max_tokens_name(self) -> str:
        """Which parameter said it."""
        return "max_tokens"

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None if no logprobs are wanted."""
        raise NotImplementedError


class CalledFunction(_Request):
    name: Text
    arguments: Text
    """A JSON object as text."""


class ToolCall(_Request):
    # Clients that put a call together from the pieces of a stream leave its place in it.
    ignored: ClassVar[frozenset[str]] = frozenset({"index"})

    id: Text = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(_Request):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL_IN_MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Text | None, BeforeValidator(_text, json_schema_input_type=str | list[dict[str, str]])] = None
    """Null where an assistant calls tools and says nothing."""

    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], FirstError()] | None = None
    """Of the assistant."""

    tool_call_id: Text | None = None
    """Of a tool: the call that it answers."""

    reasoning_content: Text | None = None
    """Of the assistant; `reasoning` is the same."""

    reasoning: Text | None = None
    function_call: CalledFunction | None = None
    """Older name of a single tool call; such a function answers with the role `function`."""

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        of_assistant = (self.tool_calls, self.function_call, self.reasoning_content, self.reasoning)
        if self.role != "assistant" and any(of_assistant):
            raise ValueError("only an assistant has tool_calls, function_call and reasoning_content")
        if self.role != "tool" and self.tool_call_id:
            raise ValueError("only a tool has a tool_call_id")
        if self.content is None and not self.tool_calls and self.function_call is None:
            raise ValueError("content is missing")
        return self

    @model_validator(mode="after")
    def _no_cartridge_in_text(self) -> Self:
        """Tokasaurus serves cartridges that a system message names so: the model alone would read it as text."""
        content = (self.content or "") if self.role in ("system", "developer") else ""
        begun = _CARTRIDGE.search(content)
        if begun is not None and "</cartridge>" in content[begun.end() :]:
            raise of_field("content", "names a cartridge by <cartridge>{…}</cartridge>: name it in `model`")
        return self


class TemplateRequest(_Request):
    """What a chat template is given. Names and ids, reasoning, and variables of `chat_template_kwargs` that the model's
    template does not use change nothing; `foundry.ignored` of the answer names them."""

    messages: Annotated[list[Message], FirstError(), Field(min_length=1, max_length=MAX_MESSAGES)]

    tools: Annotated[list[dict[str, Any]], FirstError(), AfterValidator(_tools), Field(max_length=MAX_TOOLS)] | None = (
        None
    )
    """What the model may call. Refused where the model's chat template has no place for tools."""

    chat_template_kwargs: dict[str, Any] | None = None
    """vLLM's: variables of the chat template, such as `enable_thinking`."""

    continue_final_message: bool | None = None
    """vLLM's: the answer goes on with the last message."""

    add_generation_prompt: bool | None = None
    """vLLM's: false ends the prompt behind the last message; unset: true, but with `continue_final_message`."""

    @model_validator(mode="after")
    def _check_end(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidArgument(
                "continue_final_message and add_generation_prompt exclude each other", field="continue_final_message"
            )
        return self


class NamedFunction(_Request):
    name: Text


class NamedTool(_Request):
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


class CompletionRequest(SamplingRequest):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = NEUTRAL | NEUTRAL_IN_COMPLETIONS
    default_max_tokens = 16

    prompt: Annotated[
        list[str | list[int]],
        PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    """Text is tokenised without a chat template, and may spell control tokens; ids are used as they are."""

    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """Report the logprob of every token and so many alternatives; with `echo` of the prompt's too."""

    echo: bool | None = None
    """The prompt stands before the answer; with `max_tokens` 0 it stands alone."""

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        wanted = [self.prompt_logprobs]
        if self.echo:
            # Scored also where nothing else is asked for: a request that samples nothing must do something.
            wanted.append(0 if self.logprobs is None and self.asked_max_tokens == 0 else self.logprobs)
        return max((each for each in wanted if each is not None), default=None)
