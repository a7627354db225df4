"""The audit log of a gateway: what is noted, what is not, and never a secret."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from foundry.errors import InvalidArgument
from foundry.identity import content_digest
from foundry.store.api_keys import Scope
from services.gateway.access.audit import AuditLog
from tests.contract.gateway_routes.site import Guarded, Site, specification
from tests.services import metric, wait_ready, wait_until

Line = dict[str, Any]
DOCUMENT = "The keeper of the book notes who came. " * 8
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "What is secret here?"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def file(site: Site) -> Path:
    return site.stack.directory / "audit.jsonl"


@pytest.fixture(scope="module")
def guarded(site: Site, file: Path) -> Iterator[Guarded]:
    gateway = site.stack.gateway([site.rollout], "--api-keys", "--audit-log-file", str(file))
    wait_ready(gateway)
    yield Guarded(site.stack, gateway)
    gateway.stop()


@pytest.fixture
def noted(guarded: Guarded, file: Path) -> Callable[..., list[Line]]:
    """What a request adds to the file, the request that ends it apart."""

    def ask(method: str, path: str, key: str | None, **arguments: Any) -> list[Line]:
        before = len(file.read_text().splitlines())
        guarded.http(method, path, key, **arguments)
        # Lines come in order: when this one is there, so are those before it.
        end = guarded.http("DELETE", "/v1/cartridges/end", None).headers["x-request-id"]
        wait_until(lambda: end in file.read_text(), guarded.gateway)
        lines = [json.loads(line) for line in file.read_text().splitlines()[before:]]
        assert lines.pop()["request_id"] == end
        return lines

    return ask


def test_changes_are_noted_with_who_what_and_whence(guarded: Guarded, noted: Callable[..., list[Line]]) -> None:
    key, text = guarded.key(*get_args(Scope), tenant="watched")
    guarded.stack.publish("watched/audited", guarded.stack.cartridge(4))
    (line,) = noted(
        "PUT", "/v1/cartridges/audited/tags/prod", text, json={"version": 1}, headers={"x-request-id": "mine"}
    )
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "client": key.key_id,
        "tenant": "watched",
        "method": "PUT",
        "route": "/v1/cartridges/{name:path}/tags/{tag}",
        "object": {"name": "audited", "tag": "prod"},
        "made": {},
        "status": 200,
        "request_id": "mine",
        "address": "127.0.0.1",
    }
    # In the gateway's own log too, by the logger's name.
    logged = [json.loads(line) for line in guarded.gateway.log.read_text().splitlines()]
    (own,) = [line for line in logged if line["logger"] == "foundry.audit" and line["request_id"] == "mine"]
    assert line.items() <= own.items()


def test_what_is_made_is_named(guarded: Guarded, noted: Callable[..., list[Line]]) -> None:
    _, text = guarded.key(*get_args(Scope), tenant="watched")
    (line,) = noted("POST", "/v1/documents", text, json={"text": DOCUMENT})
    digest = content_digest(DOCUMENT.encode())
    assert (line["status"], line["made"]) == (201, {"document": digest})
    (line,) = noted("POST", "/v1/runs", text, json=specification(text=DOCUMENT))
    assert line["made"]["document"] == digest
    run_id = line["made"]["run_id"]
    (line,) = noted("POST", f"/v1/runs/{run_id}/cancel", text)
    assert (line["object"], line["status"]) == ({"run_id": run_id}, 200)
    (line,) = noted("POST", "/v1/runs/absent/cancel", text)
    assert (line["object"], line["status"]) == ({"run_id": "absent"}, 404)


def test_refusals_are_noted_and_reading_is_not(guarded: Guarded, noted: Callable[..., list[Line]]) -> None:
    key, query = guarded.key("query", tenant="watched")
    for method, path, shown, status in (
        ("GET", "/v1/models", None, 401),
        ("GET", "/v1/runs", query, 403),
        ("POST", "/v1/chat/completions", None, 401),
        ("DELETE", "/v1/cartridges/x", query, 403),
    ):
        (line,) = noted(method, path, shown)
        assert (line["status"], line["client"]) == (status, key.key_id if shown else "")
    (line,) = noted("GET", "/v1/models", None, headers={"host": "evil.example"})
    assert (line["status"], line["route"], line["object"]) == (403, "unmatched", {})
    for method, path, arguments in (
        ("GET", "/v1/models", {}),
        ("GET", "/v1/cartridges/absent", {}),
        ("GET", "/healthz", {}),
        ("POST", "/ping", {}),
        ("HEAD", "/v1/models", {}),
        ("POST", "/v1/nowhere", {}),
        ("POST", "/v1/chat/completions", {"json": CHAT}),
    ):
        assert noted(method, path, query, **arguments) == []


def test_completions_are_noted_if_that_is_asked_for(site: Site) -> None:
    gateway = site.stack.gateway([site.rollout], "--audit-completions")
    wait_ready(gateway)
    for stream in (False, True):
        answer = Guarded(site.stack, gateway).http("POST", "/v1/chat/completions", None, json=CHAT | {"stream": stream})
        assert answer.status_code == 200
    gateway.stop()
    lines = [json.loads(line) for line in gateway.log.read_text().splitlines()]
    noted = [line for line in lines if line["logger"] == "foundry.audit"]
    assert [(line["route"], line["status"], line["tenant"]) for line in noted] == [
        ("/v1/chat/completions", 200, None)
    ] * 2
    assert "What is secret here?" not in gateway.log.read_text()


def test_no_line_holds_a_secret(guarded: Guarded, file: Path, noted: Callable[..., list[Line]]) -> None:
    _, text = guarded.key(*get_args(Scope), tenant="watched")
    for name in (text, "a" * 201, "%0A{}"):
        (line,) = noted("POST", f"/v1/runs/{name}/cancel", None)
        assert line["object"] == {"run_id": "invalid"}
    asked = {"content": f"{text} is the key", "headers": {"content-type": "text/plain"}}
    (line,) = noted("POST", f"/v1/documents?title={text}", text, **asked)
    assert line["status"] == 201
    for log in (file, guarded.gateway.log):
        assert text.split("_", 2)[2] not in log.read_text()
        assert "is the key" not in log.read_text()


def test_a_file_that_is_moved_away_is_begun_anew(
    guarded: Guarded, file: Path, noted: Callable[..., list[Line]]
) -> None:
    file.rename(file.with_suffix(".1"))
    file.touch()
    assert len(noted("DELETE", "/v1/cartridges/x", None)) == 1


def test_a_full_disk_stops_no_request_and_is_counted(site: Site) -> None:
    gateway = site.stack.gateway([site.rollout], "--audit-log-file", "/dev/full")
    wait_ready(gateway)
    guarded = Guarded(site.stack, gateway)
    assert guarded.http("POST", "/v1/documents", None, json={"text": DOCUMENT}).status_code == 201
    wait_until(lambda: metric(gateway.metrics, "foundry_gateway_audit_lines_lost_total") == 1, gateway)
    gateway.stop()
    log = gateway.log.read_text()
    assert "audit_log_file does not take them" in log
    assert "foundry.audit" in log


def test_lines_of_a_gateway_that_ends_are_written(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    gateway = site.stack.gateway([site.rollout], "--audit-log-file", str(file))
    wait_ready(gateway)
    for number in range(20):
        Guarded(site.stack, gateway).http("DELETE", f"/v1/cartridges/x{number}", None)
    gateway.stop()
    names = [json.loads(line)["object"]["name"] for line in file.read_text().splitlines()]
    assert names == [f"x{number}" for number in range(20)]


def test_a_file_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="audit_log_file can't be written"):
        AuditLog(tmp_path / "absent" / "audit.jsonl")


_TORN = """
import resource, sys
from pathlib import Path
from services.gateway.access.audit import AuditLog

audit = AuditLog(Path(sys.argv[1]))
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for number, limit in enumerate((5, hard)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    audit.add({"number": number})
    audit.flush()
"""


def test_a_line_after_a_torn_one_stands_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    # The limit on files is the whole process's.
    subprocess.run([sys.executable, "-c", _TORN, str(file)], check=True, capture_output=True, timeout=60)
    torn, whole = file.read_text().splitlines()
    assert (len(torn), json.loads(whole)["number"]) == (5, 1)
