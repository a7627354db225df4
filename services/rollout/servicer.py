"""The Rollout service: checks what comes in, holds its cartridges, and tells in every answer what decoded it."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import grpc
import structlog

from foundry.errors import InvalidArgument, Unavailable
from foundry.identity import answer_checksum
from foundry.v1 import common_pb2, rollout_pb2, rollout_pb2_grpc
from services.rollout.admission import Admission
from services.rollout.copies import read_key
from services.rollout.driver import Submission
from services.rollout.engine import FinishReason, PromptLogprobs, TokenOutput
from services.rollout.grammar import FIELD
from services.rollout.residency import Residency
from services.rollout.serving import Serving

log = structlog.get_logger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
Message = TypeVar("Message", rollout_pb2.GenerateRequest, rollout_pb2.GenerateBatchRequest)
A = TypeVar("A")
T = TypeVar("T")

_FINISH_REASONS = {
    FinishReason.STOP: rollout_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: rollout_pb2.FINISH_REASON_LENGTH,
}
# Of a call: the tokenizer is through with fewer in some milliseconds.
_LONG_BYTES = 64 * 1024
# A client that reads slowly finds many tokens waiting; a chunk of this many stays far below the message limit.
_CHUNK_TOKENS = 256


class RolloutServicer(rollout_pb2_grpc.RolloutServicer):
    """Answers Unavailable until `begin`: the port is open while the model is still loading."""

    def __init__(self, say_not_serving: Callable[[], Awaitable[None]]) -> None:
        """`say_not_serving` tells those who watch the server's health that it takes no more work."""
        self._say_not_serving = say_not_serving
        self._serving: Serving | None = None
        # A long text takes the tokenizer seconds, in which the tokens of all others would not be sent, and short calls
        # not be taken: those have a thread of their own.
        self._checking = ThreadPoolExecutor(max_workers=1, thread_name_prefix="admission")
        self._checking_long = ThreadPoolExecutor(max_workers=1, thread_name_prefix="admission-long")
        # A grammar takes seconds too, and whoever has none shall not wait for it.
        self._compiling = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        # Of its own: a text to be counted may be far longer than a prompt, and nobody's answer waits for it.
        self._counting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")

    def begin(self, serving: Serving) -> None:
        self._serving = serving

    async def Generate(
        self, request: rollout_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[rollout_pb2.GenerateChunk]:
        serving = self._loaded()
        arrived_at = time.perf_counter()
        grammar = None
        if request.sampling.HasField("grammar"):
            compile_ = serving.grammars.compile
            grammar = await _in_thread(self._compiling, compile_, request.sampling.grammar)
        admission = await self._checked(partial(serving.admissions.check, grammar=grammar), request)
        answers = [_Answer(serving, admission) for _ in admission.sequences]
        async with _submitted(serving, [admission], arrived_at) as submission:
            async for outputs in submission:
                for begin in range(0, len(outputs), _CHUNK_TOKENS):
                    for index, some in _by_sequence(outputs[begin : begin + _CHUNK_TOKENS]):
                        answer = answers[index]
                        offsets = [output.text_offset for output in answer.shown(some)]
                        first = answer.first(some[0])
                        yield rollout_pb2.GenerateChunk(index=index, text_offsets=offsets, **first, **answer.add(some))

    async def GenerateBatch(
        self, request: rollout_pb2.GenerateBatchRequest, context: Context
    ) -> AsyncIterator[rollout_pb2.GenerateBatchResponse]:
        serving = self._loaded()
        arrived_at = time.perf_counter()
        admissions = await self._checked(serving.admissions.check_batch, request)
        places = [
            (request_index, index, _Answer(serving, admission))
            for request_index, admission in enumerate(admissions)
            for index in range(len(admission.sequences))
        ]
        waiting: list[list[TokenOutput]] = [[] for _ in places]
        async with _submitted(serving, admissions, arrived_at) as submission:
            async for outputs in submission:
                for place, output in outputs:
                    waiting[place].append(output)
                    if output.finish_reason is not None:
                        request_index, index, answer = places[place]
                        completion = rollout_pb2.Completion(
                            index=index, identity=answer.identity(output), **answer.add(waiting[place])
                        )
                        completion.checksum = answer_checksum(
                            admissions[request_index].sequences[index].prompt_ids, completion.ids, completion.logprobs
                        )
                        yield rollout_pb2.GenerateBatchResponse(request_index=request_index, completion=completion)
        log.info(
            "batch answered",
            num_answers=len(places),
            num_tokens=sum(answer.num_tokens for _, _, answer in places),
            seconds=round(time.perf_counter() - arrived_at, 6),
        )

    async def Tokenize(self, request: rollout_pb2.TokenizeRequest, context: Context) -> rollout_pb2.TokenizeResponse:
        tokenized = self._loaded().admissions.tokenized
        return await asyncio.get_running_loop().run_in_executor(self._counting, tokenized, request)

    async def Detokenize(
        self, request: rollout_pb2.DetokenizeRequest, context: Context
    ) -> rollout_pb2.DetokenizeResponse:
        detokenized = self._loaded().admissions.detokenized
        text = await asyncio.get_running_loop().run_in_executor(self._counting, detokenized, request)
        return rollout_pb2.DetokenizeResponse(text=text)

    async def Resident(self, request: rollout_pb2.ResidentRequest, context: Context) -> rollout_pb2.ResidentResponse:
        serving = self._loaded()
        return rollout_pb2.ResidentResponse(
            model_fingerprint=serving.spec.fingerprint,
            model_name=serving.model_name,
            template_digest=serving.template_digest,
            max_sequence_tokens=serving.admissions.max_sequence_tokens,
            cartridges=_residents(serving.residency),
            budget_bytes=serving.residency.device.budget_bytes,
            host_budget_bytes=serving.residency.host.budget_bytes,
            max_sequences=serving.max_sequences,
            template=rollout_pb2.TemplateFeatures(
                renders=sorted(serving.features.renders),
                variables=sorted(serving.features.variables),
                tool_format=serving.features.tool_format,
            ),
        )

    async def Drain(self, request: rollout_pb2.DrainRequest, context: Context) -> rollout_pb2.DrainResponse:
        serving = self._loaded()
        # First, so that clients which balance by health are gone before they are refused.
        await self._say_not_serving()
        await serving.driver.drain()
        return rollout_pb2.DrainResponse()

    async def _checked(self, check: Callable[[Message], T], request: Message) -> T:
        thread = self._checking_long if request.ByteSize() > _LONG_BYTES else self._checking
        return await _in_thread(thread, check, request)

    def _loaded(self) -> Serving:
        if self._serving is None:
            raise Unavailable("the model is still loading", retry_after_seconds=1.0)
        return self._serving


async def _in_thread(pool: ThreadPoolExecutor, check: Callable[[A], T], message: A) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, check, message)


def _residents(residency: Residency) -> list[rollout_pb2.ResidentCartridge]:
    """Each cartridge once, with the nearest tier that holds it, and copies whose keys were moved."""
    on_device = [
        rollout_pb2.ResidentCartridge(
            cartridge=resident.named,
            num_bytes=resident.num_bytes,
            references=resident.references,
            tier=rollout_pb2.TIER_DEVICE,
            shift=resident.shift,
        )
        for resident in residency.device.residents()
    ]
    on_host = [
        rollout_pb2.ResidentCartridge(cartridge=kept.named, num_bytes=kept.num_bytes, tier=rollout_pb2.TIER_HOST)
        for kept in residency.host.entries()
        if kept.named.digest not in residency.device
    ]
    return [*on_device, *on_host]


@asynccontextmanager
async def _submitted(serving: Serving, admissions: Sequence[Admission], arrived_at: float) -> AsyncIterator[Submission]:
    """The submission of these requests, with their cartridges held until the engine has let go of it."""
    hold = await serving.residency.hold(*_wanted(admissions))
    try:
        fitting = [serving.admissions.fit(admission, hold.num_tokens) for admission in admissions]
        submission = serving.driver.submit(
            admissions[0].client, [each for fit in fitting for each in fit.sequences], arrived_at=arrived_at
        )
    except BaseException:
        hold.release()
        raise
    submission.ended.add_done_callback(lambda _: hold.release())
    try:
        yield submission
    finally:
        # The client went away, or its time is over.
        serving.driver.cancel(submission)


def _wanted(
    admissions: Sequence[Admission],
) -> tuple[list[tuple[common_pb2.CartridgeId, int]], list[tuple[Sequence[common_pb2.CartridgeId], int]]]:
    """Cartridges that stay where they were trained, and stacks of those that stand one behind the other; each once,
    with the number of sequences behind it."""
    cartridges: dict[str, common_pb2.CartridgeId] = {}
    stacks: dict[tuple[str, ...], Sequence[common_pb2.CartridgeId]] = {}
    behind_one: Counter[str] = Counter()
    behind_all: Counter[tuple[str, ...]] = Counter()
    for admission in admissions:
        digests = admission.sequences[0].digests
        if admission.shift:
            stacks[digests] = admission.cartridges
            behind_all[digests] += len(admission.sequences)
        else:
            cartridges |= {named.digest: named for named in admission.cartridges}
            behind_one.update({digest: len(admission.sequences) for digest in digests})
    kept = [(named, behind_one[digest]) for digest, named in cartridges.items()]
    return kept, [(stack, behind_all[digests]) for digests, stack in stacks.items()]


class _Answer:
    """One completion as it grows."""

    def __init__(self, serving: Serving, admission: Admission) -> None:
        self._serving = serving
        self._cartridges = admission.cartridges
        self._shift = admission.shift
        self._prompt_ids = admission.sequences[0].prompt_ids
        self._only_scored = admission.only_scored
        self._begun = False
        self.num_tokens = 0

    def identity(self, output: TokenOutput) -> common_pb2.Identity:
        """Digests, and where their keys stood, are those that the engine decoded with; names and versions are the
        caller's."""
        copies = [read_key(key) for key in output.digests]
        # Of a single one both are the same.
        shifted = self._shift if len(copies) < 2 else any(shift for _, shift in copies)
        return common_pb2.Identity(
            rope=common_pb2.ROPE_SHIFT if shifted else common_pb2.ROPE_KEEP,
            model_fingerprint=self._serving.spec.fingerprint,
            cartridges=[
                common_pb2.CartridgeId(name=named.name, version=named.version, digest=digest)
                for named, (digest, _) in zip(self._cartridges, copies, strict=True)
            ],
            template_digest=self._serving.template_digest,
        )

    def first(self, output: TokenOutput) -> dict[str, Any]:
        """What stands in the first chunk besides, and in no later one."""
        if self._begun:
            return {}
        self._begun = True
        fields: dict[str, Any] = {"identity": self.identity(output), "prompt_tokens": len(self._prompt_ids)}
        if output.prompt_logprobs is not None:
            fields["prompt_logprobs"] = _prompt_logprobs(self._prompt_ids, output.prompt_logprobs)
        return fields

    def shown(self, outputs: Sequence[TokenOutput]) -> Sequence[TokenOutput]:
        return () if self._only_scored else outputs

    def add(self, outputs: Sequence[TokenOutput]) -> dict[str, Any]:
        """The fields that a chunk and a completion share. Raises InvalidArgument if the grammar was too much, and
        the sequence's error if it has one."""
        last = outputs[-1]
        if last.error is not None:
            raise last.error
        if last.finish_reason is FinishReason.ERROR:
            raise InvalidArgument("the grammar can't be followed further: it is too complex", field=FIELD)
        outputs = self.shown(outputs)
        self.num_tokens += len(outputs)
        fields: dict[str, Any] = {
            "ids": [output.token_id for output in outputs],
            "text": "".join(output.text for output in outputs),
            "logprobs": [output.logprob for output in outputs],
            "top_logprobs": [_top_logprobs(output) for output in outputs if output.top_logprobs],
        }
        if last.finish_reason is not None:
            fields["finish_reason"] = _FINISH_REASONS[last.finish_reason]
            fields["usage"] = rollout_pb2.Usage(
                prompt_tokens=len(self._prompt_ids),
                completion_tokens=self.num_tokens,
                cartridge_tokens=last.cartridge_tokens,
                cached_tokens=last.cached_tokens,
            )
        return fields


def _top_logprobs(output: TokenOutput) -> rollout_pb2.TopLogprobs:
    ids, logprobs = zip(*output.top_logprobs, strict=True)
    return rollout_pb2.TopLogprobs(ids=ids, logprobs=logprobs)


def _prompt_logprobs(ids: Sequence[int], scores: PromptLogprobs) -> rollout_pb2.PromptLogprobs:
    num_alternatives = scores.top_ids_nK.shape[1]
    nothing = [math.nan] * num_alternatives
    return rollout_pb2.PromptLogprobs(
        ids=ids,
        logprobs=[math.nan, *scores.logprobs_n.tolist()],
        ranks=[0, *scores.ranks_n.int().tolist()],
        top_ids=[*[0] * num_alternatives, *scores.top_ids_nK.int().flatten().tolist()],
        top_logprobs=[*nothing, *scores.top_logprobs_nK.flatten().tolist()],
    )


def _by_sequence(outputs: Sequence[tuple[int, TokenOutput]]) -> list[tuple[int, list[TokenOutput]]]:
    grouped: dict[int, list[TokenOutput]] = {}
    for index, output in outputs:
        grouped.setdefault(index, []).append(output)
    return list(grouped.items())
