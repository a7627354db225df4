"""Who is let in between the services, who is not and is told why, and certificates that are renewed meanwhile."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import ValidationError

from foundry.errors import InvalidArgument, Unavailable
from foundry.rpc.channel import open_channel, typed_errors
from foundry.rpc.pods import Pods
from foundry.rpc.server import Server
from foundry.rpc.tls import Tls
from foundry.v1 import rollout_pb2
from services.teacher.settings import TeacherSettings
from tests.tls import Authority

NAME = "rollout.test"
OLD, NEW = "old.rollout.test", "new.rollout.test"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def stranger(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "stranger")


def tls(authority: Authority, name: str) -> Tls:
    return Tls(*authority.issue(name), authority.file)


@asynccontextmanager
async def serving(tls: Tls | None, address: str = "127.0.0.1:0") -> AsyncIterator[Server]:
    server = Server(address, [rollout_pb2.DESCRIPTOR.services_by_name["Rollout"]], tls)
    await server.start()
    await server.set_serving()
    try:
        yield server
    finally:
        await server.stop(0)


async def lookup(host: str) -> Sequence[str]:
    return ["127.0.0.1"]


async def ask(channel: grpc.aio.Channel) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    return int(answer.status)


async def call(server: Server, tls: Tls | None, name: str = NAME) -> None:
    """One call from a new client that knows the server by `name`. Raises what it meets."""
    pods = Pods("rollout", [f"{name}:{server.port}"], tls, lookup=lookup)
    try:
        await call_again(pods)
    finally:
        await pods.close()


async def call_again(pods: Pods) -> None:
    (pod,) = await pods.look()
    with pod.calling() as channel:
        assert await ask(channel) == health_pb2.HealthCheckResponse.SERVING


async def test_services_of_one_authority_talk(authority: Authority) -> None:
    async with serving(tls(authority, NAME)) as server:
        await call(server, tls(authority, "gateway.test"))


async def test_a_server_given_by_number_has_it_in_its_certificate(authority: Authority) -> None:
    async with serving(tls(authority, "127.0.0.1"), "0.0.0.0:0") as server:
        await call(server, tls(authority, "gateway.test"), "127.0.0.1")
        with pytest.raises(Unavailable, match="does not carry the name"):
            await call(server, tls(authority, "gateway.test"), "127.0.0.2")


async def test_nobody_is_let_in_without_tls(authority: Authority) -> None:
    async with serving(tls(authority, NAME)) as server:
        with pytest.raises(Unavailable, match="may serve with TLS"):
            await call(server, None)


async def test_nobody_is_let_in_without_a_certificate(authority: Authority) -> None:
    async with serving(tls(authority, NAME)) as server:
        credentials = grpc.ssl_channel_credentials(authority.file.read_bytes())
        options = (("grpc.ssl_target_name_override", NAME),)
        async with grpc.aio.secure_channel(f"127.0.0.1:{server.port}", credentials, options) as channel:
            with pytest.raises(Unavailable, match="no certificate of its authority"), typed_errors("rollout"):
                await ask(channel)


async def test_a_client_of_another_authority_is_told_why(authority: Authority, stranger: Authority) -> None:
    async with serving(tls(authority, NAME)) as server:
        other = Tls(*stranger.issue("gateway.test"), authority.file)
        with pytest.raises(Unavailable, match=rf"rollout 127.0.0.1:{server.port}: .*no certificate of its authority"):
            await call(server, other)


async def test_a_server_of_another_authority_is_not_believed(authority: Authority, stranger: Authority) -> None:
    async with serving(Tls(*stranger.issue(NAME), authority.file)) as server:
        with pytest.raises(Unavailable, match=r"its certificate is not of the authority in tls_ca_file"):
            await call(server, tls(authority, "gateway.test"))


async def test_another_service_is_not_believed(authority: Authority) -> None:
    async with serving(tls(authority, "teacher.test")) as server:
        with pytest.raises(Unavailable, match=f"does not carry the name .* {NAME}"):
            await call(server, tls(authority, "gateway.test"))


async def test_a_server_without_tls_is_not_believed(authority: Authority) -> None:
    async with serving(None) as server:
        with pytest.raises(Unavailable, match="it serves without TLS"):
            await call(server, tls(authority, "gateway.test"))


async def test_a_servers_certificate_is_renewed_while_it_serves(authority: Authority, tmp_path: Path) -> None:
    client = tls(authority, "gateway.test")
    certificate, key = authority.issue(OLD)
    async with serving(Tls(certificate, key, authority.file)) as server:
        before = Pods("rollout", [f"{OLD}:{server.port}"], client, lookup=lookup)
        await call_again(before)
        for new, old in zip(authority.issue(NEW), (certificate, key), strict=True):
            new.replace(old)
        await call(server, client, NEW)
        with pytest.raises(Unavailable, match="does not carry the name"):
            await call(server, client, OLD)
        # What was connected stays connected.
        await call_again(before)
        await before.close()


async def test_what_is_renewed_badly_is_logged_once_and_not_used(authority: Authority) -> None:
    client = tls(authority, "gateway.test")
    certificate, key = authority.issue(NAME)
    kept = key.read_bytes()
    async with serving(Tls(certificate, key, authority.file)) as server:
        with structlog.testing.capture_logs() as logs:
            key.write_text("no key")
            await call(server, client)
            key.unlink()
            await call(server, client)
            await call(server, client)
        complaints = [entry["error"] for entry in logs if entry["log_level"] == "error"]
        assert [str(key) in complaint for complaint in complaints] == [True, True]
        assert "can't be read: No such file" in complaints[1]
        key.write_bytes(kept)
        await call(server, client)


async def test_a_client_connects_again_with_its_renewed_certificate(
    authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    """The authority itself is another one after the renewal, so that nothing of before would do."""
    files = [*authority.issue("gateway.test"), authority.file]
    client = Tls(*files)
    async with serving(tls(authority, NAME)) as server:
        pods = Pods("rollout", [f"{NAME}:{server.port}"], client, lookup=lookup)
        (pod,) = await pods.look()
        outdated = open_channel(pod.address, client.current(), server_name=NAME)
        assert await ask(outdated) == health_pb2.HealthCheckResponse.SERVING
        await call_again(pods)
    for new, old in zip((*stranger.issue("gateway.test"), stranger.file), files, strict=True):
        old.write_bytes(new.read_bytes())
    async with serving(tls(stranger, NAME), pod.address):
        await call_again(pods)
        with pytest.raises(Unavailable), typed_errors("rollout"):
            await ask(outdated)
    await outdated.close()
    await pods.close()


async def test_a_call_in_flight_keeps_its_channel(authority: Authority) -> None:
    certificate, key = authority.issue("gateway.test")
    async with serving(tls(authority, NAME)) as server:
        pods = Pods("rollout", [f"{NAME}:{server.port}"], Tls(certificate, key, authority.file), lookup=lookup)
        (pod,) = await pods.look()
        with pod.calling() as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=30)
            await watch.read()
            authority.issue("gateway.test")
            await call_again(pods)
            await server.set_not_serving()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()
        await server.set_serving()
        with pod.calling() as before:
            pass
        await call_again(pods)
        with pod.calling() as after:
            assert after is not before
        await pods.close()


# Files and settings


@pytest.mark.parametrize("which", [0, 1, 2], ids=["certificate", "key", "authority"])
@pytest.mark.parametrize("content", [None, "", "no PEM"], ids=["missing", "empty", "junk"])
def test_a_file_that_cannot_be_used_is_named(authority: Authority, which: int, content: str | None) -> None:
    files = [*authority.issue(NAME), authority.file]
    files[which].unlink()
    if content is not None:
        files[which].write_text(content)
    with pytest.raises(InvalidArgument) as caught:
        Tls(*files)
    assert str(files[which]) in caught.value.message
    assert caught.value.field is not None
    assert caught.value.field.startswith("tls_")


def test_another_certificates_key_is_refused(authority: Authority) -> None:
    certificate, _ = authority.issue(NAME)
    _, key = authority.issue("other.test")
    with pytest.raises(InvalidArgument, match=f"{key} are not a certificate and its key"):
        Tls(certificate, key, authority.file)


def test_settings_have_all_three_files_or_none(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue(NAME)
    assert TeacherSettings(model=tmp_path).tls is None
    with pytest.raises(ValidationError, match="belong together"):
        TeacherSettings(model=tmp_path, tls_certificate_file=certificate, tls_key_file=key)
    settings = TeacherSettings(
        model=tmp_path, tls_certificate_file=certificate, tls_key_file=key, tls_ca_file=authority.file
    )
    assert settings.tls is settings.tls
    assert settings.tls is not None
