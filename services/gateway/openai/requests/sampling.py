"""What chat and text completions share: which model, how to sample, what to say of it."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from foundry.errors import InvalidArgument
from foundry.v1 import rollout_pb2
from foundry.validation import FirstError
from services.gateway.openai.grammar import GUIDED, asked_grammar
from services.gateway.openai.requests.parameters import Cartridges, ModelReference, Parameters, Rope, Text, TokenId

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
MAX_TOP_LOGPROBS = 20


def _strings(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _tokens(biases: dict[str, float]) -> dict[str, float]:
    """By token, which JSON can only write as text."""
    if not all(token.isascii() and token.isdecimal() and int(token) < 2**32 for token in biases):
        raise ValueError("keys are token ids")
    return biases


Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Parameters):
    ignored: ClassVar[frozenset[str]] = frozenset({"include_obfuscation"})

    include_usage: bool | None = None
    """Send one more chunk, without choices, that carries the usage."""

    continuous_usage_stats: bool | None = None
    """Extension, vLLM's: every chunk carries the usage so far, of all choices."""


class SamplingRequest(Parameters):
    """What chat and text completions share."""

    ignored: ClassVar[frozenset[str]] = IGNORED
    # Unless asked otherwise; None: what is left of the context. As OpenAI has it, and vLLM.
    default_max_tokens: ClassVar[int | None] = None

    model: ModelReference
    """The base model or a cartridge: `name`, `name@17`, `name@latest`, `name@tag`, `name@blake3:HEX`."""

    cartridges: Cartridges | None = None
    """Extension: cartridge references that stand before the conversation in this order; `model` is the base model."""

    rope: Rope | None = None
    """Extension: where the keys of several cartridges stand. `keep`, or unset: each where it was trained; `shift`: each
    rotated behind the ones before it. The conversation begins behind all of them in either case."""

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
    def spells_logprobs(self) -> bool:
        """Whether logprobs stand in the answer as OpenAI has them."""
        return True

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
