"""Clients that open connections and send little."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from foundry.errors import InvalidArgument
from services.gateway.connections import raise_descriptor_limit
from tests.contract.gateway_routes.site import Site
from tests.process import Process
from tests.services import get, metric, wait_ready, wait_until

_MAX_CONNECTIONS = 8
_HALF_A_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
_HALF_A_BODY = _HALF_A_HEAD + b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"


@pytest.fixture(scope="module")
def gateway(site: Site) -> Iterator[Process]:
    gateway = site.stack.gateway(
        [site.rollout], "--max-connections", str(_MAX_CONNECTIONS), "--max-upload-seconds", "2"
    )
    wait_ready(gateway)
    yield gateway
    gateway.stop()


def _connect(gateway: Process, sent: bytes) -> socket.socket:
    host, _, port = gateway.address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall(sent)
    return connection


def _read(connection: socket.socket) -> bytes:
    """All until the gateway closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def _idle(gateway: Process) -> bool:
    return metric(gateway.metrics, "foundry_gateway_connections") == 0


@pytest.mark.parametrize("sent", [b"", b"GET", _HALF_A_HEAD, _HALF_A_BODY])
def test_who_does_not_send_a_request_is_let_go(gateway: Process, sent: bytes) -> None:
    with _connect(gateway, sent) as connection:
        answer = _read(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"was not sent within 2 s" in answer


def test_a_second_request_has_as_long_as_the_first(gateway: Process) -> None:
    with _connect(gateway, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n") as connection:
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200 ")
        connection.sendall(_HALF_A_HEAD)
        assert b"HTTP/1.1 408 " in _read(connection)


def test_more_connections_than_it_keeps_are_refused(gateway: Process) -> None:
    wait_until(lambda: _idle(gateway), gateway)
    with ExitStack() as held:
        kept = [held.enter_context(_connect(gateway, _HALF_A_BODY)) for _ in range(_MAX_CONNECTIONS)]
        answer = _read(held.enter_context(_connect(gateway, b"")))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in answer
        for connection in kept:
            _read(connection)
    assert get(gateway, "/healthz").status_code == 200


def test_a_connection_is_kept_as_long_as_is_set(site: Site) -> None:
    for seconds, is_kept in ((0.2, False), (30.0, True)):
        gateway = site.stack.gateway([site.rollout], "--keep-alive-seconds", str(seconds))
        wait_ready(gateway)
        with _connect(gateway, b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n") as connection:
            connection.settimeout(2)
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += connection.recv(65536)
            if is_kept:
                with pytest.raises(TimeoutError):
                    connection.recv(1)
            else:
                assert connection.recv(1) == b""
        gateway.stop()


def test_the_system_must_allow_the_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pytest.raises(InvalidArgument, match="file descriptors"):
        raise_descriptor_limit(hard)
    raise_descriptor_limit(1)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)
