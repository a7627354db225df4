"""How a sequence is to be sampled, from a request on the wire: every limit is checked here, and names its field."""

from __future__ import annotations

import secrets
from collections.abc import Iterable

from foundry.errors import InvalidArgument
from foundry.v1 import rollout_pb2
from services.rollout.engine import SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20
MAX_TEMPERATURE = 100.0
# Fewer than any vocabulary has: something must be left to sample.
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_PENALTY, MAX_BIAS = 2.0, 100.0
MAX_REPETITION_PENALTY = 100.0
# Of a prompt with logprobs, each with an id: they are one message.
MAX_PROMPT_LOGPROBS = 2**18
# What a batch takes.
_PLAIN = (
    *("temperature", "top_p", "top_k", "max_new_tokens", "stop", "stop_token_ids", "seed", "n", "ignore_eos"),
    *("logprobs", "clamp_max_new_tokens"),
)


def read_sampling(message: rollout_pb2.Sampling, index: int, vocab_size: int) -> SamplingParams:
    """Of completion `index`, but for its grammar. Comparisons are written so that NaN fails them.

    Raises InvalidArgument.
    """
    temperature = message.temperature if message.HasField("temperature") else 1.0
    top_p = message.top_p if message.HasField("top_p") else 1.0
    seed = message.seed if message.HasField("seed") else secrets.randbits(64)
    check(0 <= temperature <= MAX_TEMPERATURE, "temperature", temperature, f"within 0..{MAX_TEMPERATURE:.0f}")
    check(0 < top_p <= 1, "top_p", top_p, "above 0 and at most 1")
    check(message.logprobs <= MAX_LOGPROBS, "logprobs", message.logprobs, f"at most {MAX_LOGPROBS}")
    prompt_logprobs = message.prompt_logprobs
    check(prompt_logprobs <= MAX_LOGPROBS, "prompt_logprobs", prompt_logprobs, f"at most {MAX_LOGPROBS}")
    _check_ends(message)
    _check_adjustments(message)
    for name in ("stop_token_ids", "logit_bias"):
        last = max(getattr(message, name), default=0)
        check(last < vocab_size, name, f"of token {last}", f"of tokens below {vocab_size}")
    return SamplingParams(
        # Who samples nothing gets a token that is not shown.
        max_new_tokens=message.max_new_tokens or 1,
        temperature=temperature,
        top_p=top_p,
        top_k=message.top_k,
        seed=(seed + index) % 2**64,
        stop=tuple(message.stop),
        ignore_eos=message.ignore_eos,
        num_logprobs=message.logprobs,
        stop_token_ids=tuple(message.stop_token_ids),
        min_tokens=message.min_tokens,
        min_p=message.min_p,
        logit_bias=tuple(sorted(message.logit_bias.items())),
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        repetition_penalty=message.repetition_penalty if message.HasField("repetition_penalty") else 1.0,
        num_prompt_logprobs=prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def check_plain(message: rollout_pb2.Sampling) -> None:
    """A batch is sampled from the policy as it is: what a trainer proves of it would else be of something else.

    Raises InvalidArgument.
    """
    for name in (descriptor.name for descriptor, _ in message.ListFields()):
        if name not in _PLAIN:
            raise InvalidArgument(f"a batch takes no {name}: ask with Generate", field=_field(name))


def check_scored(num_prompt: int, sampling: SamplingParams) -> None:
    """Raises InvalidArgument if the prompt's logprobs are more than a message holds."""
    num_alternatives = sampling.num_prompt_logprobs
    if num_alternatives is not None and (num := num_prompt * (1 + num_alternatives)) > MAX_PROMPT_LOGPROBS:
        raise InvalidArgument(
            f"{num_prompt} prompt tokens with {num_alternatives} alternatives each make {num} logprobs, an answer "
            f"holds {MAX_PROMPT_LOGPROBS}",
            field="sampling.prompt_logprobs",
        )


def _check_adjustments(message: rollout_pb2.Sampling) -> None:
    """What changes the distribution that tokens are drawn from."""
    check(0 <= message.min_p <= 1, "min_p", message.min_p, "within 0..1")
    for name in ("presence_penalty", "frequency_penalty"):
        penalty = getattr(message, name)
        check(abs(penalty) <= MAX_PENALTY, name, penalty, f"within -{MAX_PENALTY:.0f}..{MAX_PENALTY:.0f}")
    repetition = message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
    wanted = f"above 0 and at most {MAX_REPETITION_PENALTY:.0f}"
    check(0 < repetition <= MAX_REPETITION_PENALTY, "repetition_penalty", repetition, wanted)
    biases = message.logit_bias
    check(len(biases) <= MAX_BIASES, "logit_bias", len(biases), f"at most {MAX_BIASES} tokens")
    for bias in biases.values():
        check(abs(bias) <= MAX_BIAS, "logit_bias", bias, f"within -{MAX_BIAS:.0f}..{MAX_BIAS:.0f}")


def _check_ends(message: rollout_pb2.Sampling) -> None:
    """What says when the answer ends."""
    if message.max_new_tokens or not message.HasField("prompt_logprobs"):
        check(message.max_new_tokens >= 1, "max_new_tokens", message.max_new_tokens, "at least 1")
    check(len(message.stop) <= MAX_STOP_STRINGS, "stop", len(message.stop), f"at most {MAX_STOP_STRINGS} strings")
    _check_stop_strings(message.stop)
    num_stops = len(message.stop_token_ids)
    check(num_stops <= MAX_STOP_TOKENS, "stop_token_ids", num_stops, f"at most {MAX_STOP_TOKENS} tokens")
    if not message.clamp_max_new_tokens:
        most = message.max_new_tokens
        check(message.min_tokens <= most, "min_tokens", message.min_tokens, f"at most max_new_tokens, {most}")
    if message.HasField("grammar"):
        for name in ("ignore_eos", "min_tokens"):
            if getattr(message, name):
                raise InvalidArgument(
                    f"a grammar says where the answer ends: {name} can't be set beside it", field=_field(name)
                )


def _check_stop_strings(stop: Iterable[str]) -> None:
    for text in stop:
        check(0 < len(text) <= MAX_STOP_CHARACTERS, "stop", repr(text), f"1 to {MAX_STOP_CHARACTERS} characters")


def check(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise InvalidArgument(f"{name} is {value}, must be {wanted}", field=_field(name))


def _field(name: str) -> str:
    return f"sampling.{name}"
