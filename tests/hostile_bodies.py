"""Bodies that cost more to read than to send, and what they cost: a gateway's memory and other requests' time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from threading import Event

import httpx

from services.gateway.bodies import MAX_PARTS, MAX_VALUES
from services.gateway.openai.requests.template import MAX_MESSAGES
from tests.process import Process

_BYTES = 3 * 2**20 - 200
_COMPLETIONS, _CHAT, _RUNS, _DOCUMENTS = "/v1/completions", "/v1/chat/completions", "/v1/runs", "/v1/documents"
# Of memory, a body counts as at least so many bytes.
MIN_BYTES = 2**20


def _with(parameter: str, value: bytes, /, **others: object) -> bytes:
    """A body whose `parameter` is `value`, JSON already."""
    return json.dumps({"model": "tiny", **others}).encode()[:-1] + b', "%s": %s}' % (parameter.encode(), value)


def _many(value: bytes, count: int) -> bytes:
    return b"[" + b",".join([value] * count) + b"]"


def _filled(value: bytes) -> bytes:
    return _many(value, _BYTES // (len(value) + 1))


def bodies(document_bytes: int) -> dict[str, tuple[str, bytes]]:
    """Path and body by what is wrong with it; those of documents and runs have `document_bytes`."""
    message = b'{"role":"user","content":"a"}'
    completion = {
        "ordinary": (_CHAT, _with("messages", _many(message, 1), temperature=7)),
        "empty messages without end": (_CHAT, _with("messages", _filled(b"{}"))),
        "empty stops without end": (_CHAT, _with("stop", _filled(b'""'), messages=[])),
        "numbers without end": (_COMPLETIONS, _with("prompt", _filled(b"999"))),
        "deep": (_CHAT, _with("messages", b"[" * _BYTES)),
        "deep as may be": (_CHAT, _with("messages", b"[" * 60 + b"]" * 60)),
        # Within the bounds.
        "empty messages": (_CHAT, _with("messages", _many(b"{}", MAX_PARTS - 9))),
        "whole messages": (_CHAT, _with("messages", _many(message, MAX_MESSAGES + 1))),
        "empty stops": (_CHAT, _with("stop", _many(b'""', MAX_PARTS - 9), messages=[])),
        "numbers as stops": (_CHAT, _with("stop", _many(b"0", MAX_VALUES - 9), messages=[])),
        # Ids that take memory each.
        "token ids": (_COMPLETIONS, _with("prompt", _many(b"999", MAX_VALUES - 9))),
        "fractions": (_COMPLETIONS, _with("prompt", _many(b"1.5", MAX_VALUES - 9))),
        "empty prompts": (_COMPLETIONS, _with("prompt", _many(b"[]", MAX_PARTS - 9))),
        "small objects": (_COMPLETIONS, _with("prompt", _many(b'{"a":0}', MAX_PARTS // 2 - 9))),
        "parts": (_CHAT, _with("messages", b'[{"role":"user","content":' + _many(b'{"type":"text"}', 16_000) + b"}]")),
        "unknown keys": (_CHAT, json.dumps(dict.fromkeys(map(str, range(MAX_PARTS - 9)))).encode()),
        "neutral": (_CHAT, _with("tools", _many(b"{}", MAX_PARTS - 9), messages=[])),
        "text": (_COMPLETIONS, _with("prompt", b'"' + b"a" * _BYTES + b'"', temperature=7)),
        "escapes": (_COMPLETIONS, _with("prompt", b'"' + b"\\u4e00" * (_BYTES // 6) + b'"', temperature=7)),
    }
    document = {
        "documents": (_RUNS, _with("more_documents", _many(b'"a"', MAX_PARTS - 99), name="a", text="a")),
        "commas": (_RUNS, _with("families", b'"' + b"," * document_bytes + b'"', name="a", text="a")),
        "digest": (_RUNS, _with("document", b'"' + b"a" * document_bytes + b'"', name="a")),
        "escaped text": (_RUNS, _with("text", b'"' + b"\\u4e00" * (document_bytes // 6) + b'"', name="A")),
        "escaped document": (_DOCUMENTS, b'{"texts": "' + b"\\u4e00" * (document_bytes // 6) + b'"}'),
    }
    return completion | document


@dataclass(frozen=True, slots=True)
class Cost:
    status: int
    answer_bytes: int
    seconds: float
    # The longest that another request took meanwhile.
    delay_seconds: float
    # Beyond the most that the gateway held before.
    peak_bytes: int


def cost(gateway: Process, path: str, body: bytes) -> Cost:
    with httpx.Client(base_url=f"http://{gateway.address}", trust_env=False, timeout=120) as client:
        before = gateway.peak_bytes()
        began = time.perf_counter()
        with _polled(gateway) as delays:
            answer = client.post(path, content=body, headers=_JSON)
        seconds = time.perf_counter() - began
        return Cost(answer.status_code, len(answer.content), seconds, max(delays), gateway.peak_bytes() - before)


def warm_up(gateway: Process) -> None:
    """Has the gateway make what a first request makes for all that follow."""
    body = _with("messages", b'"' + b"a" * 2**16 + b'"')
    for _ in range(8):
        httpx.post(f"http://{gateway.address}{_CHAT}", content=body, headers=_JSON, trust_env=False)


_JSON = {"content-type": "application/json"}


@contextmanager
def _polled(gateway: Process) -> Iterator[list[float]]:
    """How long requests take that are made meanwhile, one after another."""
    host, _, port = gateway.address.rpartition(":")
    polling, done = Event(), Event()
    delays: list[float] = []

    def poll() -> None:
        # Of the standard library: it does little beside what is measured.
        connection = HTTPConnection(host, int(port), timeout=120)
        while not done.is_set():
            began = time.perf_counter()
            connection.request("GET", "/healthz")
            connection.getresponse().read()
            delays.append(time.perf_counter() - began)
            polling.set()
        connection.close()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(poll)
        polling.wait(60)
        delays.clear()
        try:
            yield delays
        finally:
            done.set()
            future.result()
