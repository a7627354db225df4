"""Promote, roll back and look at where a version comes from: the gateway's routes, the SDK and the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from foundry.cli.main import app
from foundry.client import FoundryClient
from foundry.errors import CartridgeNotFound, Conflict, InvalidArgument
from foundry.store import CartridgeStore
from tests.process import Process
from tests.services import Stack, open_stack, wait_ready
from tests.store_data import cartridge, draft


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with open_stack(tmp_path_factory.mktemp("promote")) as opened:
        yield opened


@pytest.fixture(scope="module")
def gateway(stack: Stack) -> Process:
    process = stack.spawn("gateway", "--rollout-addresses", "127.0.0.1:1")
    wait_ready(process, "/healthz")
    return process


@pytest.fixture
def client(gateway: Process) -> Iterator[FoundryClient]:
    with FoundryClient(f"http://{gateway.address}") as opened:
        yield opened


def make(stack: Stack, name: str) -> None:
    """Four versions of `name`, each trained from the one before; 1, 2 and 4 are durable."""

    async def work(store: CartridgeStore) -> None:
        await store.acquire(name, "run-a", 1)
        for step in range(4):
            parent = cartridge(step - 1).digest() if step else None
            values: dict[str, Any] = {
                "parent": parent,
                "objective": "forward_kl",
                "tokens_seen": 100 * step,
                "metrics": {"kl": 0.5},
            }
            await store.publish(cartridge(step), draft(name, step=step, **values), durable=step != 2)
        await store.release(name, "run-a", 1)

    stack.with_store(work)


@pytest.fixture
def command(gateway: Process, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("FOUNDRY_GATEWAY", f"http://{gateway.address}")
    return CliRunner()


def run(command: CliRunner, *arguments: str) -> Result:
    return command.invoke(app, ["cartridges", *arguments])


def test_a_tag_is_promoted_and_rolled_back_over_http(stack: Stack, client: FoundryClient) -> None:
    make(stack, "acme/http")
    assert client.cartridges.tag("acme/http", "prod", 1)["previous"] is None
    assert client.cartridges.tag("acme/http", "prod", 4)["previous"] == 1
    history = client.cartridges.tag_history("acme/http", "prod")
    assert (history["version"], history["history"]) == (4, [1])
    moved = client.cartridges.rollback_tag("acme/http", "prod")
    assert (moved["version"], moved["previous"]) == (1, 4)
    assert client.cartridges.get("acme/http@prod")["version"]["version"] == 1
    with pytest.raises(Conflict):
        client.cartridges.rollback_tag("acme/http", "prod")
    with pytest.raises(CartridgeNotFound):
        client.cartridges.rollback_tag("acme/http", "good")
    with pytest.raises(CartridgeNotFound):
        client.cartridges.tag_history("acme/http", "good")


def test_latest_is_rolled_back_over_http(stack: Stack, client: FoundryClient) -> None:
    make(stack, "latest")
    new = client.cartridges.rollback("latest", "2")
    assert (new["version"], new["init"], new["digest"]) == (5, "rollback of latest@2", cartridge(1).digest())
    assert client.cartridges.get("latest")["version"]["version"] == 5
    assert client.cartridges.rollback("latest", "latest@1")["version"] == 6
    for wrong in ("no such tag!", "other@1", ""):
        with pytest.raises(InvalidArgument) as caught:
            client.cartridges.rollback("latest", wrong)
        assert caught.value.field == "to"
    with pytest.raises(CartridgeNotFound):
        client.cartridges.rollback("latest", "17")
    stack.with_store(lambda store: store.acquire("latest", "run-b", 1))
    with pytest.raises(Conflict, match="run-b"):
        client.cartridges.rollback("latest", "2")


def test_a_version_says_where_it_comes_from(stack: Stack, client: FoundryClient) -> None:
    make(stack, "lineage")
    found = client.cartridges.get("lineage")
    assert [ancestor["version"] for ancestor in found["lineage"]] == [3, 2, 1]
    assert (found["durable"], found["hot"]) == (True, True)
    assert client.cartridges.get("lineage@3")["durable"] is False
    # Version 3 was only hot.
    stack.with_store(lambda store: store._connection.redis.flushall())
    assert client.cartridges.get("lineage")["lineage"] == [{"version": None, "digest": cartridge(2).digest()}]
    assert client.cartridges.get("lineage")["hot"] is False


def test_the_command_line(stack: Stack, command: CliRunner) -> None:
    make(stack, "handbook")
    assert run(command, "promote", "handbook@1", "prod").stdout == "handbook@prod: nothing -> 1\n"
    assert run(command, "promote", "handbook@latest", "prod").stdout == "handbook@prod: 1 -> 4\n"
    assert run(command, "rollback", "handbook", "prod").stdout == "handbook@prod: 4 -> 1\n"
    refused = run(command, "rollback", "handbook", "prod")
    assert refused.exit_code == 4
    assert refused.stderr.startswith("error: handbook@prod can't go back")
    assert run(command, "rollback", "handbook", "--to", "2").stdout == (
        "handbook@latest: 4 -> 5 (rollback of handbook@2)\n"
    )
    shown = run(command, "show", "handbook@prod").stdout
    assert "handbook@1" in shown.splitlines()[0]
    shown = run(command, "show", "handbook").stdout
    for line in (
        "parents            4 <- 3 <- 2 <- 1",
        "init               rollback of handbook@2",
        "tags               prod=1",
    ):
        assert f"  {line}\n" in shown
    for label in ("run", "objective", "tokens_seen", "step", "metrics", "kept"):
        assert f"  {label:18} " in shown
    assert json.loads(run(command, "show", "handbook", "--json").stdout)["lineage"][0]["version"] == 4


def test_the_command_line_wants_a_tag_or_a_version(command: CliRunner) -> None:
    for arguments in ([], ["prod", "--to", "2"]):
        refused = run(command, "rollback", "handbook", *arguments)
        assert refused.exit_code == 2
        assert "--to VERSION" in refused.stderr
