"""The part of the Kubernetes API that the gateway uses, over HTTP: batch/v1 Jobs and ConfigMaps of one namespace."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

NAMESPACE = "training"
Manifest = dict[str, Any]
_PATH = re.compile(rf"/(api/v1|apis/batch/v1)/namespaces/{NAMESPACE}/(configmaps|jobs)(?:/([^/]+))?")
_VERBS = {"GET": "get", "POST": "create", "DELETE": "delete"}


class KubeApi:
    """No controllers: tests say what becomes of a Job."""

    def __init__(self, directory: Path, address: str = "127.0.0.1", port: int = 0) -> None:
        """Port 0 takes a free one."""
        self.kubeconfig = directory / "kubeconfig"
        self.jobs: dict[str, Manifest] = {}
        self.config_maps: dict[str, Manifest] = {}
        # Answers so far: verb, resource, status.
        self.answers: list[tuple[str, str, int]] = []
        # What is said to whoever tries this verb on this resource, with which status.
        self.refusals: dict[tuple[str, str], tuple[int, str]] = {}
        # Where all that create wait for each other.
        self.meeting: threading.Barrier | None = None
        self.propagation: list[str] = []
        self._versions = count(1)
        self._answered = threading.Condition()
        self._server: ThreadingHTTPServer | None = None
        self._listen = (address, port)

    def start(self) -> None:
        """On the same port each time."""
        self._server = ThreadingHTTPServer(self._listen, _handler(self))
        address, port = self._listen = (self._listen[0], self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        cluster = {"name": "test", "cluster": {"server": f"http://{address}:{port}"}}
        context = {"name": "test", "context": {"cluster": "test", "user": "test", "namespace": NAMESPACE}}
        users = [{"name": "test", "user": {"token": "of-a-service-account"}}]
        self.kubeconfig.write_text(
            json.dumps({"clusters": [cluster], "contexts": [context], "users": users, "current-context": "test"})
        )

    def stop(self) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def wait_for(self, verb: str, resource: str, status: int) -> None:
        """Return when such an answer has been given."""
        with self._answered:
            assert self._answered.wait_for(lambda: (verb, resource, status) in self.answers, 10)

    def put_config_map(self, name: str, data: dict[str, str]) -> None:
        self.config_maps[name] = self._new({"metadata": {"name": name}, "data": data})

    def end_job(self, name: str, kind: str, reason: str = "", message: str = "") -> None:
        """As the Job controller does: `kind` is Complete or Failed."""
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        self.jobs[name]["status"] = {"conditions": [condition]}

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Manifest) -> tuple[int, Manifest]:
        found = _PATH.fullmatch(path)
        if found is None:
            return self._status(404, "NotFound", f"there is no {path}")
        resource, name = found[2], found[3]
        verb = "list" if method == "GET" and name is None else _VERBS[method]
        if verb == "create" and self.meeting is not None:
            self.meeting.wait(10)
        with self._answered:
            status, said = self._do(verb, resource, name, query, body)
            self.answers.append((verb, resource, status))
            self._answered.notify_all()
        return status, said

    def _do(
        self, verb: str, resource: str, name: str, query: dict[str, list[str]], body: Manifest
    ) -> tuple[int, Manifest]:
        if (verb, resource) in self.refusals:
            status, message = self.refusals[verb, resource]
            return self._status(status, "Refused", message)
        kept = self.jobs if resource == "jobs" else self.config_maps
        if verb == "list":
            (label,) = query["labelSelector"]
            items = [item for item in kept.values() if label in item["metadata"].get("labels", {})]
            return 200, {"items": items, "metadata": {"resourceVersion": str(next(self._versions))}}
        if verb == "create":
            name = body["metadata"]["name"]
            if name in kept:
                return self._status(409, "AlreadyExists", f'jobs.batch "{name}" already exists')
            kept[name] = self._new(body)
            return 201, kept[name]
        if name not in kept:
            return self._status(404, "NotFound", f'{resource} "{name}" not found')
        if verb == "delete":
            self.propagation += query["propagationPolicy"]
            del kept[name]
            return self._status(200, "", "")
        return 200, kept[name]

    def _new(self, manifest: Manifest) -> Manifest:
        given = {"uid": str(uuid.uuid4()), "resourceVersion": str(next(self._versions)), "namespace": NAMESPACE}
        return manifest | {"metadata": manifest["metadata"] | given}

    def _status(self, code: int, reason: str, message: str) -> tuple[int, Manifest]:
        return code, {"kind": "Status", "apiVersion": "v1", "code": code, "reason": reason, "message": message}


def _handler(api: KubeApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            code, said = api.answer(self.command, url.path, parse_qs(url.query), json.loads(body or "{}"))
            content = json.dumps(said).encode()
            self.send_response(code)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


@contextmanager
def open_kube_api(directory: Path) -> Iterator[KubeApi]:
    api = KubeApi(directory)
    api.start()
    try:
        yield api
    finally:
        api.stop()
