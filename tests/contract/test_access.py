"""Who may call what of real servers: every method, by every role, and by those who have no token or another's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from foundry.errors import FoundryError, InvalidArgument, PermissionDenied, Unauthenticated
from foundry.rpc.access import MAY_CALL, Access, Role, token_of
from foundry.rpc.channel import open_channel, typed_errors
from foundry.rpc.server import Server
from foundry.rpc.tokens import make_tokens
from foundry.v1 import rollout_pb2, rollout_pb2_grpc, teacher_pb2, teacher_pb2_grpc
from services.gateway.settings import GatewaySettings
from services.teacher.settings import TeacherSettings
from tests.contract.test_bytes import OURS, send

ROLES: tuple[Role, ...] = get_args(Role)
METHODS = {f"/{service.full_name}/{method.name}": service.name for service in OURS for method in service.methods}
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
ALLOWED = {
    "gateway": {"Generate", "Tokenize", "Detokenize", "Resident", "PutContext"},
    "trainer": {"Generate", "GenerateBatch", "Resident", "PutContext", "Score"},
    "operator": {
        *("Generate", "GenerateBatch", "Tokenize", "Detokenize", "Resident", "Drain"),
        *("PutContext", "Score"),
    },
}
# Reaches a method's message, and is none.
UNREADABLE = b"\x0b"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    make_tokens(tmp_path / "tokens")
    return tmp_path / "tokens"


@asynccontextmanager
async def serving(tokens: Path | None, *, reflect: bool = False) -> AsyncIterator[str]:
    """The address of a server of every service."""
    access = None if tokens is None else Access(tokens / "servers")
    server = Server("127.0.0.1:0", OURS, access=access, reflect=reflect)
    rollout_pb2_grpc.add_RolloutServicer_to_server(rollout_pb2_grpc.RolloutServicer(), server.grpc)
    teacher_pb2_grpc.add_TeacherServicer_to_server(teacher_pb2_grpc.TeacherServicer(), server.grpc)
    await server.start()
    await server.set_serving()
    try:
        yield f"127.0.0.1:{server.port}"
    finally:
        await server.stop(0)


async def outcome(address: str, method: str, authorization: str | None) -> type[FoundryError]:
    """How a call that no method can read ends; InvalidArgument if it came so far."""
    metadata = () if authorization is None else (("authorization", authorization),)
    async with open_channel(address) as channel:
        try:
            await send(channel, method, UNREADABLE, metadata)
        except FoundryError as error:
            return type(error)
    raise AssertionError("unreadable bytes were taken for a message")


def test_the_table_has_every_method() -> None:
    assert MAY_CALL.keys() == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
async def test_a_role_may_call_what_is_its_and_nothing_else(tokens: Path, method: str) -> None:
    async with serving(tokens) as address:
        for role in ROLES:
            expected = InvalidArgument if method.rpartition("/")[2] in ALLOWED[role] else PermissionDenied
            token = token_of(role, tokens / "servers")
            assert await outcome(address, method, f"Bearer {token}") is expected, role


@pytest.mark.parametrize("method", METHODS)
async def test_without_its_token_nobody_calls_anything(tokens: Path, method: str) -> None:
    token = token_of("operator", tokens / "servers")
    async with serving(tokens) as address:
        for given in (None, "", "Bearer ", token, f"Basic {token}", f"Bearer {token}x", f"Bearer {token[:-1]}"):
            assert await outcome(address, method, given) is Unauthenticated, given


async def test_where_no_tokens_are_known_everything_is_open() -> None:
    async with serving(None) as address:
        for method in METHODS:
            assert await outcome(address, method, None) is InvalidArgument


async def test_clients_show_their_token_in_calls_of_every_kind(tokens: Path) -> None:
    async with serving(tokens) as address, open_channel(address, token=token_of("gateway", tokens / "gateway")) as own:
        teacher: Any = teacher_pb2_grpc.TeacherStub(own)
        rollout: Any = rollout_pb2_grpc.RolloutStub(own)
        # The servicers here do nothing; one that is reached fails.
        with pytest.raises(FoundryError, match="not implemented"), typed_errors("rollout"):
            await rollout.Resident(rollout_pb2.ResidentRequest(), timeout=10)
        with pytest.raises(FoundryError, match="not implemented"), typed_errors("rollout"):
            await rollout.Generate(rollout_pb2.GenerateRequest(), timeout=10).read()
        with pytest.raises(PermissionDenied, match=r"role gateway may not call .*: operator may"), typed_errors("it"):
            await rollout.Drain(rollout_pb2.DrainRequest(), timeout=10)
        with pytest.raises(PermissionDenied, match="trainer, operator may"), typed_errors("teacher"):
            await teacher.Score(teacher_pb2.ScoreRequest(), timeout=10).read()


async def test_health_is_open_to_everybody(tokens: Path) -> None:
    async with serving(tokens) as address, open_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert (await stub.Watch(health_pb2.HealthCheckRequest(), timeout=10).read()).status == answer.status


async def listed(address: str, token: str | None) -> list[str]:
    async with open_channel(address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast(Any, channel))
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        with typed_errors("server"):
            call = stub.ServerReflectionInfo(iter([asked]), timeout=10, metadata=metadata)
            answer = await call.read()
    return [service.name for service in answer.list_services_response.service]


async def test_services_are_listed_where_a_setting_says_so(tokens: Path) -> None:
    names = {service.full_name for service in OURS}
    async with serving(None) as address:
        with pytest.raises(FoundryError, match="UNIMPLEMENTED"):
            await listed(address, None)
    async with serving(None, reflect=True) as address:
        assert names <= set(await listed(address, None))
    async with serving(tokens, reflect=True) as address:
        assert names <= set(await listed(address, token_of("operator", tokens / "servers")))
        with pytest.raises(PermissionDenied):
            await listed(address, token_of("trainer", tokens / "servers"))
        with pytest.raises(Unauthenticated):
            await listed(address, None)


@pytest.mark.parametrize(
    ("listen", "services", "known", "warned"),
    [
        ("0.0.0.0:0", OURS, False, True),
        ("[::]:0", OURS, False, True),
        ("127.0.0.1:0", OURS, False, False),
        ("localhost:0", OURS, False, False),
        ("0.0.0.0:0", OURS, True, False),
        # The trainer's, which answers for its health alone.
        ("0.0.0.0:0", [], False, False),
    ],
)
async def test_an_open_server_says_so_at_its_start(
    tokens: Path, listen: str, services: list[ServiceDescriptor], known: bool, warned: bool
) -> None:
    with structlog.testing.capture_logs() as lines:
        server = Server(listen, services, access=Access(tokens / "servers") if known else None)
    await server.stop(0)
    assert [line["log_level"] for line in lines] == ["warning"] * warned


# Files and settings


def test_tokens_are_made_once_for_their_owner_alone(tmp_path: Path) -> None:
    make_tokens(tmp_path)
    made = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert {str(path) for path in made} == {
        *(f"servers/{role}" for role in ROLES),
        "gateway/gateway",
        "trainer/trainer",
    }
    assert len(set(made.values())) == len(ROLES)
    assert {(tmp_path / path).stat().st_mode & 0o777 for path in made} == {0o600}
    (tmp_path / "trainer" / "trainer").unlink()
    make_tokens(tmp_path)
    assert {path: (tmp_path / path).read_text() for path in made} == made


async def test_while_a_token_is_replaced_both_are_taken(tokens: Path) -> None:
    path = tokens / "servers" / "operator"
    old, new = path.read_text(), "n" * 32
    path.write_text(f"{old}\n{new}\n")
    assert token_of("operator", tokens / "servers") == old
    async with serving(tokens) as address:
        for token in (old, new):
            assert await outcome(address, "/foundry.v1.Rollout/Drain", f"Bearer {token}") is InvalidArgument


@pytest.mark.parametrize("content", [None, "", "short", "ä" * 32, f"{'x' * 32} short"])
def test_a_file_that_cannot_be_used_is_named(tokens: Path, content: str | None) -> None:
    path = tokens / "servers" / "trainer"
    path.unlink()
    if content is not None:
        path.write_text(content)
    for use in (lambda: Access(tokens / "servers"), lambda: token_of("trainer", tokens / "servers")):
        with pytest.raises(InvalidArgument, match="rpc_tokens_directory") as caught:
            use()
        assert str(path) in caught.value.message
        assert not content or content not in caught.value.message


def test_two_roles_with_one_token_are_refused(tokens: Path) -> None:
    (tokens / "servers" / "gateway").write_text((tokens / "servers" / "operator").read_text())
    with pytest.raises(InvalidArgument, match="two files"):
        Access(tokens / "servers")


def test_settings_name_the_directory(tokens: Path) -> None:
    assert TeacherSettings(model=tokens).access is None
    assert TeacherSettings(model=tokens).token_of("trainer") is None
    assert TeacherSettings(model=tokens, rpc_tokens_directory=tokens / "servers").access is not None
    store: Any = {"redis_url": "redis://h", "objects_url": "file:///x"}
    gateway = GatewaySettings(store=store, rpc_tokens_directory=tokens / "gateway")
    assert gateway.token_of("gateway") == (tokens / "servers" / "gateway").read_text()
    with pytest.raises(InvalidArgument, match="operator can't be read"):
        gateway.token_of("operator")
