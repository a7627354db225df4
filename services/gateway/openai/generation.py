"""One completion request: what the rollout servers are asked, and what of their answers may be passed on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from uuid import uuid4

import structlog

from foundry.errors import CartridgeNotFound, FoundryError, InvalidArgument, Unavailable
from foundry.v1 import common_pb2, rollout_pb2
from services.gateway import metrics
from services.gateway.access.principal import Principal
from services.gateway.openai.answers import CartridgeInfo, FoundryInfo, PromptTokensDetails, UsageInfo
from services.gateway.openai.fan_in import Deliver, FanIn
from services.gateway.openai.requests.sampling import SamplingRequest
from services.gateway.openai.target import ROPES, Target
from services.gateway.state import Gateway

Chunk = rollout_pb2.GenerateChunk

# Fields of GenerateRequest by the parameters that they came from; those of `sampling` have their parameter's name.
_PARAMS = {
    "conversation": "messages",
    "digest": "model",
    "model_fingerprint": "model",
    "text": "prompt",
    "token_ids": "prompt",
}
# How often a reference is resolved for one request.
_RESOLUTIONS = 3
_FINISH_REASONS = {rollout_pb2.FINISH_REASON_STOP: "stop", rollout_pb2.FINISH_REASON_LENGTH: "length"}


@dataclass(slots=True)
class Choice:
    """One completion or a part of it."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[rollout_pb2.TopLogprobs] = field(default_factory=list)
    # Where in the completion the text of each id begins, in characters.
    offsets: list[int] = field(default_factory=list)
    # None while the completion goes on.
    finish_reason: str | None = None
    # Of a part: nothing but the reason follows.
    is_last: bool = False
    # What stands before the text of the completion, and before the part where it is the first one.
    echo: str = ""
    # Empty where they were not asked for.
    prompt_logprobs: rollout_pb2.PromptLogprobs = field(default_factory=rollout_pb2.PromptLogprobs)

    def add(self, chunk: Chunk) -> None:
        self.offsets += [len(self.echo) + offset for offset in chunk.text_offsets]
        self.prompt_logprobs.MergeFrom(chunk.prompt_logprobs)
        self.text += chunk.text
        self.ids += chunk.ids
        self.logprobs += chunk.logprobs
        self.top_logprobs += chunk.top_logprobs
        self.finish_reason = _FINISH_REASONS.get(chunk.finish_reason)


class Generation:
    """The chunks of every prompt and choice, each checked against the target before anything of it is passed on."""

    def __init__(
        self,
        gateway: Gateway,
        principal: Principal,
        target: Target,
        asked: SamplingRequest,
        prompts: Sequence[rollout_pb2.GenerateRequest],
        id_prefix: str,
        *,
        echoes: Sequence[str] = (),
    ) -> None:
        """Of each of `prompts` only the prompt is set; its echo, if there are any, stands before its answers.

        Raises InvalidArgument if that makes too many choices, or for what no answer can be.
        """
        self._num_choices = len(prompts) * asked.num_choices
        if self._num_choices > gateway.settings.max_choices:
            raise InvalidArgument(
                f"{len(prompts)} prompts times n={asked.num_choices} exceed {gateway.settings.max_choices} choices",
                field="n",
            )
        self.target = target
        self.asked = asked
        self.id = f"{id_prefix}-{uuid4().hex}"
        structlog.contextvars.bind_contextvars(request_id=self.id)
        self.created = int(time.time())
        self._began = time.monotonic()
        self._gateway = gateway
        self._principal = principal
        self._prompts = prompts
        self._echoes = echoes
        # Looked at before anything is asked of a server.
        self._grammar = asked.grammar
        self._caller = principal.caller(self.id)
        self._template_digest = target.model.template_digest
        # Choices that have said what they are made with.
        self._identified: set[int] = set()
        # Known when the first choice has ended.
        self._cartridge_tokens: int | None = None
        # What of the request changes nothing.
        self.ignored: list[str] = []
        # Of each prompt whose answer has begun, and of all choices as far as they have come.
        self._prompt_tokens: dict[int, int] = {}
        self._completion_tokens = 0
        # Of each prompt, and within it of each choice.
        self._usages: dict[int, dict[int, rollout_pb2.Usage]] = defaultdict(dict)

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """(choice, chunk) as they arrive. Closing the generator cancels what still runs. Raises FoundryError.

        While a run publishes, the version that `latest` meant may be swept before a server has fetched it. Then, and
        only before the first token, the reference is resolved anew: the answer names what it was made with.
        """
        async with self._admitted():
            for resolutions_left in reversed(range(_RESOLUTIONS)):
                try:
                    async with FanIn([partial(self._fetch, index) for index in range(len(self._prompts))]) as arrivals:
                        while (arrival := await arrivals.next()) is not None:
                            prompt_index, chunk = arrival
                            yield self._checked(prompt_index, chunk), chunk
                    break
                except CartridgeNotFound:
                    if self._identified or not resolutions_left:
                        raise
                    target = await Target.resolve(self._gateway, self._principal, self.asked)
                    if target == self.target:
                        raise
                    self.target = target
        if sum(len(usages) for usages in self._usages.values()) < self._num_choices:
            raise Unavailable("the rollout server ended the stream before every choice was complete")
        self._count()

    async def gather(self) -> list[Choice]:
        choices = [Choice(echo=self.echo(index)) for index in range(self._num_choices)]
        async with aclosing(self.chunks()) as chunks:
            async for index, chunk in chunks:
                choices[index].add(chunk)
        return choices

    def echo(self, index: int) -> str:
        """What stands before a choice."""
        return self._echoes[index // self.asked.num_choices] if self._echoes else ""

    def headers(self) -> dict[str, str]:
        headers = {"x-request-id": self.id}
        if self.target.cartridges:
            headers["x-foundry-cartridge"] = ", ".join(str(cartridge) for cartridge in self.target.cartridges)
            headers["x-foundry-digest"] = ", ".join(cartridge.digest for cartridge in self.target.cartridges)
        return headers

    def info(self) -> FoundryInfo:
        return FoundryInfo(
            model_fingerprint=self.target.model.fingerprint,
            template_digest=self._template_digest,
            cartridges=[CartridgeInfo(**asdict(cartridge)) for cartridge in self.target.cartridges],
            rope=self.target.rope,
            cartridge_tokens=self._cartridge_tokens,
            ignored=self.ignored or None,
        )

    def usage(self) -> UsageInfo:
        """A prompt counts once however many choices it has."""
        prompts = self._usages.values()
        prompt_tokens = sum(usages[0].prompt_tokens for usages in prompts)
        completion_tokens = sum(usage.completion_tokens for usages in prompts for usage in usages.values())
        return UsageInfo(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached_tokens()),
        )

    def usage_so_far(self, num_to_come: int = 0) -> UsageInfo:
        """Of what has arrived, but for so many tokens."""
        prompt_tokens = sum(self._prompt_tokens.values())
        completion_tokens = self._completion_tokens - num_to_come
        return UsageInfo(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        with self._gateway.admitted():
            try:
                yield
            finally:
                # Also of an answer that was cut short.
                num_tokens = sum(self._prompt_tokens.values()) + self._completion_tokens
                await self._gateway.rates.spent(self._principal, num_tokens)

    async def _fetch(self, index: int, deliver: Deliver[Chunk]) -> None:
        """All chunks of one prompt."""
        deadline = self._began + self._gateway.settings.request_timeout_seconds
        try:
            await self._gateway.rollouts.generate(self._request(index), deliver, deadline=deadline)
        except FoundryError as error:
            error.field = self._param(error.field)
            error.message = error.message.replace("max_new_tokens", self.asked.max_tokens_name)
            raise

    def _checked(self, prompt_index: int, chunk: Chunk) -> int:
        """The choice that a chunk is of. Raises IdentityMismatch."""
        choice = prompt_index * self.asked.num_choices + chunk.index
        if choice not in self._identified:
            self.target.check(chunk.identity)
            self._template_digest = chunk.identity.template_digest
            if not self._identified:
                metrics.FIRST_TOKEN_SECONDS.observe(time.monotonic() - self._began)
            self._identified.add(choice)
            self._prompt_tokens[prompt_index] = chunk.prompt_tokens
        self._completion_tokens += len(chunk.ids)
        if chunk.HasField("usage"):
            self._usages[prompt_index][chunk.index] = chunk.usage
            self._cartridge_tokens = chunk.usage.cartridge_tokens
        return choice

    def _cached_tokens(self) -> int:
        return sum(usages[0].cached_tokens for usages in self._usages.values())

    def _count(self) -> None:
        usage = self.usage()
        metrics.PROMPT_TOKENS.inc(usage.prompt_tokens)
        metrics.CACHED_TOKENS.inc(self._cached_tokens())
        metrics.GENERATION_TOKENS.inc(usage.completion_tokens)

    def _request(self, index: int) -> rollout_pb2.GenerateRequest:
        asked = self.asked
        default = asked.default_max_tokens or self.target.model.max_sequence_tokens
        message = rollout_pb2.GenerateRequest(
            request_id=f"{self.id}-{index}",
            model_fingerprint=self.target.model.fingerprint,
            cartridges=[common_pb2.CartridgeId(**asdict(cartridge)) for cartridge in self.target.cartridges],
            sampling=rollout_pb2.Sampling(
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=max(0, asked.top_k or 0),
                max_new_tokens=default if asked.asked_max_tokens is None else asked.asked_max_tokens,
                # Only the server knows the prompt's length.
                clamp_max_new_tokens=asked.asked_max_tokens is None,
                stop=asked.stop,
                seed=asked.seed,
                n=asked.num_choices,
                ignore_eos=bool(asked.ignore_eos),
                logprobs=asked.num_logprobs or 0,
                stop_token_ids=asked.stop_token_ids,
                min_tokens=asked.min_tokens or 0,
                min_p=asked.min_p or 0,
                logit_bias={int(token): bias for token, bias in (asked.logit_bias or {}).items()},
                presence_penalty=asked.presence_penalty or 0,
                frequency_penalty=asked.frequency_penalty or 0,
                repetition_penalty=asked.repetition_penalty,
                grammar=None if self._grammar is None else self._grammar[1],
                prompt_logprobs=asked.num_prompt_logprobs,
            ),
            caller=self._caller,
            rope=ROPES[self.target.rope],
        )
        message.MergeFrom(self._prompts[index])
        return message

    def _param(self, field: str | None) -> str | None:
        name = parameter(field)
        if name == "grammar" and self._grammar is not None:
            return self._grammar[0]
        if name == "cartridges" and self.asked.cartridges is None:
            return "model"
        return self.asked.max_tokens_name if name == "max_new_tokens" else name


def parameter(field: str | None) -> str | None:
    """The parameter that a field of a rollout server's request came from."""
    if field is None:
        return None
    # In a list there is `messages[0].role`, here `messages.0.role`.
    name = field.removeprefix("sampling.").replace("[", ".").replace("]", "")
    return _PARAMS.get(name, name)
