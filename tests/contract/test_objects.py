"""Object storage behind its typed edge: a directory and an S3 server keep the same promises."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from foundry.errors import InvalidArgument, NotFound, StoreRefused, StoreUnavailable
from foundry.identity import Buffer
from foundry.store import Objects, StoreSettings
from foundry.store.credentials import S3Access
from foundry.store.objects.objects import ETag, ObjectInfo
from tests.seaweed import BUCKET, KEY, READER_KEY, READER_SECRET, REGION, SECRET, Seaweed
from tests.tls import Authority, TlsFront

both = pytest.mark.storages("file", "s3")
NUM_WRITERS = 16


def open_objects(storage: dict[str, str | bool], **changed: str) -> Objects:
    settings = StoreSettings.model_validate({"redis_url": "redis://127.0.0.1:1"} | storage | changed)
    return Objects.open(settings.objects_url, retry_seconds=1, s3=S3Access.of(settings))


@pytest.fixture
def objects(storage: dict[str, str | bool]) -> Objects:
    return open_objects(storage)


@both
async def test_parts_are_written_one_after_the_other(objects: Objects) -> None:
    parts: list[Buffer] = [b"head", bytearray(b"body"), memoryview(b"..tail")[2:]]
    await objects.put("a/b.bin", parts)
    assert bytes(await objects.get("a/b.bin")) == b"headbodytail"


@both
async def test_large_objects_come_back_and_replace_what_stood_there(objects: Objects) -> None:
    await objects.put("large", [b"small"])
    parts = [bytes([number]) * 2**20 for number in range(12)]
    await objects.put("large", parts)
    assert bytes(await objects.get("large")) == b"".join(parts)
    assert (await objects.head("large")).size == 12 * 2**20


async def test_a_directory_may_have_any_name(tmp_path: Path) -> None:
    objects = Objects.open(f"file://{tmp_path}/with%20space/objects", retry_seconds=1)
    await objects.put("a/b.bin", [b"content"])
    assert (tmp_path / "with space/objects/a/b.bin").read_bytes() == b"content"


@both
async def test_of_many_that_create_one_wins(objects: Objects) -> None:
    won = await asyncio.gather(*(objects.put_if_absent("key", b"%d" % number) for number in range(NUM_WRITERS)))
    assert sum(won) == 1
    assert bytes(await objects.get("key")) == b"%d" % won.index(True)


@both
async def test_what_is_not_there(objects: Objects) -> None:
    with pytest.raises(NotFound, match="absent"):
        await objects.get("absent")
    with pytest.raises(NotFound):
        await objects.head("absent")
    with pytest.raises(NotFound):
        await objects.get_range("absent", 0, 1)
    with pytest.raises(NotFound):
        await objects.get_range("absent", 0, 0)
    assert not await objects.exists("absent")
    await objects.delete("absent")
    assert await objects.keys("absent") == []
    assert await objects.keys_here("absent") == []


@both
async def test_ranges(objects: Objects) -> None:
    await objects.put("key", [b"0123456789"])
    assert bytes(await objects.get_range("key", 2, 5)) == b"234"
    assert bytes(await objects.get_range("key", 0, 10)) == b"0123456789"
    assert bytes(await objects.get_range("key", 4, 4)) == b""
    for begin, end in ((8, 12), (10, 12), (50, 60), (5, 4), (-1, 2)):
        with pytest.raises(InvalidArgument):
            await objects.get_range("key", begin, end)


@both
async def test_head_says_size_time_and_etag(objects: Objects) -> None:
    await objects.put("key", [b"12345"])
    info = await objects.head("key")
    assert (info.key, info.size) == ("key", 5)
    assert abs(info.last_modified - datetime.now(UTC)) < timedelta(minutes=5)
    assert info.etag == (await objects.head("key")).etag


@both
async def test_listing_is_by_directory(objects: Objects) -> None:
    for key in ("a/2", "a/1", "a/deep/3", "ab/4"):
        await objects.put(key, [b"x"])
    assert await objects.keys("a") == ["a/1", "a/2", "a/deep/3"]
    assert await objects.keys_here("a") == ["a/1", "a/2"]
    assert await objects.keys("") == ["a/1", "a/2", "a/deep/3", "ab/4"]


@both
async def test_scanning_goes_page_by_page(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foundry.store.objects.objects._LIST_PAGE", 3)
    contents = {f"many/{number:02d}": b"x" * number for number in range(10)}
    await asyncio.gather(*(objects.put(key, [content]) for key, content in contents.items()))
    found: dict[str, ObjectInfo] = {}
    async for info in objects.scan("many"):
        assert info.key not in found
        found[info.key] = info
    assert {key: info.size for key, info in found.items()} == {key: len(content) for key, content in contents.items()}
    assert found["many/07"] == await objects.head("many/07")


# Compare-and-set


@both
async def test_only_the_content_that_was_read_is_replaced(objects: Objects) -> None:
    await objects.put("key", [b"one"])
    etag = (await objects.head("key")).etag
    assert await objects.put_if_match("key", b"two", etag)
    assert not await objects.put_if_match("key", b"three", etag)
    assert bytes(await objects.get("key")) == b"two"
    etag = (await objects.head("key")).etag
    await objects.delete("key")
    assert not await objects.put_if_match("key", b"four", etag)
    assert not await objects.exists("key")


async def increment(objects: Objects, times: int) -> None:
    for _ in range(times):
        while True:
            etag = (await objects.head("counter")).etag
            content = await objects.get("counter")
            if await objects.put_if_match("counter", b"%d" % (int(bytes(content)) + 1), etag):
                break


@both
async def test_no_increment_is_lost(objects: Objects, storage: dict[str, str | bool]) -> None:
    await objects.put_if_absent("counter", b"0")
    # Clients of their own, as other services are.
    await asyncio.gather(*(increment(open_objects(storage), 5) for _ in range(NUM_WRITERS)))
    assert bytes(await objects.get("counter")) == b"%d" % (5 * NUM_WRITERS)
    assert await objects.keys("") == ["counter"], "the lock is listed"


_INCREMENT = """
import asyncio, sys
from foundry.store import Objects
from tests.contract.test_objects import increment
asyncio.run(increment(Objects.open(sys.argv[1], retry_seconds=1), 50))
"""


async def test_no_increment_of_other_processes_is_lost(objects: Objects, storage: dict[str, str | bool]) -> None:
    await objects.put_if_absent("counter", b"0")
    command = [sys.executable, "-W", "error", "-c", _INCREMENT, str(storage["objects_url"])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    others = [await asyncio.create_subprocess_exec(*command, env=environment) for _ in range(2)]
    await increment(objects, 50)
    assert [await other.wait() for other in others] == [0, 0]
    assert bytes(await objects.get("counter")) == b"150"


async def test_a_stopped_holder_of_the_lock_is_reported(
    objects: Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foundry.store.objects.directory._LOCK_SECONDS", 0.05)
    await objects.put("key", [b"one"])
    etag = (await objects.head("key")).etag
    with (tmp_path / "objects/.lock").open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StoreUnavailable, match=r"\.lock"):
            await objects.put_if_match("key", b"two", etag)
    assert await objects.put_if_match("key", b"two", etag)


# Refusals


async def test_a_directory_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreUnavailable):
        Objects.open(f"file://{tmp_path}/file/objects", retry_seconds=1)


async def every_call(objects: Objects, *, but: str = "") -> list[StoreRefused]:
    """What each kind of call raises."""
    calls = {
        "put": lambda: objects.put("key", [b"x"]),
        "put a large one": lambda: objects.put("key", [b"x" * 6 * 2**20]),
        "put_if_absent": lambda: objects.put_if_absent("new", b"x"),
        "put_if_match": lambda: objects.put_if_match("key", b"x", ETag('"0"')),
        "get": lambda: objects.get("key"),
        "get_range": lambda: objects.get_range("key", 0, 1),
        "keys": lambda: objects.keys("a"),
        "keys_here": lambda: objects.keys_here("a"),
        "check": objects.check,
        "delete": lambda: objects.delete("key"),
    }
    refusals = []
    for name, call in calls.items():
        if name == but:
            continue
        try:
            await call()
        except StoreRefused as error:
            refusals.append(error)
        else:
            pytest.fail(f"{name} was allowed")
    return refusals


async def test_wrong_credentials_are_refused_at_once(seaweed: Seaweed) -> None:
    storage = seaweed.settings("refused")
    await open_objects(storage).put("key", [b"x"])
    for key, secret in ((KEY, "planted-secret"), ("nobody", SECRET)):
        stranger = open_objects(storage, objects_access_key_id=key, objects_secret_access_key=secret)
        async with asyncio.timeout(5):
            refusals = await every_call(stranger)
        for refusal in refusals:
            assert f"s3://{BUCKET}/refused" in refusal.message
            assert "credentials" in refusal.message
            assert "planted-secret" not in repr(refusal)
            assert "<Error>" not in refusal.message


async def test_who_may_only_read_is_refused_the_rest(seaweed: Seaweed) -> None:
    storage = seaweed.settings("readable")
    await open_objects(storage).put("key", [b"x"])
    reader = open_objects(storage, objects_access_key_id=READER_KEY, objects_secret_access_key=READER_SECRET)
    assert bytes(await reader.get("key")) == b"x"
    assert await reader.keys("") == ["key"]
    etag = (await reader.head("key")).etag
    with pytest.raises(StoreRefused):
        await reader.put("key", [b"y"])
    with pytest.raises(StoreRefused):
        await reader.put_if_absent("new", b"y")
    with pytest.raises(StoreRefused):
        await reader.put_if_match("key", b"y", etag)
    with pytest.raises(StoreRefused):
        await reader.delete("key")
    assert bytes(await reader.get("key")) == b"x"


async def test_a_missing_bucket_is_named(seaweed: Seaweed) -> None:
    lost = open_objects(seaweed.settings("x") | {"objects_url": "s3://no-such-bucket/x"})
    # Which of the two a server finds missing first is its own choice: the bucket, or the content that must stand there.
    for refusal in await every_call(lost, but="put_if_match"):
        assert "no-such-bucket" in refusal.message
        assert "no such bucket" in refusal.message


async def test_the_usual_variables_work(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": seaweed.endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": REGION,
    }.items():
        monkeypatch.setenv(name, value)
    objects = open_objects({"objects_url": f"s3://{BUCKET}/by-environment"})
    assert await objects.put_if_absent("key", b"x")
    assert await objects.keys("") == ["key"]
    # A key of the settings is not mixed with a token of the environment.
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of another key")
    assert await open_objects(seaweed.settings("by-environment")).keys("") == ["key"]


async def test_an_authority_of_our_own_may_sign_for_the_server(seaweed: Seaweed, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    front = TlsFront(authority, int(seaweed.endpoint.rpartition(":")[2]))
    await front.start()
    tls = seaweed.settings("tls") | {
        "objects_endpoint": f"https://127.0.0.1:{front.port}",
        "objects_allow_http": False,
    }
    trusting = open_objects(tls, objects_ca_file=str(authority.file))
    assert await trusting.put_if_absent("key", b"x")
    with pytest.raises(StoreUnavailable):
        await open_objects(tls).get("key")
    with pytest.raises(InvalidArgument, match="objects_ca_file"):
        open_objects(tls, objects_ca_file="/no/ca.pem")
    await front.close()


async def test_a_storage_that_does_not_answer_is_unavailable() -> None:
    remote = open_objects(
        {
            "objects_url": "s3://bucket/prefix",
            "objects_endpoint": "http://127.0.0.1:9",
            "objects_access_key_id": "key",
            "objects_secret_access_key": "planted-secret",
            "objects_allow_http": True,
        }
    )
    async with asyncio.timeout(20):
        with pytest.raises(StoreUnavailable) as caught:
            await remote.get("key")
    assert not isinstance(caught.value, StoreRefused)
    assert "planted-secret" not in repr(caught.value)


# Root may write anywhere; in a user namespace without a mapping it is its own files' owner and nothing more.
_UNPRIVILEGED = ("unshare", "--user") if os.geteuid() == 0 else ()


@pytest.mark.skipif(
    bool(_UNPRIVILEGED) and subprocess.run([*_UNPRIVILEGED, "true"], capture_output=True).returncode != 0,
    reason="needs a user namespace in which root is nobody special",
)
def test_a_directory_that_we_may_not_write_is_refused(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys\n"
        "from foundry.errors import StoreRefused\n"
        "from foundry.store import Objects\n"
        "try:\n"
        "    asyncio.run(Objects.open(sys.argv[1], retry_seconds=1).put('key', [b'x']))\n"
        "except StoreRefused as error:\n"
        "    print(error)\n"
    )
    directory = tmp_path / "objects"
    directory.mkdir(mode=0o555)
    done = subprocess.run(
        [*_UNPRIVILEGED, sys.executable, "-c", script, f"file://{directory}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"file://{directory} refused key" in done.stdout


@pytest.mark.parametrize(
    ("url", "variables"),
    [
        ("gs://bucket/prefix", {"GOOGLE_APPLICATION_CREDENTIALS": "/no/such/file.json"}),
        ("az://container/prefix", {}),
        (
            "az://container/prefix",
            {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": "planted, not base64"},
        ),
        ("s3:///prefix", {}),
    ],
)
def test_what_cannot_be_opened_is_named(url: str, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgument) as caught:
        Objects.open(url, retry_seconds=1)
    assert url in caught.value.message
    assert "planted" not in repr(caught.value)


@pytest.mark.parametrize(
    ("answer", "refused"),
    [(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", True), (b"", False)],
    ids=["the machine has none", "it does not say"],
)
async def test_without_any_credentials_the_machine_is_asked(
    answer: bytes, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    # As the real one: a path below it is in every message.
    metadata = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/169.254.169.254"
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", metadata)
    objects = Objects.open("s3://bucket/prefix", retry_seconds=0.1)
    with pytest.raises(StoreUnavailable, match="no credentials were given") as caught:
        await objects.get("key")
    assert isinstance(caught.value, StoreRefused) is refused
    server.close()
    await server.wait_closed()


async def _calls(objects: Objects) -> list[str]:
    """The calls that don't end with an error that says so."""
    calls: dict[str, Callable[[], Awaitable[object]]] = {
        "put": lambda: objects.put("key", [b"x"]),
        "put_if_absent": lambda: objects.put_if_absent("key", b"x"),
        "put_if_match": lambda: objects.put_if_match("key", b"x", ETag("1")),
        "delete": lambda: objects.delete("key"),
        "get": lambda: objects.get("key"),
        "get_range": lambda: objects.get_range("key", 0, 1),
        "head": lambda: objects.head("key"),
        "keys": lambda: objects.keys("a"),
        "keys_here": lambda: objects.keys_here("a"),
    }
    found = []
    for name, call in calls.items():
        try:
            async with asyncio.timeout(20):
                await call()
        except StoreUnavailable as error:
            if "has not answered for" in error.message:
                continue
        found.append(name)
    return found


async def test_a_server_that_never_answers_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        access = {
            "objects_endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "objects_access_key_id": "key",
            "objects_secret_access_key": "secret",
        }
        settings = StoreSettings.model_validate(
            {"redis_url": "redis://127.0.0.1:1", "objects_url": "s3://bucket", "objects_allow_http": True} | access
        )
        objects = Objects.open(settings.objects_url, retry_seconds=1, timeout_seconds=0.1, s3=S3Access.of(settings))
        assert await _calls(objects) == []


async def test_a_file_that_never_opens_is_unavailable(tmp_path: Path) -> None:
    objects = Objects.open(tmp_path.as_uri(), retry_seconds=1, timeout_seconds=0.1)
    # Whoever opens it waits for a writer.
    os.mkfifo(tmp_path / "key")
    try:
        for read in (objects.get("key"), objects.get_range("key", 0, 1)):
            async with asyncio.timeout(20):
                with pytest.raises(StoreUnavailable, match="has not answered for"):
                    await read
    finally:
        os.close(os.open(tmp_path / "key", os.O_RDWR | os.O_NONBLOCK))
