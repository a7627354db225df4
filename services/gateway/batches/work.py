"""Answering batches: a few requests at a time, as a client of its own among those that somebody waits for.

Answers are written down every second. A gateway that dies loses those of its last second, and they are made again by
the gateway that takes the batch up.
"""

from __future__ import annotations

import asyncio
import mmap
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import IO, Any
from uuid import uuid4

import structlog
from pydantic import ValidationError

from foundry.errors import FileNotKept, FoundryError, InvalidArgument, ResourceExhausted, Unavailable
from foundry.store import BatchFinal, BatchRecord, BatchStore, Row
from foundry.tasks import end
from foundry.validation import invalid_argument
from services.gateway.access.principal import Principal
from services.gateway.batches.lines import BatchLine, answered, body_of, read_lines, unanswered
from services.gateway.errors import error_body
from services.gateway.openai import chat, completions
from services.gateway.openai.rendering import Renderer
from services.gateway.openai.requests.chat import ChatRequest
from services.gateway.openai.requests.completion import CompletionRequest
from services.gateway.openai.requests.sampling import SamplingRequest
from services.gateway.state import Gateway
from services.gateway.tokasaurus.requests import TokasaurusChat, TokasaurusCompletion
from services.gateway.tokasaurus.routes import prepared_chat, prepared_completion

log = structlog.get_logger(__name__)

_AT_ONCE = 4
_FLUSH_SECONDS = 1.0
# Of what is written in one piece.
_MAX_PIECE_BYTES = 4 * 2**20
_MAX_BACKOFF_SECONDS = 30.0

Prepare = Callable[[Gateway, Principal, Any], Awaitable[Renderer]]
_ENDPOINTS: dict[str, tuple[type[SamplingRequest], Prepare]] = {
    "/v1/chat/completions": (ChatRequest, chat.prepared),
    "/v1/completions": (CompletionRequest, completions.prepared),
    "/v1/cartridge/chat/completions": (TokasaurusChat, prepared_chat),
    "/v1/cartridge/completions": (TokasaurusCompletion, prepared_completion),
}


class BatchWorker:
    """Takes up batches that nobody works on."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._settings = gateway.settings.batches
        self._holder = uuid4().hex
        self._places = asyncio.Semaphore(self._settings.concurrency)
        self._working: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until cancelled: then leases are given back."""
        try:
            while True:
                try:
                    await self._look()
                except FoundryError as error:
                    log.warning("batches not looked at", error=error.message)
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._settings.poll_seconds):
                        await self._gateway.batch_created.wait()
                self._gateway.batch_created.clear()
        finally:
            await end(*self._working.values())

    async def _look(self) -> None:
        for name in await self._gateway.store.batches.open():
            if len(self._working) >= _AT_ONCE:
                return
            if name not in self._working:
                attempt = _Attempt(self._gateway, *name, self._holder, self._places)
                if await attempt.claim():
                    self._working[name] = asyncio.create_task(self._run(name, attempt))

    async def _run(self, name: tuple[str, str], attempt: _Attempt) -> None:
        try:
            await attempt.run()
        finally:
            del self._working[name]
            # There may be others that wait.
            self._gateway.batch_created.set()


class _Attempt:
    """One gateway's work on a batch."""

    def __init__(self, gateway: Gateway, tenant: str, batch_id: str, holder: str, places: asyncio.Semaphore) -> None:
        self._gateway, self._settings = gateway, gateway.settings.batches
        self._tenant, self._batch_id, self._holder, self._places = tenant, batch_id, holder, places
        self._batches: BatchStore = gateway.store.batches.of(tenant)
        self._files = gateway.store.files.of(tenant)
        self._attempt = self._num_pieces = 0
        self._rows: list[Row] = []

    async def claim(self) -> bool:
        """False if another gateway works on it. Raises FoundryError."""
        attempt = await self._batches.claim(self._batch_id, self._holder, self._settings.lease_seconds)
        self._attempt = attempt or 0
        return attempt is not None

    async def run(self) -> None:
        """Until it is over, or another gateway has it."""
        structlog.contextvars.bind_contextvars(batch=self._batch_id, tenant=self._tenant)
        try:
            tasks = [asyncio.create_task(each()) for each in (self._work, self._keep_lease)]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                await end(*tasks)
                await self._extend(0.0)
        except FoundryError as error:
            log.warning("batch left", error=error.message)
        except Exception:
            log.exception("batch left")

    async def _keep_lease(self) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_seconds / 3)
            await self._extend(self._settings.lease_seconds)

    async def _extend(self, seconds: float) -> None:
        await self._batches.extend(self._batch_id, self._holder, self._attempt, seconds)

    async def _work(self) -> None:
        state = await self._batches.get(self._batch_id)
        if state.final is not None:
            return
        record = state.record
        try:
            content = await self._files.content(record.input_file_id)
        except FileNotKept as error:
            await self._fail(
                {"code": "file_not_found", "line": None, "message": error.message, "param": "input_file_id"}
            )
            return
        lines, errors = await asyncio.to_thread(
            read_lines,
            content,
            endpoint=record.endpoint,
            max_lines=self._settings.max_requests,
            max_line_bytes=self._gateway.settings.max_request_bytes,
        )
        if errors:
            await self._fail(*errors)
            return
        await self._batches.begin(self._batch_id, len(lines))
        done = {row.line async for rows in self._batches.rows(self._batch_id) for row in rows}
        log.info("batch taken up", attempt=self._attempt, num_requests=len(lines), num_answered=len(done))
        try:
            async with asyncio.timeout(record.expires_at - time.time()):
                await self._answer(record, content, lines, done)
        except TimeoutError:
            log.info("batch expired")
        await self._finish(record, lines)

    async def _fail(self, *errors: dict[str, Any]) -> None:
        await self._batches.finish(self._batch_id, BatchFinal(status="failed", at=int(time.time()), errors=errors))

    async def _answer(self, record: BatchRecord, content: memoryview, lines: list[BatchLine], done: set[int]) -> None:
        """All that is not answered, until it is to be cancelled."""
        todo = (number for number in range(len(lines)) if number not in done)

        async def answer_some() -> None:
            for number in todo:
                async with self._places:
                    self._rows.append(await self._row(record, content, lines[number], number))

        running = {asyncio.create_task(answer_some()) for _ in range(self._settings.concurrency)}
        try:
            while running and not await self._is_unwanted(record):
                ended, running = await asyncio.wait(running, timeout=_FLUSH_SECONDS)
                for task in ended:
                    task.result()
                await self._flush()
        finally:
            await end(*running)
            await self._flush()

    async def _is_unwanted(self, record: BatchRecord) -> bool:
        authentication = self._gateway.authentication
        if authentication is not None and await authentication.is_gone(record.client):
            await self._batches.cancel(self._batch_id)
        return await self._batches.is_cancelled(self._batch_id)

    async def _flush(self) -> None:
        while self._rows:
            piece: list[Row] = []
            num_bytes = 0
            for row in self._rows:
                num_bytes += len(row.text.encode())
                if piece and num_bytes > _MAX_PIECE_BYTES:
                    break
                piece.append(row)
            await self._batches.append(self._batch_id, self._attempt, self._num_pieces, piece)
            self._num_pieces += 1
            del self._rows[: len(piece)]

    async def _row(self, record: BatchRecord, content: memoryview, line: BatchLine, number: int) -> Row:
        """What is for now out of reach is asked for again."""
        backoff_seconds = 0.5
        while True:
            try:
                text = await self._answered(record, body_of(content, line), line)
                if len(text.encode()) > _MAX_PIECE_BYTES:
                    raise InvalidArgument(f"the answer has more than {_MAX_PIECE_BYTES} bytes: ask for less")
                return Row(number, True, text)
            except (Unavailable, ResourceExhausted):
                await asyncio.sleep(backoff_seconds * random.uniform(0.5, 1.0))
                backoff_seconds = min(_MAX_BACKOFF_SECONDS, 2 * backoff_seconds)
            except FoundryError as error:
                return Row(number, False, answered(line, error.http_status, "", error_body(error)))

    async def _answered(self, record: BatchRecord, body: dict[str, Any], line: BatchLine) -> str:
        kind, prepare = _ENDPOINTS[record.endpoint]
        try:
            asked = kind.model_validate(body)
        except ValidationError as error:
            raise invalid_argument(error.errors()[0]) from error
        if asked.stream:
            raise InvalidArgument("a batch has no streams", field="stream")
        renderer = await prepare(self._gateway, self._principal(record), asked)
        whole = renderer.whole(await renderer.generation.gather())
        return answered(line, 200, renderer.generation.id, whole.model_dump(mode="json"))

    def _principal(self, record: BatchRecord) -> Principal:
        """Who asked, but as a client of its own, so that its batches stand behind what the same key asks now."""
        client = f"{record.client[:120]}/batch" if record.client else "batch"
        authentication = self._gateway.authentication
        if authentication is None:
            return Principal(client=client, tenant=record.tenant or None)
        return Principal(client=client, tenant=record.tenant, granted=authentication.granted(record.tenant))

    async def _finish(self, record: BatchRecord, lines: list[BatchLine]) -> None:
        await self._batches.finalize(self._batch_id)
        unbegun = dict(enumerate(lines))
        is_cancelled = await self._batches.is_cancelled(self._batch_id)
        counts = {True: 0, False: 0}
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            async for rows in self._batches.rows(self._batch_id):
                for row in rows:
                    del unbegun[row.line]
                    counts[row.completed] += 1
                    (output if row.completed else errors).write(row.text.encode() + b"\n")
            if unbegun and not is_cancelled:
                for line in unbegun.values():
                    counts[False] += 1
                    text = unanswered(line, "batch_expired", "the batch's time was over before it was answered")
                    errors.write(text.encode() + b"\n")
            for file, file_id, kind in (
                (output, record.output_file_id, "output"),
                (errors, record.error_file_id, "errors"),
            ):
                await self._keep(file, file_id, f"{self._batch_id}_{kind}.jsonl")
        status = "cancelled" if unbegun and is_cancelled else "expired" if unbegun else "completed"
        final = BatchFinal.model_validate(
            {
                "status": status,
                "at": int(time.time()),
                "total": len(lines),
                "completed": counts[True],
                "failed": counts[False],
            }
        )
        await self._batches.finish(self._batch_id, final)
        log.info("batch over", status=status, num_completed=final.completed, num_failed=final.failed)

    async def _keep(self, file: IO[bytes], file_id: str, filename: str) -> None:
        file.flush()
        if not file.tell():
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            content = memoryview(mapped)
            try:
                await self._files.put(
                    content,
                    filename=filename,
                    purpose="batch_output",
                    keep_seconds=self._settings.keep_seconds,
                    file_id=file_id,
                )
            finally:
                content.release()
