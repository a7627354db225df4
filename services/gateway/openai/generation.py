"""One completion request: resolve what is meant, have it generated, check what the answer was made with."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

import structlog

from foundry.errors import (
    CartridgeNotFound,
    FoundryError,
    IdentityMismatch,
    InvalidArgument,
    ModelNotFound,
    NotFound,
    Unavailable,
)
from foundry.store import CartridgeId, Reference
from foundry.v1 import common_pb2, rollout_pb2
from services.gateway import metrics
from services.gateway.openai.types import (
    DEFAULT_MAX_TOKENS,
    CartridgeInfo,
    FoundryInfo,
    PromptTokensDetails,
    SamplingRequest,
    UsageInfo,
)
from services.gateway.rollouts import ServedModel
from services.gateway.state import Gateway

Prompt = common_pb2.Conversation | common_pb2.TokenIds | str
Chunk = rollout_pb2.GenerateChunk
T = TypeVar("T")

# Fields of GenerateRequest by the parameters that they came from; those of `sampling` have their parameter's name.
_PARAMS = {
    "conversation": "messages",
    "digest": "model",
    "max_new_tokens": "max_tokens",
    "model_fingerprint": "model",
    "text": "prompt",
    "token_ids": "prompt",
}
# How often a reference is resolved for one request.
_RESOLUTIONS = 3
_FINISH_REASONS = {rollout_pb2.FINISH_REASON_STOP: "stop", rollout_pb2.FINISH_REASON_LENGTH: "length"}


@dataclass(frozen=True, slots=True)
class Target:
    """What `model` and `cartridges` of a request stand for, fixed once."""

    model: ServedModel
    cartridges: tuple[CartridgeId, ...]

    @classmethod
    async def resolve(cls, gateway: Gateway, asked: SamplingRequest) -> Target:
        """Raises ModelNotFound, CartridgeNotFound, InvalidArgument, Unavailable."""
        model = gateway.rollouts.model()
        if asked.cartridges is not None:
            if asked.model != model.name:
                raise InvalidArgument(f"with `cartridges`, model must be the base model {model.name!r}", field="model")
            cartridges = [await _resolve(gateway, reference, "cartridges") for reference in asked.cartridges]
        else:
            cartridges = [] if asked.model == model.name else [await _resolve(gateway, asked.model, "model")]
        return cls(model, tuple(cartridges))

    def check(self, identity: common_pb2.Identity) -> None:
        """Raises IdentityMismatch unless an answer was made with exactly this."""
        wanted = (self.model.fingerprint, [cartridge.digest for cartridge in self.cartridges])
        found = (identity.model_fingerprint, [cartridge.digest for cartridge in identity.cartridges])
        if wanted != found:
            metrics.IDENTITY_MISMATCHES.inc()
            raise IdentityMismatch(f"the rollout server answered with (model, cartridges) {found}, asked were {wanted}")


async def _resolve(gateway: Gateway, reference: str, param: str) -> CartridgeId:
    try:
        return await gateway.store.resolve(Reference.parse(reference, field=param))
    except InvalidArgument as error:
        if param == "model":
            raise ModelNotFound(f"there is no model {reference!r}: {error.message}", field=param) from error
        raise
    except NotFound as error:
        error.field = param
        raise


@dataclass(slots=True)
class Choice:
    """One completion, gathered."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[rollout_pb2.TopLogprobs] = field(default_factory=list)
    # Where in `text` the chunk of each id begins.
    offsets: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, chunk: Chunk) -> None:
        self.offsets += [len(self.text)] * len(chunk.ids)
        self.text += chunk.text
        self.ids += chunk.ids
        self.logprobs += chunk.logprobs
        self.top_logprobs += chunk.top_logprobs
        self.finish_reason = finish_reason(chunk)


class Answer:
    """The chunks of every prompt and choice, each checked against the target before anything of it is passed on."""

    def __init__(
        self, gateway: Gateway, target: Target, asked: SamplingRequest, prompts: Sequence[Prompt], id_prefix: str
    ) -> None:
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
        self._gateway = gateway
        self._prompts = prompts
        self._template_digest = target.model.template_digest
        # Known when the first choice has ended.
        self._cartridge_tokens: int | None = None
        # Of each prompt, and within it of each choice.
        self._usages: dict[int, dict[int, rollout_pb2.Usage]] = defaultdict(dict)

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """(choice, chunk) as they arrive. Closing the generator cancels what still runs. Raises FoundryError.

        While a run publishes, the version that `latest` meant may be swept before a server has fetched it. Then, and
        only before the first token, the reference is resolved anew: the answer names what it was made with.
        """
        for resolutions_left in reversed(range(_RESOLUTIONS)):
            begun = False
            try:
                async with contextlib.aclosing(self._attempt()) as chunks:
                    async for choice, chunk in chunks:
                        begun = True
                        yield choice, chunk
                return
            except CartridgeNotFound:
                if begun or not resolutions_left:
                    raise
                target = await Target.resolve(self._gateway, self.asked)
                if target == self.target:
                    raise
                self.target = target

    async def _attempt(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        began = time.monotonic()
        deadline = began + self._gateway.settings.request_timeout_seconds
        streams = [self._generate(self._request(index, prompt), deadline) for index, prompt in enumerate(self._prompts)]
        identified: set[int] = set()
        with self._gateway.admitted():
            async with contextlib.aclosing(_merge(streams)) as merged:
                async for prompt_index, chunk in merged:
                    choice = prompt_index * self.asked.num_choices + chunk.index
                    if choice not in identified:
                        self.target.check(chunk.identity)
                        self._template_digest = chunk.identity.template_digest
                        if not identified:
                            metrics.FIRST_TOKEN_SECONDS.observe(time.monotonic() - began)
                        identified.add(choice)
                    if chunk.HasField("usage"):
                        self._usages[prompt_index][chunk.index] = chunk.usage
                        self._cartridge_tokens = chunk.usage.cartridge_tokens
                    yield choice, chunk
        if sum(len(usages) for usages in self._usages.values()) < self._num_choices:
            raise Unavailable("the rollout server ended the stream before every choice was complete")
        self._count()

    async def _generate(self, message: rollout_pb2.GenerateRequest, deadline: float) -> AsyncGenerator[Chunk, None]:
        rollouts = self._gateway.rollouts
        while True:
            try:
                async with contextlib.aclosing(rollouts.generate(message, deadline=deadline)) as chunks:
                    async for chunk in chunks:
                        yield chunk
                return
            except FoundryError as error:
                # Only the server knows the prompt's length: a default that does not fit is halved until it does.
                too_long = error.field == "sampling.max_new_tokens" and message.sampling.max_new_tokens > 1
                if not too_long or self.asked.asked_max_tokens is not None:
                    error.field = _param(error.field)
                    error.message = error.message.replace("max_new_tokens", "max_tokens")
                    raise
                message.sampling.max_new_tokens //= 2

    async def gather(self) -> list[Choice]:
        choices = [Choice() for _ in range(self._num_choices)]
        async with contextlib.aclosing(self.chunks()) as chunks:
            async for index, chunk in chunks:
                choices[index].add(chunk)
        return choices

    def headers(self) -> dict[str, str]:
        headers = {"x-request-id": self.id}
        if self.target.cartridges:
            headers["x-foundry-cartridge"] = ", ".join(str(cartridge) for cartridge in self.target.cartridges)
            headers["x-foundry-digest"] = ", ".join(cartridge.digest for cartridge in self.target.cartridges)
        return headers

    def head(self) -> dict[str, Any]:
        """What every body of the answer begins with, whole or a chunk."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": f"fp_{self.target.model.fingerprint.removeprefix('blake3:')[:12]}",
        }

    def info(self) -> FoundryInfo:
        return FoundryInfo(
            model_fingerprint=self.target.model.fingerprint,
            template_digest=self._template_digest,
            cartridges=[
                CartridgeInfo(name=cartridge.name, version=cartridge.version, digest=cartridge.digest)
                for cartridge in self.target.cartridges
            ],
            cartridge_tokens=self._cartridge_tokens,
        )

    def usage(self) -> UsageInfo:
        """A prompt counts once however many choices it has."""
        prompts = self._usages.values()
        prompt_tokens = sum(usages[0].prompt_tokens for usages in prompts)
        completion_tokens = sum(usage.completion_tokens for usages in prompts for usage in usages.values())
        cached_tokens = sum(usages[0].cached_tokens for usages in prompts)
        return UsageInfo(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )

    def _count(self) -> None:
        usage = self.usage()
        metrics.PROMPT_TOKENS.inc(usage.prompt_tokens)
        metrics.CACHED_TOKENS.inc(usage.prompt_tokens_details.cached_tokens)
        metrics.GENERATION_TOKENS.inc(usage.completion_tokens)

    def _request(self, index: int, prompt: Prompt) -> rollout_pb2.GenerateRequest:
        asked = self.asked
        message = rollout_pb2.GenerateRequest(
            request_id=f"{self.id}-{index}",
            model_fingerprint=self.target.model.fingerprint,
            cartridges=[
                common_pb2.CartridgeId(name=cartridge.name, version=cartridge.version, digest=cartridge.digest)
                for cartridge in self.target.cartridges
            ],
            sampling=rollout_pb2.Sampling(
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=max(0, asked.top_k or 0),
                max_new_tokens=asked.asked_max_tokens or DEFAULT_MAX_TOKENS,
                stop=asked.stop,
                seed=asked.seed,
                n=asked.num_choices,
                ignore_eos=bool(asked.ignore_eos),
                logprobs=asked.num_logprobs or 0,
            ),
        )
        match prompt:
            case str():
                message.text = prompt
            case common_pb2.TokenIds():
                message.token_ids.CopyFrom(prompt)
            case _:
                message.conversation.CopyFrom(prompt)
        return message


def _param(field: str | None) -> str | None:
    if field is None:
        return None
    name = field.removeprefix("sampling.")
    return _PARAMS.get(name, name)


def finish_reason(chunk: Chunk) -> str | None:
    """OpenAI's word; None while the completion goes on."""
    return _FINISH_REASONS.get(chunk.finish_reason)


async def _merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all streams with their stream's number, as they come. The first failure ends them all."""
    pending = {asyncio.ensure_future(anext(stream, None)): index for index, stream in enumerate(streams)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = pending.pop(task)
                item = task.result()
                if item is not None:
                    yield index, item
                    pending[asyncio.ensure_future(anext(streams[index], None))] = index
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
