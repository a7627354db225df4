"""A hub of repositories on loopback: as much of the Hugging Face hub's HTTP API as its own client asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class FakeHub:
    """`repositories` has each one's commits, oldest first: files by their names. Everybody needs `token`."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        hub = self

        class Handler(_Handler):
            def hub(self) -> FakeHub:
                return hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def commit(self, repository: str, files: Mapping[str, bytes]) -> str:
        commits = self.repositories.setdefault(repository, [])
        commits.append({**(commits[-1] if commits else {}), **files})
        return sha(repository, len(commits) - 1)

    def files(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(repository, [])
        if revision == "main" and commits:
            return sha(repository, len(commits) - 1), commits[-1]
        return next(
            ((revision, each) for index, each in enumerate(commits) if sha(repository, index) == revision), None
        )


def sha(repository: str, index: int) -> str:
    return hashlib.sha1(f"{repository} {index}".encode(), usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def hub(self) -> FakeHub:
        raise NotImplementedError

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if not self._allowed():
            return
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            self._tree("/".join(parts[2:4]), parts[5])
        elif parts[:2] == ["api", "models"]:
            self._info("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        else:
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if not self._allowed():
            return
        path = urlsplit(self.path).path.strip("/").split("/")
        if path[-1] == "create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub().repositories.setdefault(name, [{}])
            self.hub().private[name] = asked.get("visibility", "private" if asked.get("private") else "") == "private"
            self._json({"url": f"{self.hub().url}/{name}"})
        elif path[-2] == "preupload":
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self._json({"files": files})
        else:
            lines = [json.loads(line)["value"] for line in body.splitlines() if json.loads(line)["key"] == "file"]
            name = "/".join(path[2:4])
            made = self.hub().commit(name, {each["path"]: base64.b64decode(each["content"]) for each in lines})
            self._json({"success": True, "commitOid": made, "commitUrl": f"{self.hub().url}/{name}/commit/{made}"})

    def _allowed(self) -> bool:
        if self.headers.get("authorization") == f"Bearer {self.hub().token}":
            return True
        self._json({"error": "who are you?"}, 403)
        return False

    def _info(self, repository: str, revision: str) -> None:
        found = self.hub().files(repository, revision)
        if found is None:
            code = "RevisionNotFound" if repository in self.hub().repositories else "RepoNotFound"
            self._json({"error": "not here"}, 404, {"x-error-code": code})
            return
        commit, files = found
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        self._json({"id": repository, "modelId": repository, "sha": commit, "siblings": siblings})

    def _tree(self, repository: str, revision: str) -> None:
        _, files = self.hub().files(repository, revision) or ("", {})
        self._json(
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha256(content).hexdigest()}
                for name, content in files.items()
            ]
        )

    def _file(self, repository: str, revision: str, name: str) -> None:
        found = self.hub().files(repository, revision)
        content = None if found is None else found[1].get(name)
        if found is None or content is None:
            self._json({"error": "not here"}, 404, {"x-error-code": "EntryNotFound"})
            return
        etag = hashlib.sha256(content).hexdigest()
        self._send(200, content, {"etag": f'"{etag}"', "x-repo-commit": found[0]})

    def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"content-type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
