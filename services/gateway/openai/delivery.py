"""An answer on its way to the client: in one piece or as server-sent events, and cancelled when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from foundry.errors import Cancelled, FoundryError
from services.gateway import metrics
from services.gateway.errors import error_body
from services.gateway.openai.generation import Answer, Choice, Chunk

T = TypeVar("T")


async def whole(answer: Answer, request: Request, render: Callable[[list[Choice]], BaseModel]) -> Response:
    """The answer in one piece."""
    body = render(await unless_disconnected(request, answer.gather()))
    return Response(body.model_dump_json(), media_type="application/json", headers=answer.headers())


async def stream(
    answer: Answer, request: Request, render: Callable[[int, Chunk], BaseModel], last: Callable[[], BaseModel]
) -> Response:
    """Server-sent events. What fails before the first token still has its own HTTP status."""
    chunks = answer.chunks()
    first = await unless_disconnected(request, anext(chunks))

    async def events() -> AsyncGenerator[bytes, None]:
        async with contextlib.aclosing(chunks):
            try:
                yield _event(render(*first))
                async for index, chunk in chunks:
                    yield _event(render(index, chunk))
            except FoundryError as error:
                metrics.ERRORS.labels(error.reason).inc()
                # No [DONE]: what was cut short must not look whole.
                yield _event(error_body(error))
                return
        options = answer.asked.stream_options
        if options is not None and options.include_usage:
            yield _event(last())
        yield b"data: [DONE]\n\n"

    return _EventStream(events(), answer.headers())


class _EventStream(StreamingResponse):
    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        # The second header stops nginx from holding events back.
        super().__init__(events, headers=headers | {"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # A client that leaves while we wait to send would otherwise let the rollout server go on until collection.
            await self._events.aclose()


def _event(body: BaseModel | dict[str, dict[str, str | None]]) -> bytes:
    text = body.model_dump_json() if isinstance(body, BaseModel) else json.dumps(body)
    return f"data: {text}\n\n".encode()


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away; then raises Cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Cancelled("the client went away")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
