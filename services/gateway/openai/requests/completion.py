"""/v1/completions: what is asked."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator

from services.gateway.openai.requests.parameters import check_text, is_ids
from services.gateway.openai.requests.sampling import MAX_TOP_LOGPROBS, NEUTRAL, SamplingRequest

NEUTRAL_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "best_of": (1,),
    "prompt_embeds": (),
    "suffix": ("",),
}
# Of one request: each takes much longer to check than to send.
MAX_PROMPTS = 2048
_PROMPTS = "expected a string, a list of strings, a list of token ids or a list of such lists"


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
    return [check_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


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
