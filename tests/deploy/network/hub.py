"""A model hub with one model of one small file: the part of the Hugging Face API that fetching a model takes."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "org/tiny"
_COMMIT = "0" * 40
_FILE, _CONTENT = "config.json", b"{}"


class Hub:
    def __init__(self, address: str, port: int) -> None:
        """Listens on the host that it is called on."""
        self._server = ThreadingHTTPServer((address, port), _Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith(f"/api/models/{MODEL}/tree/"):
            self._answer(json.dumps([{"type": "file", "path": _FILE, "size": len(_CONTENT), "oid": _COMMIT}]).encode())
        elif self.path.startswith(f"/api/models/{MODEL}"):
            about = {"id": MODEL, "sha": _COMMIT, "siblings": [{"rfilename": _FILE}]}
            self._answer(json.dumps(about).encode())
        elif self.path == f"/{MODEL}/resolve/{_COMMIT}/{_FILE}":
            self._answer(_CONTENT)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def _answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.send_header("etag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("x-repo-commit", _COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass
