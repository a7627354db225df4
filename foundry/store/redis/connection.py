"""The connection to Redis (or Valkey): scripts, typed errors, and noticing that Redis was emptied or replaced.

`foundry:epoch` holds the run id of the server for which pointers were last restored. A server that restarted (empty or
with an old snapshot) or a replica that took over has another run id, and one that was emptied has none; then every
checked script answers `empty` and changes nothing until `on_empty` has restored the pointers from object storage.

Arguments and replies of scripts carry a checksum: a bit that flips on the way (TCP's own 16-bit sum misses some) moves
no pointer and is read by nobody as another version. A reply's also covers its call: where a flipped bit puts requests
and replies out of step, nobody takes the answer to another question.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import redis.asyncio.connection as connections
import redis.connection as blocking_connections
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ConnectionError,
    InvalidResponse,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry as BlockingRetry

from foundry.errors import DigestMismatch, FoundryError, StoreFull, StoreRefused, StoreUnavailable
from foundry.store import metrics
from foundry.store.credentials import RedisAccess
from foundry.store.redis import scripts

_CONNECTIONS = 64
_WAITING_CONNECTIONS = 10_000
_CLASSES = {
    "tcp": (connections.Connection, blocking_connections.Connection),
    "tls": (connections.SSLConnection, blocking_connections.SSLConnection),
    "unix": (connections.UnixDomainSocketConnection, blocking_connections.UnixDomainSocketConnection),
}

# What to do where Redis holds what no script of ours wrote.
RESTORE = "'foundry store verify' says what else is, 'foundry store rebuild --force' restores it"

Reply = list[Any]
E = TypeVar("E", bound=FoundryError)


class Connection:
    """Two pools of connections. Errors of the server become StoreUnavailable, StoreRefused or StoreFull."""

    def __init__(self, access: RedisAccess, *, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        # What every connection is made with, blocking ones too: place, user, password, TLS, timeouts. Has secrets.
        self.options: dict[str, Any] = access.options | {
            "socket_timeout": timeout_seconds,
            "socket_connect_timeout": timeout_seconds,
        }
        kind, self._blocking_kind = _CLASSES[access.transport]
        # Once, for an idle connection that the server closed. All else is retried by callers, with a budget.
        retry = Retry(NoBackoff(), 1, supported_errors=(ConnectionError,))
        pooled = self.options | {"connection_class": kind, "retry": retry}
        # Commands wait for a free connection; a pool of the other kind refuses them.
        self.redis = Redis.from_pool(
            BlockingConnectionPool(max_connections=_CONNECTIONS, timeout=timeout_seconds, **pooled)
        )
        # Whoever waits for an event holds a connection meanwhile, and must not take it from those who work.
        self._waiting = Redis.from_pool(ConnectionPool(max_connections=_WAITING_CONNECTIONS, **pooled))
        self.on_empty: Callable[[], Awaitable[object]] = _nothing_restores

    async def close(self) -> None:
        await self.redis.aclose()
        await self._waiting.aclose()

    def open_blocking(self) -> blocking_connections.AbstractConnection:
        """One more connection, for a thread that moves bulk bytes: connected, authenticated, speaking RESP2.

        The caller closes it with `disconnect()`. Blocks for `timeout_seconds` at the most. Raises as commands do.
        """
        options = self.options | {"protocol": 2, "retry": BlockingRetry(NoBackoff(), 0)}
        connection: blocking_connections.AbstractConnection = self._blocking_kind(**options)
        with redis_errors():
            connection.connect()  # type: ignore[no-untyped-call]
        return connection

    async def run(self, script: str, *args: str | int) -> Reply:
        """Run `lua/<script>.lua` on restored pointers. The reply begins with its status, a str; bytes are decoded."""
        for _ in range(2):
            reply = await self._eval(script, args, checked=True)
            if reply[0] != "empty":
                return reply
            await self.on_empty()
        raise StoreUnavailable("Redis was emptied again while its pointers were being restored")

    async def run_restoring(self, script: str, *args: str | int) -> Reply:
        """Run a script that restores pointers: it sees `epoch`, `restored` and `server_run` and decides by itself."""
        return await self._eval(script, args, checked=False)

    async def read(self, command: str, *args: str | int) -> Any:
        """One reading command on restored pointers."""
        return (await self.run("read", command, *args))[1]

    async def read_stream(self, key: str, after: str, *, block: bool) -> list[tuple[str, dict[str, str]]]:
        """Entries of a stream after the id `after`; a blocking read waits a while for the first one."""
        # Shorter than the socket's own patience.
        block_ms = max(1, int(self.timeout_seconds * 500)) if block else None
        redis = self._waiting if block else self.redis
        with redis_errors(f"reading {key}"):
            streams: Any = await redis.xread({key: after}, count=1000, block=block_ms)
            metrics.REDIS.answered()
            return [
                (entry_id.decode(), {_decoded(name): _decoded(value) for name, value in fields.items()})
                for _, entries in streams
                for entry_id, fields in entries
            ]

    async def wait_for_token(self, key: str, seconds: float) -> None:
        """Take one item off a list, or give up after `seconds`, at most half the socket's patience."""
        with redis_errors(f"waiting for {key}"):
            # To Redis 0 means for ever.
            await self._waiting.blpop([key], timeout=max(0.01, min(seconds, self.timeout_seconds / 2)))

    async def _eval(self, script: str, args: tuple[str | int, ...], *, checked: bool) -> Reply:
        arguments = [*(str(arg).encode() for arg in args), os.urandom(8).hex().encode()]
        asked = _sha1(_text(arguments))
        what = f"{script} {' '.join(map(str, args[:2]))}"[:200]
        with redis_errors(what), metrics.REDIS_SECONDS.time():
            reply = await self._call(scripts.text(script, checked=checked), [*arguments, asked])
        metrics.REDIS.answered()
        # A reply of another shape is damaged too: whatever it was, its checksum isn't there.
        if not (isinstance(reply, list) and len(reply) == 2 and reply[1] == _sha1(asked + _text(reply[0]))):
            # Those that are out of step would never come into step again.
            await self.redis.connection_pool.disconnect(inuse_connections=False)
            raise StoreUnavailable("what was said to Redis or what it answered was damaged on the way")
        return cast(Reply, _decoded(reply[0]))

    async def _call(self, text: str, args: list[bytes]) -> Any:
        sha = _sha1(text.encode()).decode()
        try:
            return await self.redis.evalsha(sha, 0, *args)
        except NoScriptError:
            loaded = await self.redis.script_load(text)
        if loaded not in (sha, sha.encode()):
            # Another script, which a flipped bit made of ours. Nobody calls it.
            raise StoreUnavailable("a script was damaged on its way to Redis")
        return await self.redis.evalsha(sha, 0, *args)


@contextmanager
def redis_errors(what: str = "connecting") -> Iterator[None]:
    """Raises StoreUnavailable, StoreRefused or StoreFull for what Redis or the way to it refuses, DigestMismatch where
    `what` was asked of Redis met a key that no script of ours wrote. None of these texts holds a password."""
    try:
        yield
    except OutOfMemoryError as error:
        raise _counted(StoreFull(f"Redis is full: {error}")) from error
    except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
        raise _refused(error) from error
    except (
        ConnectionError,
        TimeoutError,
        OSError,
        InvalidResponse,
        UnicodeDecodeError,
        BusyLoadingError,
        MasterDownError,
        ReadOnlyError,
        # It was restarted between loading a script and running it.
        NoScriptError,
    ) as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise _counted(
                StoreRefused(f"Redis' certificate is not trusted, check store.redis_ca_file: {error}")
            ) from error
        raise _counted(StoreUnavailable(f"Redis can't be used: {error}")) from error
    except ResponseError as error:
        # What a script may not do has no type of its own.
        if "ACL failure in script" in str(error):
            raise _refused(error) from error
        if "WRONGTYPE" in str(error) or ("user_script" in str(error) and "compiling" not in str(error)):
            # A script dies of nothing else, or of a fault of ours.
            raise DigestMismatch(f"what Redis holds is damaged, {what} failed: {error}. {RESTORE}") from error
        # Commands and scripts that nobody sent so: they were damaged on the way.
        raise _counted(StoreUnavailable(f"Redis did not understand: {error}")) from error


def _refused(error: Exception) -> StoreRefused:
    return _counted(
        StoreRefused(
            f"Redis refused us: check user and password (store.redis_*) and the user's ACL (docs/store.md): {error}"
        )
    )


def _counted(error: E) -> E:
    metrics.REDIS.failed(error)
    return error


def _sha1(content: bytes) -> bytes:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest().encode()


def _text(item: Any) -> bytes:
    if isinstance(item, list):
        return b"[" + b",".join(map(_text, item)) + b"]"
    if isinstance(item, bytes):
        return b"%d:%s" % (len(item), item)
    return b"-" if item is None else b"%d" % item


def _decoded(reply: Any) -> Any:
    if isinstance(reply, bytes):
        # What is not UTF-8 is refused by whoever parses it, with its place.
        return reply.decode(errors="surrogateescape")
    if isinstance(reply, list):
        return [_decoded(item) for item in reply]
    return reply


async def _nothing_restores() -> None:
    raise StoreUnavailable("Redis is empty and this connection can't restore it")
