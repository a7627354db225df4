"""The gateway with a certificate: who may connect, for how long, and what a renewal changes."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from foundry.client import FoundryClient
from foundry.errors import InvalidArgument
from services.gateway.https import Https
from services.gateway.settings import GatewaySettings
from tests.contract.gateway_routes.site import Site
from tests.process import Process
from tests.services import metric, wait_until
from tests.tls import Authority

_HOST = "127.0.0.1"
_MAX_CONNECTIONS = 8


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("https"))


@pytest.fixture(scope="module")
def gateway(site: Site, authority: Authority) -> Iterator[Process]:
    certificate, key = authority.issue(_HOST)
    gateway = site.stack.gateway(
        [site.rollout],
        *("--https-server-certificate-file", str(certificate), "--https-server-key-file", str(key)),
        *("--max-connections", str(_MAX_CONNECTIONS), "--max-upload-seconds", "2"),
    )
    wait_until(lambda: _get(gateway, authority, "/readyz").status_code == 200, gateway)
    yield gateway
    gateway.stop()


def _get(gateway: Process, authority: Authority, path: str) -> httpx.Response:
    context = ssl.create_default_context(cafile=authority.file)
    return httpx.get(f"https://{gateway.address}{path}", verify=context, trust_env=False)


def _connect(gateway: Process) -> socket.socket:
    host, _, port = gateway.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def _secured(gateway: Process, authority: Authority) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=authority.file)
    return context.wrap_socket(_connect(gateway), server_hostname=_HOST)


def _read(connection: socket.socket) -> bytes:
    """All until the gateway closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def _count(gateway: Process) -> float:
    return metric(gateway.metrics, "foundry_gateway_connections")


def test_the_sdk_trusts_an_authority_of_the_environment(
    gateway: Process, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    with FoundryClient(f"https://{gateway.address}") as client:
        assert client.chat("tiny", "How?", max_tokens=4, ignore_eos=True).completion_tokens == 4


def test_who_speaks_plain_http_is_let_go_without_an_answer(gateway: Process) -> None:
    with _connect(gateway) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = b""
        with suppress(ConnectionResetError):
            answer = _read(connection)
    assert b"HTTP/" not in answer
    wait_until(lambda: _count(gateway) == 0, gateway)


def test_old_protocols_are_refused(gateway: Process, authority: Authority) -> None:
    context = ssl.create_default_context(cafile=authority.file)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.set_ciphers("ALL:@SECLEVEL=0")
    with _connect(gateway) as connection, pytest.raises((ssl.SSLError, ConnectionResetError)):
        context.wrap_socket(connection, server_hostname=_HOST)


def test_a_request_behind_the_handshake_in_one_packet_is_answered(gateway: Process, authority: Authority) -> None:
    """As those do who resume a session, or don't wait."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cafile=authority.file)
    client = context.wrap_bio(incoming, outgoing, server_hostname=_HOST)
    with _connect(gateway) as connection:
        while True:
            try:
                client.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
                incoming.write(connection.recv(65536))
        client.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        connection.sendall(outgoing.read())
        answer = b""
        while b'"ok"' not in answer:
            with suppress(ssl.SSLWantReadError):
                answer += client.read()
                continue
            incoming.write(connection.recv(65536))
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_who_does_not_end_the_handshake_is_counted_and_let_go(gateway: Process, authority: Authority) -> None:
    wait_until(lambda: _count(gateway) == 0, gateway)
    refused = metric(gateway.metrics, "foundry_gateway_refused_connections_total", reason="full")
    with ExitStack() as held:
        kept = [held.enter_context(_connect(gateway)) for _ in range(_MAX_CONNECTIONS)]
        wait_until(lambda: _count(gateway) == _MAX_CONNECTIONS, gateway)
        assert _read(held.enter_context(_connect(gateway))) == b""
        for connection in kept:
            assert _read(connection) == b""
    assert metric(gateway.metrics, "foundry_gateway_refused_connections_total", reason="full") == refused + 1
    wait_until(lambda: _count(gateway) == 0, gateway)
    assert _get(gateway, authority, "/healthz").status_code == 200


def test_who_does_not_send_a_request_is_told_so_under_tls(gateway: Process, authority: Authority) -> None:
    with _secured(gateway, authority) as connection:
        connection.sendall(b"GET /heal")
        assert _read(connection).startswith(b"HTTP/1.1 408 ")


def test_a_renewed_certificate_is_shown_to_the_next_connection(gateway: Process, authority: Authority) -> None:
    def shown() -> bytes | None:
        with _secured(gateway, authority) as connection:
            return connection.getpeercert(binary_form=True)

    with _secured(gateway, authority) as open_before:
        before = shown()
        _, key = authority.issue(_HOST)
        assert shown() != before
        renewed = shown()
        # Half of a renewal changes nothing.
        kept = key.read_bytes()
        key.write_bytes(b"junk")
        assert shown() == renewed
        key.write_bytes(kept)
        open_before.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert _read(open_before).startswith(b"HTTP/1.1 200 ")
    log = gateway.log.read_text()
    assert "certificate renewed" in log
    assert log.count("certificate not renewed") == 1


def _missing(certificate: Path, key: Path, other: Path) -> None:
    key.unlink()


def _mismatching(certificate: Path, key: Path, other: Path) -> None:
    key.write_bytes(other.read_bytes())


def _junk(certificate: Path, key: Path, other: Path) -> None:
    certificate.write_bytes(b"junk")


@pytest.mark.parametrize(
    ("damage", "named"), [(_missing, "a.test.key"), (_mismatching, "a.test.key"), (_junk, "a.test.pem")]
)
def test_files_that_cannot_be_used_end_the_start(site: Site, tmp_path: Path, damage: object, named: str) -> None:
    authority = Authority(tmp_path / "authority")
    certificate, key = authority.issue("a.test")
    _, other = authority.issue("b.test")
    assert callable(damage)
    damage(certificate, key, other)
    with pytest.raises(InvalidArgument, match=named):
        Https(certificate, key)
    gateway = site.stack.gateway(
        [site.rollout], "--https-server-certificate-file", str(certificate), "--https-server-key-file", str(key)
    )
    assert gateway.wait() == 1
    assert named in gateway.log.read_text()


def test_a_certificate_without_a_key_is_no_setting(site: Site) -> None:
    with pytest.raises(ValueError, match="set both or none"):
        GatewaySettings(store=site.stack.settings, https_server_certificate_file=Path("a.pem"))
