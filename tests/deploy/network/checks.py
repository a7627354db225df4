"""What a release is for, each as a check that fails in its own way when a flow is missing.

A check gets the release and the seconds in which it must hold, and raises Unmet, saying what it saw last.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from foundry.identity import content_digest
from tests.deploy.chart import SERVICES
from tests.deploy.network.flows import Flow
from tests.deploy.network.hub import MODEL
from tests.deploy.network.release import Release

Check = Callable[[Release, float], None]

DOCUMENT = "The harbour is open again. The treaty was signed in the spring. The price of grain is twelve. "
_PROMPTS = '{"prompt": "What is open?"}\n{"prompt": "Who signed?"}'


@dataclass(frozen=True)
class Need:
    """What fails without a flow."""

    check: Check
    # The service that must have come up without it: one that runs remembers the addresses it has looked up.
    of_new: str | None = None
    # The service that must be away, since it would get ahead of what is looked at.
    away: str | None = None

    def prepare(self, release: Release) -> None:
        if self.of_new is not None:
            release.restart(self.of_new)
        if self.away is not None:
            release.stop(self.away)


class Unmet(Exception):
    pass


def chat(release: Release, seconds: float) -> None:
    """A client has an answer of the model."""
    _eventually(lambda: _chat(release, MODEL), seconds)


def pull(kind: str, release: Release, seconds: float) -> None:
    """A client has an answer behind a cartridge that no rollout server has yet."""
    name = release.fresh_cartridge(kind)
    _eventually(lambda: _chat(release, name), seconds)


def cartridges(release: Release, seconds: float) -> None:
    """The gateway knows what was published."""
    _eventually(lambda: _ok(release.ask("clients", "GET", "gateway", "/v1/cartridges/hot-0")), seconds)


def upload(release: Release, seconds: float) -> None:
    """The gateway keeps a document."""
    _eventually(lambda: _upload(release, DOCUMENT), seconds)


def measure(release: Release, seconds: float) -> None:
    """A run whose cartridge would be longer than its document is refused when it is made."""

    def attempt() -> None:
        answer = release.ask("clients", "POST", "gateway", "/v1/runs", _run_of(release, num_tokens=300))
        if answer.status_code == 201:
            _cancel(release, answer.json()["id"])
        _expect(answer.status_code == 400 and "only" in answer.text, answer.text)

    _eventually(attempt, seconds)


def job(release: Release, seconds: float) -> None:
    """A run becomes a Job in the cluster."""
    deadline = time.monotonic() + seconds
    run_id = _create_run(release, seconds)
    try:
        _eventually(lambda: _expect(run_id in str(release.kube_api.jobs), "no Job of it"), _left(deadline))
    finally:
        _cancel(release, run_id)


def train(release: Release, seconds: float, by: Callable[[str], AbstractContextManager[None]] | None = None) -> None:
    """A run that a client makes is trained to its end, in object storage too: by the worker, or by pods of its own."""
    deadline = time.monotonic() + seconds
    run_id = _create_run(release, seconds)
    try:
        with by(run_id) if by else nullcontext():
            _until_succeeded(release, run_id, deadline)
    finally:
        _cancel(release, run_id)


def train_together(release: Release, seconds: float) -> None:
    """A run of two pods is trained to its end."""
    train(release, seconds, release.trained_by_two)


def scrape(target: str, release: Release, seconds: float) -> None:
    """Prometheus reads the service's metrics."""

    def attempt() -> None:
        answer = release.ask("prometheus", "GET", target, "/metrics", port=9090)
        _expect("process_cpu_seconds_total" in answer.text, answer.text)

    _eventually(attempt, seconds)


def trace(service: str, work: Check, release: Release, seconds: float) -> None:
    """The collector gets spans of the service when there is work for it."""
    deadline = time.monotonic() + seconds
    known = len(release.collector.spans)
    work(release, seconds)

    def attempt() -> None:
        found = {span.service for span in release.collector.spans[known:]}
        _expect(service in found, f"spans of {found}")

    _eventually(attempt, _left(deadline))


def fetch_model(release: Release, seconds: float) -> None:
    """The chart's Job fetches a model from the hub."""

    def attempt() -> None:
        folder = release.fresh_directory()
        caches = {"HF_HOME": f"{folder}-home", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
        _run_pod(release, "model", caches, {1: str(folder)})
        _expect((folder / "config.json").is_file(), "no model in the folder")

    _eventually(attempt, seconds)


def helm_test(release: Release, seconds: float) -> None:
    """The pod of `helm test` finds the gateway by its name."""
    _eventually(lambda: _run_pod(release, "test", {}, {4: str(release.key_file)}), seconds)


_TRAINED = Need(train)
_NEEDS: dict[str, dict[str, Need]] = {
    "clients": {"gateway": Need(chat)},
    "test": {"gateway": Need(helm_test), "dns": Need(helm_test)},
    "gateway": {
        "rollout": Need(chat),
        "teacher": Need(measure),
        "redis": Need(cartridges),
        "objects": Need(upload),
        "kube-api": Need(job, away="trainer"),
        "otlp": Need(partial(trace, "gateway", chat)),
        "dns": Need(chat, of_new="gateway"),
    },
    "rollout": {
        "redis": Need(partial(pull, "hot")),
        "objects": Need(partial(pull, "durable")),
        "otlp": Need(partial(trace, "rollout", chat)),
        "dns": Need(partial(pull, "hot"), of_new="rollout"),
    },
    "teacher": {
        "otlp": Need(partial(trace, "teacher", train)),
        "dns": Need(partial(trace, "teacher", train), of_new="teacher"),
    },
    "trainer": {
        "rollout": _TRAINED,
        "teacher": _TRAINED,
        "redis": _TRAINED,
        "objects": _TRAINED,
        "otlp": Need(partial(trace, "trainer", train)),
        "trainer": Need(train_together, away="trainer"),
        "dns": Need(train, of_new="trainer"),
    },
    "model": {"hub": Need(fetch_model), "dns": Need(fetch_model)},
    "prometheus": {name: Need(partial(scrape, name)) for name in SERVICES},
}


def need_of(flow: Flow) -> Need:
    """Raises KeyError if nothing is known that needs it: then the flow goes, or its check is to be written."""
    return _NEEDS[flow["from"]][flow["to"]]


def _eventually(attempt: Callable[[], object], seconds: float) -> None:
    """Once at least."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            attempt()
            return
        except (Unmet, httpx.TransportError) as error:
            if time.monotonic() > deadline:
                raise Unmet(repr(error)) from error
        time.sleep(0.05)


def _left(deadline: float) -> float:
    return deadline - time.monotonic()


def _expect(held: bool, saw: str) -> None:
    if not held:
        raise Unmet(saw)


def _ok(answer: httpx.Response) -> httpx.Response:
    _expect(answer.is_success, f"{answer.status_code} {answer.text}")
    return answer


def _chat(release: Release, model: str) -> None:
    messages = [{"role": "user", "content": "What is open?"}]
    asked = {"model": model, "messages": messages, "max_tokens": 2}
    _ok(release.ask("clients", "POST", "gateway", "/v1/chat/completions", asked))


def _upload(release: Release, text: str) -> None:
    _ok(release.ask("clients", "POST", "gateway", "/v1/documents", {"text": text}))


def _run_of(release: Release, **changes: Any) -> dict[str, Any]:
    _upload(release, _PROMPTS)
    asked = {
        "name": "handbook",
        "text": DOCUMENT,
        "num_tokens": 20,
        "mode": "on",
        "num_steps": 1,
        "batch_size": 2,
        "max_new_tokens": 4,
        "prompts": {"kind": "document", "digest": content_digest(_PROMPTS.encode())},
    }
    return asked | changes


def _create_run(release: Release, seconds: float) -> str:
    created: list[str] = []

    def attempt() -> None:
        created.append(_ok(release.ask("clients", "POST", "gateway", "/v1/runs", _run_of(release))).json()["id"])

    _eventually(attempt, seconds)
    return created[0]


def _until_succeeded(release: Release, run_id: str, deadline: float) -> None:
    state = ""
    while state != "succeeded":
        record = release.ask("clients", "GET", "gateway", f"/v1/runs/{run_id}").json()
        state = record["state"]
        if state == "failed" or time.monotonic() > deadline:
            raise Unmet(f"the run is {state}: {record}")
        time.sleep(0.05)


def _cancel(release: Release, run_id: str) -> None:
    """So that it is in nobody's way; a run that is over stays what it is."""
    release.ask("clients", "POST", "gateway", f"/v1/runs/{run_id}/cancel")


def _run_pod(release: Release, name: str, environment: dict[str, str], arguments: dict[int, str]) -> None:
    """The pod's own command with its own settings, but for the `arguments` that are others here, by their index."""
    (container,) = release.pods[name]["spec"]["containers"]
    program, *options = container["command"]
    assert Path(program).name == "python"
    given = [arguments.get(index, argument) for index, argument in enumerate(container["args"])]
    environment = {entry["name"]: entry["value"] for entry in container.get("env", [])} | environment
    ended = release.run(name, [sys.executable, *options, *given], environment)
    _expect(ended.returncode == 0, ended.stdout + ended.stderr)
