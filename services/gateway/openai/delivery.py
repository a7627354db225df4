"""An answer on its way to the client: in one piece or as server-sent events, and cancelled when the client leaves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable
from contextlib import suppress
from typing import TypeVar

from fastapi import Request, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from foundry.errors import Cancelled, FoundryError
from foundry.tasks import end
from services.gateway import metrics
from services.gateway.errors import error_body
from services.gateway.openai.generation import Chunk
from services.gateway.openai.rendering import Renderer

T = TypeVar("T")
Chunks = AsyncGenerator[tuple[int, Chunk], None]


async def respond(renderer: Renderer, request: Request) -> Response:
    """What fails before the first token has its own HTTP status, in a stream too."""
    generation = renderer.generation
    if generation.asked.stream:
        chunks = generation.chunks()
        first = await unless_disconnected(request.receive, anext(chunks))
        return EventStream(_events(renderer, first, chunks), chunks, generation.headers())
    body = renderer.whole(await unless_disconnected(request.receive, generation.gather()))
    return Response(body.model_dump_json(), media_type="application/json", headers=generation.headers())


async def _events(renderer: Renderer, first: tuple[int, Chunk], chunks: Chunks) -> AsyncGenerator[bytes, None]:
    try:
        yield _deltas(renderer, *first)
        async for index, chunk in chunks:
            yield _deltas(renderer, index, chunk)
    except FoundryError as error:
        metrics.ERRORS.labels(error.reason).inc()
        # No [DONE]: what was cut short must not look whole.
        yield _event(json.dumps(error_body(error)))
        return
    options = renderer.generation.asked.stream_options
    if options is not None and options.include_usage:
        yield _event(renderer.last().model_dump_json())
    yield _event("[DONE]")


def _deltas(renderer: Renderer, index: int, chunk: Chunk) -> bytes:
    """Sent at once: each sending goes through all middleware and HTTP."""
    return b"".join(_event(delta.model_dump_json()) for delta in renderer.deltas(index, chunk))


def _event(data: str) -> bytes:
    return format_sse_event(data_str=data)


class EventStream(EventSourceResponse):
    """Events made of chunks, which end with it."""

    def __init__(self, events: AsyncGenerator[bytes, None], chunks: Chunks, headers: dict[str, str]) -> None:
        # The second header stops nginx from holding events back.
        super().__init__(events, headers=headers | {"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            # Nobody is there to be told.
            with suppress(Cancelled):
                await unless_disconnected(receive, self.stream_response(send))
        except OSError as error:
            # What Starlette makes of a connection that is closed while we send.
            raise ClientDisconnect from error
        finally:
            # A client that leaves while we wait to send would otherwise let the rollout server go on until collection.
            await self._chunks.aclose()


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away; then raises Cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client went away")
    finally:
        await end(task, gone)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
