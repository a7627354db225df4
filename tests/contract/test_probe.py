"""The probe that health checks run: its exit status says how a real server is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from foundry.rpc import probe
from foundry.rpc.access import Access
from foundry.rpc.server import Server
from foundry.rpc.tls import Tls
from foundry.rpc.tokens import make_tokens
from foundry.v1 import rollout_pb2, rollout_pb2_grpc
from tests.contract.scripted_rollout import serving
from tests.tls import Authority

SERVICE = rollout_pb2.DESCRIPTOR.services_by_name["Rollout"]


async def status(*arguments: str) -> int:
    return await asyncio.to_thread(probe.main, list(arguments))


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """Listens, and does not serve yet."""
    server = Server("127.0.0.1:0", [SERVICE])
    await server.start()
    yield server
    await server.stop(0)


async def test_it_follows_the_health_service(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{server.port}"
    assert await status(address) == 1
    assert f"{address}: NOT_SERVING" in capsys.readouterr().err
    await server.set_serving()
    assert await status(address) == 0
    await server.set_not_serving()
    assert await status(address) == 1


async def test_alive_is_whoever_answers(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{server.port}"
    assert await status("--live", address) == 0
    await server.stop(0)
    assert await status("--live", address) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


async def test_without_an_address_it_asks_its_own_container(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    await server.set_serving()
    monkeypatch.setenv("FOUNDRY_LISTEN", f"0.0.0.0:{server.port}")
    assert await status() == 0


async def test_under_mutual_tls_it_shows_the_services_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("localhost")
    server = Server("127.0.0.1:0", [SERVICE], Tls(certificate, key, authority.file))
    await server.start()
    await server.set_serving()
    address = f"127.0.0.1:{server.port}"
    assert await status(address) == 1
    for name, file in (("CERTIFICATE", certificate), ("KEY", key), ("CA", authority.file)):
        monkeypatch.setenv(f"FOUNDRY_TLS_{name}_FILE", str(file))
    assert await status(address) == 0
    await server.stop(0)


async def test_a_drain_shows_the_operators_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Idle(rollout_pb2_grpc.RolloutServicer):
        async def Drain(self, request: object, context: object) -> rollout_pb2.DrainResponse:
            return rollout_pb2.DrainResponse()

    make_tokens(tmp_path)
    async with serving(Idle(), access=Access(tmp_path / "servers")) as server:
        address = f"127.0.0.1:{server.port}"
        assert await status("--drain", "10", address) == 1
        assert "UNAUTHENTICATED" in capsys.readouterr().err
        monkeypatch.setenv("FOUNDRY_RPC_TOKENS_DIRECTORY", str(tmp_path / "servers"))
        assert await status("--drain", "10", address) == 0
        monkeypatch.setenv("FOUNDRY_RPC_TOKENS_DIRECTORY", str(tmp_path / "gateway"))
        assert await status("--drain", "10", address) == 1
        assert "operator can't be read" in capsys.readouterr().err


async def test_a_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CERTIFICATE", "KEY", "CA"):
        monkeypatch.setenv(f"FOUNDRY_TLS_{name}_FILE", str(tmp_path / "missing.pem"))
    assert await status("127.0.0.1:1") == 1
