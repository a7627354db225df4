"""The whole stack with mutual TLS and tokens: a run, a chat, and a certificate that is renewed meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from foundry.rpc.tls import Tls
from foundry.rpc.tokens import make_tokens
from foundry.store import CartridgeStore
from foundry.store.spec import TEMPLATE_TOKENS
from tests.e2e.training import DOCUMENT, STEPS, create_run, step_events
from tests.process import Process
from tests.services import Stack, get, openai_client, wait_ready, wait_serving, wait_until
from tests.tls import Authority

SERVICES = ("rollout", "teacher", "trainer", "gateway")
# Under which each service is configured with the others, hence what its certificate names.
NAME = "localhost"

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def files(authority: Authority) -> tuple[Path, Path, Path]:
    return (*authority.issue(NAME), authority.file)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokens")
    make_tokens(directory)
    return directory


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, files: tuple[Path, Path, Path], tokens: Path) -> Iterator[Stack]:
    names = ("FOUNDRY_TLS_CERTIFICATE_FILE", "FOUNDRY_TLS_KEY_FILE", "FOUNDRY_TLS_CA_FILE")
    environment = dict(zip(names, map(str, files), strict=True))
    environment["FOUNDRY_RPC_TOKENS_DIRECTORY"] = str(tokens / "servers")
    stack = Stack(tmp_path_factory.mktemp("stack"), environment=environment)
    asyncio.run(stack.valkey.start())
    yield stack
    stack.close()


def by_name(process: Process) -> str:
    return process.address.replace("127.0.0.1", NAME)


def own_token(tokens: Path, role: str) -> tuple[str, str]:
    return "--rpc-tokens-directory", str(tokens / role)


def test_everything_works_with_mutual_tls_and_tokens(
    stack: Stack, authority: Authority, files: tuple[Path, Path, Path], tokens: Path
) -> None:
    rollout = stack.rollout()
    teacher = stack.spawn("teacher", "--model", str(stack.model))
    addresses = ("--rollout-addresses", by_name(rollout), "--teacher-address", by_name(teacher))
    trainer = stack.spawn("trainer", "--model", str(stack.model), *addresses, *own_token(tokens, "trainer"))
    gateway = stack.gateway([rollout], "--teacher-address", by_name(teacher), *own_token(tokens, "gateway"))
    credentials = Tls(*files).current()
    for process in (rollout, teacher, trainer):
        wait_serving(process, credentials, server_name=NAME)
    wait_ready(gateway)

    async def run(store: CartridgeStore) -> list[dict[str, Any]]:
        run_id = await create_run(store, "sealed")
        return [event async for event in step_events(store, run_id)]

    assert [event["step"] for event in stack.with_store(run)] == list(range(1, STEPS + 1))

    def chat() -> str:
        with openai_client(gateway) as client:
            messages: Any = [{"role": "user", "content": "What is open?"}]
            answer = client.chat.completions.create(model="sealed", messages=messages, max_tokens=4, temperature=0)
        return answer.choices[0].message.content or ""

    first = chat()
    # The gateway measures a run's document at the teacher.
    # The most for which only the teacher knows that it is too much.
    num_tokens = len(DOCUMENT.encode()) + TEMPLATE_TOKENS
    prompts = {"kind": "selfstudy", "num_prompts": 4}
    asked = {"name": "too-long", "text": DOCUMENT, "num_tokens": num_tokens, "num_steps": 1, "prompts": prompts}
    refused = httpx.post(f"http://{gateway.address}/v1/runs", json=asked, trust_env=False)
    assert refused.status_code == 400
    assert "the document has only" in refused.json()["error"]["message"]

    # Renewed in place, and everybody connects again: servers are new processes, clients are not.
    authority.issue(NAME)
    rollout.kill()
    rollout.start()
    wait_serving(rollout, credentials, server_name=NAME)
    wait_ready(gateway)
    assert chat() == first


def test_a_gateway_with_a_strangers_certificate_says_why_nobody_answers(stack: Stack, tmp_path: Path) -> None:
    rollout = stack.rollout()
    certificate, key = Authority(tmp_path / "stranger").issue(NAME)
    gateway = stack.gateway([rollout], "--tls-certificate-file", str(certificate), "--tls-key-file", str(key))
    wait_ready(gateway, "/healthz")
    wait_until(lambda: "certificate of its authority" in get(gateway, "/readyz").text, gateway)
    assert get(gateway, "/readyz").status_code == 503


def test_a_gateway_with_a_strangers_token_says_why_nobody_answers(stack: Stack, tmp_path: Path) -> None:
    make_tokens(tmp_path)
    gateway = stack.gateway([stack.rollout()], *own_token(tmp_path, "gateway"))
    wait_ready(gateway, "/healthz")
    wait_until(lambda: "token is none of this server's" in get(gateway, "/readyz").text, gateway)
    assert get(gateway, "/readyz").status_code == 503
