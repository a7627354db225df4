"""The Teacher service: checks what comes in, runs it on the one device thread, sends it back in parts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from threading import Event
from typing import Any, TypeVar

import grpc
import structlog

from foundry.errors import Cancelled, FingerprintMismatch, IdentityMismatch, InvalidArgument, ResourceExhausted
from foundry.identity import ids_checksum, ids_digest
from foundry.model.lm import FrozenLM
from foundry.model.packing import micro_batches
from foundry.model.template import ChatTemplate
from foundry.rpc import tensors
from foundry.rpc.callers import check_caller
from foundry.rpc.limits import PART_BYTES
from foundry.rpc.teacher import scores_checksum
from foundry.v1 import common_pb2, teacher_pb2, teacher_pb2_grpc
from services.teacher import metrics
from services.teacher.contexts import Contexts
from services.teacher.disk import DiskContexts
from services.teacher.pages import Key
from services.teacher.scorer import Item, ItemScores, Want, check_item, score
from services.teacher.settings import TeacherSettings

log = structlog.get_logger(__name__)

MAX_TOPK = 1024
Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


class TeacherServicer(teacher_pb2_grpc.TeacherServicer):
    """Contexts and scores of one frozen model."""

    def __init__(self, lm: FrozenLM, settings: TeacherSettings) -> None:
        self._lm = lm
        self._template = ChatTemplate(lm.tokenizer, settings.template_clock)
        self._contexts = _contexts(lm, settings)
        self._max_context_tokens = lm.spec.max_tokens - min(settings.reserve_tokens, lm.spec.max_tokens // 4)
        self._micro_batch_tokens = settings.micro_batch_tokens
        self._max_pending = settings.max_pending_requests
        metrics.MAX_PENDING.set(self._max_pending)
        self._pending = 0
        # Tokenizers take one call at a time, and seconds for a long document.
        self._tokenizing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        # One thread: the device does one forward at a time, and the contexts need no lock.
        self._device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="teacher")

    async def PutContext(
        self, request: teacher_pb2.PutContextRequest, context: Context
    ) -> teacher_pb2.PutContextResponse:
        self._check_fingerprint(request.model_fingerprint)
        tenant = check_caller(request.caller).tenant
        if request.without_document and request.document:
            raise InvalidArgument("there is a document, and without_document is set", field="without_document")
        ids = await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._context_ids, request)
        key = Key(tenant, ids_digest(ids))
        await self._run(partial(self._contexts.put, key, ids))
        return teacher_pb2.PutContextResponse(context_digest=key.digest, num_tokens=len(ids), identity=self._identity())

    async def Score(
        self, request: teacher_pb2.ScoreRequest, context: Context
    ) -> AsyncIterator[teacher_pb2.ScoreResponse]:
        began = time.perf_counter()
        items = self._checked_items(request)
        want = self._checked_want(request.want)
        tenant = check_caller(request.caller).tenant
        index = 0
        async for scores in self._scores(tenant, items, want):
            for part in self._parts(request, index, scores):
                yield part
            index += 1
        log.info(
            "scored",
            num_answers=len(items),
            num_tokens=sum(len(item.ids) - item.score_from for item in items),
            seconds=round(time.perf_counter() - began, 6),
        )

    async def _scores(self, tenant: str, items: Sequence[Item], want: Want) -> AsyncIterator[ItemScores]:
        """In the order of the items. The device gets a micro-batch before the one ahead of it is waited for."""
        ahead: Callable[[], list[ItemScores]] | None = None
        for some in (*micro_batches(items, self._micro_batch_tokens), None):
            begun = await self._run(partial(self._score, tenant, items[some], want)) if some else None
            if ahead:
                for scores in await asyncio.to_thread(ahead):
                    yield scores
            ahead = begun

    def close(self) -> None:
        self._device.shutdown()
        self._contexts.close()
        self._tokenizing.shutdown()

    async def _run(self, work: Callable[[Callable[[], None]], T]) -> T:
        """`work` on the device's thread. What it is given raises Cancelled once the caller is gone or out of time."""
        if self._pending >= self._max_pending:
            raise ResourceExhausted(f"{self._pending} calls are waiting for the teacher", retry_after_seconds=1.0)
        gone = Event()

        def go_on() -> None:
            if gone.is_set():
                raise Cancelled("nobody waits for this any more")

        loop = asyncio.get_running_loop()
        self._count(1)
        running = self._device.submit(work, go_on)
        # Not before the device is free of it.
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(self._count, -1))
        try:
            return await asyncio.wrap_future(running)
        finally:
            gone.set()

    def _count(self, change: int) -> None:
        self._pending += change
        metrics.PENDING.set(self._pending)

    def _context_ids(self, request: teacher_pb2.PutContextRequest) -> list[int]:
        if request.without_document:
            return self._template.bare()
        return self._template.context(request.document, max_tokens=self._max_context_tokens)

    def _score(
        self, tenant: str, items: Sequence[Item], want: Want, go_on: Callable[[], None]
    ) -> Callable[[], list[ItemScores]]:
        """Start to score one micro-batch; what it returns waits for the scores."""
        go_on()
        began = time.perf_counter()
        # Looked up here, on the device thread, so that no eviction comes between look-up and use.
        keys = [Key(tenant, item.context_digest) for item in items]
        scorings = [
            score(self._lm, items[some], self._contexts.get(keys[some]), want) for some in self._contexts.fitting(keys)
        ]

        def result() -> list[ItemScores]:
            scores = [each for scoring in scorings for each in scoring.result()]
            metrics.SCORE_SECONDS.observe(time.perf_counter() - began)
            metrics.SCORED_ANSWERS.inc(len(items))
            metrics.SCORED_TOKENS.inc(sum(len(item.ids) - item.score_from for item in items))
            return scores

        return result

    def _parts(
        self, request: teacher_pb2.ScoreRequest, index: int, scores: ItemScores
    ) -> Iterator[teacher_pb2.ScoreResponse]:
        """One item's scores as messages of at most PART_BYTES."""
        item = request.items[index]
        # Fields of the message are named as those of ItemScores, without the shape.
        present = {
            field.name.rpartition("_")[0]: value
            for field in fields(scores)
            if (value := getattr(scores, field.name)) is not None
        }
        num_rows = len(item.token_ids.ids) - item.score_from
        row_bytes = sum(tensor.nbytes // num_rows for tensor in present.values())
        step = max(1, PART_BYTES // max(1, row_bytes))
        for row in range(0, num_rows, step):
            begin, end = item.score_from + row, item.score_from + min(row + step, num_rows)
            messages = {name: tensors.to_message(tensor[row : row + step]) for name, tensor in present.items()}
            yield teacher_pb2.ScoreResponse(
                item=index,
                begin=begin,
                end=end,
                ids_checksum=ids_checksum(item.token_ids.ids, begin, end),
                context_digest=item.context_digest,
                identity=self._identity(),
                tensors_checksum=scores_checksum(messages.values()),
                **messages,
            )

    def _checked_items(self, request: teacher_pb2.ScoreRequest) -> list[Item]:
        self._check_fingerprint(request.model_fingerprint)
        if request.template_digest != self._template.digest:
            raise IdentityMismatch(
                f"the ids were made with template {request.template_digest or '(none)'}, "
                f"the teacher's is {self._template.digest}"
            )
        if not request.items:
            raise InvalidArgument("items is empty", field="items")
        items = [Item(item.context_digest, list(item.token_ids.ids), item.score_from) for item in request.items]
        for index, item in enumerate(items):
            check_item(index, item, self._lm.spec.vocab_size)
        return items

    def _checked_want(self, want: teacher_pb2.Want) -> Want:
        vocab_size = self._lm.spec.vocab_size
        if want.topk > min(MAX_TOPK, vocab_size - 1):
            raise InvalidArgument(
                f"want.topk is {want.topk}, at most {min(MAX_TOPK, vocab_size - 1)}", field="want.topk"
            )
        if not want.topk and not want.hidden:
            raise InvalidArgument("want asks for nothing", field="want")
        return Want(want.topk, want.hidden)

    def _check_fingerprint(self, fingerprint: str) -> None:
        if fingerprint != self._lm.spec.fingerprint:
            raise FingerprintMismatch(
                f"the caller means model {fingerprint or '(none)'}, the teacher serves {self._lm.spec.fingerprint}"
            )

    def _identity(self) -> common_pb2.Identity:
        return common_pb2.Identity(model_fingerprint=self._lm.spec.fingerprint, template_digest=self._template.digest)


def _contexts(lm: FrozenLM, settings: TeacherSettings) -> Contexts:
    """With the tiers that the settings ask for. Raises InvalidArgument if the disk's directory can't be used."""
    host_budget_bytes = settings.host_context_budget_bytes
    if host_budget_bytes is None:
        host_budget_bytes = 0 if lm.device.type == "cpu" else 4 * 1024**3
    disk = None
    if settings.disk_context_directory is not None:
        model = f"{lm.spec.fingerprint} {lm.dtype}"
        disk = DiskContexts(settings.disk_context_directory, settings.disk_context_budget_bytes, model)
    return Contexts(lm, settings.context_budget_bytes, host_budget_bytes, disk)
