"""A real Prometheus for tests, started on a free port and stopped by pid."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from foundry.local.ports import address_of, reserve
from tests.process import spawn

DIRECTORY = Path(__file__).parents[2] / "deploy" / "prometheus"
RULES = DIRECTORY / "rules.yaml"


def binary(name: str) -> str:
    """Where `prometheus` or `promtool` is; skips the test if it is nowhere."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on PATH (Debian and Ubuntu: apt install prometheus)")
    return found


class Prometheus:
    def __init__(self, directory: Path, configuration: dict[str, Any]) -> None:
        directory.mkdir()
        self._held = reserve()
        self._log = directory / "prometheus.log"
        file = directory / "prometheus.yml"
        file.write_text(yaml.safe_dump(configuration))
        command = [binary("prometheus"), f"--config.file={file}", f"--storage.tsdb.path={directory}/data"]
        command += [f"--web.listen-address={address_of(self._held)}", "--log.level=warn"]
        with self._log.open("wb") as log:
            self._process: subprocess.Popen[bytes] = spawn(command, stdout=log, stderr=log)
        self._client = httpx.Client(base_url=f"http://{address_of(self._held)}", trust_env=False, timeout=10)

    def is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def ask(self, path: str, **parameters: str | float) -> Any:
        """`data` of an answer of its HTTP API."""
        assert self._process.poll() is None, self._log.read_text()
        answer = self._client.post(f"/api/v1/{path}", data=parameters).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    def rules(self) -> list[dict[str, Any]]:
        groups = self._client.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def values(self, expression: str, *, since: float, until: float, step_seconds: float) -> list[float]:
        """What a panel would draw. NaN and infinity are drawn by nobody."""
        found = self.ask("query_range", query=expression, start=since, end=until, step=step_seconds)
        numbers = [float(value) for series in found["result"] for _, value in series["values"]]
        return [number for number in numbers if math.isfinite(number)]

    def label_values(self, selector: str, label: str) -> list[str]:
        names = self._client.get(f"/api/v1/label/{label}/values", params={"match[]": selector}).json()
        assert names["status"] == "success", names
        return list(names["data"])

    def close(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(timeout=30)
        self._held.close()
