"""Files and batches as OpenAI's client meets them: real gateways before a real rollout server and store."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types import Batch

from foundry.errors import BatchNotFound, Fenced, FileNotKept
from foundry.store import ApiKey, BatchFinal, BatchStore, CartridgeStore, FileStore, Objects, Row
from foundry.store.upkeep.gc_batches import BatchCollector
from services.gateway.batches.lines import read_lines
from tests.contract.gateway_routes.site import ADMIN_KEY, Site
from tests.process import Process
from tests.services import Stack, openai_client, wait_ready, wait_until

CHAT: Any = "/v1/chat/completions"
OVER = {"completed", "failed", "expired", "cancelled"}


def request(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What is open in {custom_id}?"}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0} | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": asked}


def lines(requests: Sequence[Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in requests)


@pytest.fixture(scope="module")
def stack(site: Site) -> Stack:
    site.stack.publish("answering", site.stack.cartridge(seed=1))
    return site.stack


@pytest.fixture(scope="module")
def rollout(site: Site) -> Process:
    return site.rollout


@pytest.fixture(scope="module")
def gateway(stack: Stack, rollout: Process) -> Iterator[Process]:
    gateway = spawn(stack, rollout)
    yield gateway
    gateway.close()


def spawn(stack: Stack, rollout: Process, **batches: Any) -> Process:
    # It begins what is created there, and leaves alone what others create.
    values = {"poll_seconds": 3600, "lease_seconds": 2.0} | batches
    options = [text for name, value in values.items() for text in (f"--batches.{name.replace('_', '-')}", str(value))]
    gateway = stack.gateway([rollout], *options)
    wait_ready(gateway)
    return gateway


@pytest.fixture
def client(gateway: Process) -> Iterator[OpenAI]:
    with openai_client(gateway) as client:
        yield client


def submit(client: OpenAI, requests: Sequence[Any], endpoint: Any = CHAT, **options: Any) -> Batch:
    file = client.files.create(file=("asked.jsonl", lines(requests)), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options)


def finished(client: OpenAI, gateway: Process, batch: Batch) -> Batch:
    wait_until(lambda: client.batches.retrieve(batch.id).status in OVER, gateway)
    return client.batches.retrieve(batch.id)


def entries(client: OpenAI, file_id: str | None) -> dict[str, dict[str, Any]]:
    assert file_id is not None
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    by_id = {entry["custom_id"]: entry for entry in found}
    assert len(by_id) == len(found)
    return by_id


def test_files_are_kept_listed_and_deleted(client: OpenAI) -> None:
    content = lines([request("a")])
    first, second = (client.files.create(file=(f"{name}.jsonl", content), purpose="batch") for name in "ab")
    assert (first.filename, first.bytes, first.purpose, first.status) == ("a.jsonl", len(content), "batch", "processed")
    assert client.files.retrieve(first.id) == first
    assert client.files.content(first.id).content == content
    assert {first.id, second.id} <= {each.id for each in client.files.list()}
    assert len(client.files.list(limit=1).data) == 1
    assert {each.id for each in client.files.list(limit=1)} == {each.id for each in client.files.list()}
    assert client.files.list(purpose="vision").data == []
    assert client.files.delete(first.id).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(first.id)
    assert caught.value.code == "FILE_NOT_FOUND"
    expiring = client.files.create(
        file=io.BytesIO(content), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert expiring.expires_at == expiring.created_at + 3600


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"purpose": "vision"}, "purpose"),
        ({"expires_after": {"anchor": "created_at", "seconds": 1}}, "expires_after.seconds"),
    ],
)
def test_files_that_are_refused(client: OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(**{"file": b"{}", "purpose": "batch", **options})
    assert caught.value.param == param


def test_a_batch_answers_as_the_same_requests_alone(client: OpenAI, gateway: Process) -> None:
    requests = [request(f"r{number}", model=("tiny", "answering")[number % 2]) for number in range(12)]
    wrong = [request("hot", temperature=9), request("streamed", stream=True), request("nobody", model="nobody")]
    batch = submit(client, [*requests, *wrong], metadata={"why": "a test"})
    assert (batch.status, batch.metadata, batch.endpoint) == ("validating", {"why": "a test"}, CHAT)
    assert batch.id in {each.id for each in client.batches.list(limit=1)}
    batch = finished(client, gateway, batch)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert dict(batch.request_counts) == {"total": 15, "completed": 12, "failed": 3}
    assert batch.in_progress_at is not None
    assert batch.finalizing_at is not None
    assert batch.completed_at is not None
    answers = entries(client, batch.output_file_id)
    assert answers.keys() == {each["custom_id"] for each in requests}
    for each in requests[:4]:
        alone = client.chat.completions.create(**each["body"])
        answer = answers[each["custom_id"]]
        assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
        body = answer["response"]["body"]
        assert body["choices"] == json.loads(alone.model_dump_json(exclude_unset=True))["choices"]
        assert body["foundry"]["cartridges"] == (alone.model_extra or {})["foundry"]["cartridges"]
    errors = entries(client, batch.error_file_id)
    params = {name: error["response"]["body"]["error"]["param"] for name, error in errors.items()}
    assert params == {"hot": "temperature", "streamed": "stream", "nobody": "model"}
    assert {error["response"]["status_code"] for error in errors.values()} == {400, 404}
    # It is over: nothing changes it.
    assert client.batches.cancel(batch.id).status == "completed"


def test_a_batch_of_completions(client: OpenAI, gateway: Process) -> None:
    asked = {"model": "tiny", "prompt": "The harbour", "max_tokens": 4, "temperature": 0}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": asked}
    batch = finished(client, gateway, submit(client, [line], endpoint="/v1/completions"))
    (answer,) = entries(client, batch.output_file_id).values()
    assert answer["response"]["body"]["choices"][0]["text"] == client.completions.create(**asked).choices[0].text  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("endpoint", "body", "told"),
    [
        ("/v1/cartridge/chat/completions", {}, {"messages": [{"role": "user", "content": "What is open in a?"}]}),
        ("/v1/cartridge/completions", {"messages": None, "prompt": "The"}, {"prompt": "The"}),
    ],
)
def test_a_batch_of_tokasaurus_requests(
    client: OpenAI, gateway: Process, endpoint: str, body: dict[str, Any], told: dict[str, Any]
) -> None:
    asked = request("a", endpoint, model="todo", cartridges=[{"id": "answering"}], **body)
    asked["body"] = {name: value for name, value in asked["body"].items() if value is not None}
    batch = finished(client, gateway, submit(client, [asked], endpoint))
    assert batch.status == "completed"
    found = entries(client, batch.output_file_id)["a"]["response"]["body"]
    alone = httpx.post(
        f"http://{gateway.address}{endpoint.replace('cartridge/', '')}",
        json={"model": "answering", "max_tokens": 8, "temperature": 0} | told,
        trust_env=False,
        timeout=60,
    ).json()
    assert found["choices"] == alone["choices"]
    assert json.loads(found["system_fingerprint"])["completion_ids"]


def test_what_is_wrong_with_a_file_fails_the_batch(client: OpenAI, gateway: Process) -> None:
    twice, elsewhere = request("a"), request("b", url="/v1/completions")
    batch = finished(client, gateway, submit(client, [twice, twice, elsewhere, {"custom_id": "c"}, [1]]))
    assert batch.status == "failed"
    assert batch.errors is not None
    found = [(error.line, error.code, error.param) for error in batch.errors.data or []]
    assert found == [
        (2, "duplicate_custom_id", "custom_id"),
        (3, "invalid_request", "url"),
        (4, "invalid_request", "method"),
        (5, "invalid_request", None),
    ]
    with pytest.raises(openai.NotFoundError) as caught:
        client.batches.create(input_file_id="file-" + "a" * 24, endpoint=CHAT, completion_window="24h")
    assert caught.value.code == "FILE_NOT_FOUND"
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(input_file_id="file-x", endpoint="/v1/embeddings", completion_window="24h")
    assert refused.value.param == "endpoint"


def test_a_batch_outlives_its_gateway(stack: Stack, rollout: Process) -> None:
    """Answers that were written are not made again; only one gateway works on a batch at a time."""
    requests = [request(f"r{number}", max_tokens=100, ignore_eos=True) for number in range(24)]
    first = spawn(stack, rollout, concurrency=1)
    with openai_client(first) as client:
        batch = submit(client, requests)

        def some_are_written() -> bool:
            counts = client.batches.retrieve(batch.id).request_counts
            return counts is not None and counts.completed >= 2

        wait_until(some_are_written, first)
        written = client.batches.retrieve(batch.id).request_counts
    assert written is not None
    assert written.completed < 24
    second = spawn(stack, rollout, concurrency=2, poll_seconds=0.5)
    first.kill()
    with openai_client(second) as client:
        batch = finished(client, second, batch)
        assert (batch.status, batch.request_counts.completed if batch.request_counts else 0) == ("completed", 24)
        assert entries(client, batch.output_file_id).keys() == {each["custom_id"] for each in requests}
    second.close()


def test_cancelled_batches_keep_what_is_answered(stack: Stack, rollout: Process) -> None:
    gateway = spawn(stack, rollout, concurrency=1)
    with openai_client(gateway) as client:
        batch = submit(client, [request(f"r{number}", max_tokens=100, ignore_eos=True) for number in range(200)])

        def some_are_written() -> bool:
            counts = client.batches.retrieve(batch.id).request_counts
            return counts is not None and counts.completed >= 1

        wait_until(some_are_written, gateway)
        assert client.batches.cancel(batch.id).status == "cancelling"
        batch = finished(client, gateway, batch)
        assert batch.status == "cancelled"
        assert batch.request_counts is not None
        assert 0 < batch.request_counts.completed < 200
        assert len(entries(client, batch.output_file_id)) == batch.request_counts.completed
        assert batch.error_file_id is None
    gateway.close()


def test_what_is_not_answered_in_time_is_an_error(stack: Stack, rollout: Process) -> None:
    gateway = spawn(stack, rollout, concurrency=1, window_seconds=3)
    with openai_client(gateway) as client:
        requests = [request(f"r{number}", max_tokens=100, ignore_eos=True) for number in range(200)]
        batch = finished(client, gateway, submit(client, requests))
        assert batch.status == "expired"
        errors = entries(client, batch.error_file_id)
        assert {error["error"]["code"] for error in errors.values()} == {"batch_expired"}
        assert batch.request_counts is not None
        assert batch.request_counts.completed + len(errors) == 200
    gateway.close()


def test_limits(stack: Stack, rollout: Process) -> None:
    gateway = spawn(stack, rollout, max_files=1, max_file_bytes=1024, max_requests=2)
    with openai_client(gateway) as client:
        for each in client.files.list():
            client.files.delete(each.id)
        with pytest.raises(openai.APIStatusError) as caught:
            client.files.create(file=b"x" * 100_000, purpose="batch")
        assert caught.value.status_code == 413
        assert finished(client, gateway, submit(client, [request(name) for name in "abc"])).status == "failed"
        with pytest.raises(openai.RateLimitError, match="1 files are kept"):
            client.files.create(file=b"{}", purpose="batch")
    gateway.close()


def test_another_tenants_are_not_there(stack: Stack, rollout: Process) -> None:
    path = stack.directory / "admin-key"
    path.write_text(f"{ADMIN_KEY}\n")
    gateway = stack.gateway(
        [rollout],
        "--api-keys",
        "--admin-key-file",
        str(path),
        "--batches.concurrency",
        "1",
        "--api-keys-refresh-seconds",
        "0.5",
    )
    wait_ready(gateway)

    async def make(store: CartridgeStore) -> list[tuple[ApiKey, str]]:
        tenants = ("acme", "other", "third", "third")
        return [await store.api_keys.create(tenant=tenant, scopes=["query"]) for tenant in tenants]

    keys = stack.with_store(make)
    with ExitStack() as opened:
        ours, theirs, gone, colleague = (
            opened.enter_context(OpenAI(base_url=f"http://{gateway.address}/v1", api_key=text, max_retries=0))
            for _, text in keys
        )
        batch = finished(ours, gateway, submit(ours, [request("a"), request("b", model="answering")]))
        # The cartridge is the tenant's without a name.
        assert entries(ours, batch.output_file_id).keys() == {"a"}
        assert entries(ours, batch.error_file_id).keys() == {"b"}
        for call in (
            lambda: theirs.batches.retrieve(batch.id),
            lambda: theirs.batches.cancel(batch.id),
            lambda: theirs.files.retrieve(batch.input_file_id),
            lambda: theirs.files.content(batch.output_file_id or ""),
            lambda: theirs.files.delete(batch.input_file_id),
            lambda: theirs.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
        assert theirs.batches.list().data == []
        assert theirs.files.list().data == []
        # Nobody's requests are answered on with a key that is revoked.
        left = submit(gone, [request(f"r{number}", max_tokens=100, ignore_eos=True) for number in range(200)])
        stack.with_store(lambda store: store.api_keys.revoke(keys[2][0].key_id))
        assert finished(colleague, gateway, left).status == "cancelled"
        assert httpx.get(f"http://{gateway.address}/v1/files", trust_env=False).status_code == 401
    gateway.close()


# The store's own


@pytest.fixture
async def objects(tmp_path: Path) -> Objects:
    return Objects.open(f"file://{tmp_path}", retry_seconds=1)


async def test_a_lease_is_one_gateways(objects: Objects) -> None:
    batches = BatchStore(objects)
    record = await batches.create(client="", endpoint=CHAT, input_file_id="file-x", metadata=None, seconds=60)
    claims = await asyncio.gather(*(batches.claim(record.batch_id, holder, 60) for holder in "abc"))
    assert sorted(claims, key=str) == [1, None, None]
    holder = "abc"[claims.index(1)]
    await batches.extend(record.batch_id, holder, 1, 0)
    again = await asyncio.gather(*(batches.claim(record.batch_id, name, 60) for name in "de"))
    assert sorted(again, key=str) == [2, None]
    with pytest.raises(Fenced):
        await batches.extend(record.batch_id, holder, 1, 60)


async def test_what_two_attempts_answered_counts_once(objects: Objects) -> None:
    batches = BatchStore(objects, tenant="acme")
    record = await batches.create(client="", endpoint=CHAT, input_file_id="file-x", metadata=None, seconds=60)
    assert await batches.open() == [("acme", record.batch_id)]
    await batches.append(record.batch_id, 1, 0, [Row(0, True, "first"), Row(1, False, "error")])
    await batches.append(record.batch_id, 2, 0, [Row(2, True, "third")])
    await batches.append(record.batch_id, 1, 1, [Row(2, True, "late")])
    rows = [row async for piece in batches.rows(record.batch_id) for row in piece]
    assert [(row.line, row.text) for row in rows] == [(0, "first"), (1, "error"), (2, "late")]
    state = await batches.get(record.batch_id)
    assert (state.completed, state.failed, state.final) == (3, 1, None)
    for status in ("completed", "failed"):
        await batches.finish(record.batch_id, BatchFinal.model_validate({"status": status, "at": 1}))
    final = (await batches.get(record.batch_id)).final
    assert final is not None
    assert final.status == "completed"
    assert await batches.open() == []
    with pytest.raises(BatchNotFound):
        await BatchStore(objects).get(record.batch_id)
    with pytest.raises(BatchNotFound):
        await batches.get("../../x")


async def test_gc_takes_files_whose_time_is_over(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    files, batches = FileStore(objects, tenant="acme"), BatchStore(objects)
    short, long = [
        await files.put(b"x" * 10, filename="a", purpose="batch", keep_seconds=seconds) for seconds in (60, 10**7)
    ]
    record = await batches.create(client="", endpoint=CHAT, input_file_id="file-x", metadata=None, seconds=60)
    await batches.finish(record.batch_id, BatchFinal(status="completed", at=1))

    async def collect(after: timedelta, *, dry_run: bool = False) -> list[tuple[str, int]]:
        began = datetime.now(UTC) + after
        collector = BatchCollector(objects, began=began, old=began, dry_run=dry_run)
        files = [each async for each in collector.files()]
        return [(each.kind, each.num_bytes > 0) for each in (*files, *[each async for each in collector.batches()])]

    assert await collect(timedelta(0)) == []
    assert await collect(timedelta(minutes=2), dry_run=True) == [("file", True)]
    assert (await files.info(short.file_id)).num_bytes == 10
    assert await collect(timedelta(minutes=2)) == [("file", True)]
    with pytest.raises(FileNotKept):
        await files.content(short.file_id)
    assert await collect(timedelta(days=31)) == [("batch", True)]
    assert await files.content(long.file_id) == b"x" * 10
    assert await objects.keys("batches") == []
    monkeypatch.setattr(time, "time", lambda: 10**11)
    with pytest.raises(FileNotKept):
        await files.info(long.file_id)


def test_lines_are_checked_before_anything_begins() -> None:
    good = request("a")
    content = b"\n" + lines([good]) + b"  \n" + json.dumps(request("b")).encode()

    def read(content: bytes, max_lines: int = 5) -> tuple[list[str], list[str]]:
        found, errors = read_lines(memoryview(content), endpoint=CHAT, max_lines=max_lines, max_line_bytes=1000)
        return [json.loads(content[line.begin : line.end])["custom_id"] for line in found], [
            f"{error['line']} {error['code']}" for error in errors
        ]

    assert read(content) == (["a", "b"], [])
    assert read(b"\n \n") == ([], ["None empty_file"])
    assert read(content, max_lines=1) == (["a"], ["2 too_many_requests"])
    for line in (b"{", b"\xff", lines([request("x", metadata="y" * 1000)]), lines([good | {"custom_id": "\ud800"}])):
        assert read(line)[1] == ["1 invalid_request"]
