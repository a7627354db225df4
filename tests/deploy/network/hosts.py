"""Hosts with an address and a firewall of their own: network namespaces on one bridge. Needs root, ip and iptables.

The bridge too is in a namespace of its own, so that nothing of it meets the machine's network, addresses included.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

_CLONE_NEWNET = 0x40000000
_NAMESPACES = Path("/run/netns")
_CONFIGURATION = Path("/etc/netns")
_PREFIX = "foundry-flows"

T = TypeVar("T")


class Host:
    """Made by Network.add."""

    def __init__(self, name: str, address: str, namespace: str) -> None:
        self.name = name
        self.address = address
        self._namespace = namespace
        # Its processes end with the thread that started them.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=_enter, initargs=(namespace,))

    def command(self, *arguments: str) -> list[str]:
        """`arguments` as a process of this host, with its name server."""
        return ["ip", "netns", "exec", self._namespace, *arguments]

    def call(self, work: Callable[[], T]) -> T:
        """The result of `work`, whose sockets and processes are this host's. Names are still looked up elsewhere."""
        return self._thread.submit(work).result()

    def kill(self) -> None:
        """End all processes of this host."""
        pids = subprocess.run(["ip", "netns", "pids", self._namespace], capture_output=True, text=True, check=True)
        for pid in pids.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def set_firewall(self, rules: str) -> None:
        """Replace all rules at once; `rules` is what iptables-restore reads."""
        subprocess.run(self.command("iptables-restore"), input=rules, text=True, check=True)

    def close(self) -> None:
        self._thread.shutdown()


class Network:
    def __init__(self, name_server: str) -> None:
        """Raises OSError or CalledProcessError where namespaces can't be made."""
        _remove_leftovers()
        self._name_server = name_server
        self._hosts: list[Host] = []
        with ExitStack() as self._undo:
            self._switch = self._namespace("switch")
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            self._undo = self._undo.pop_all()

    def add(self, name: str, address: str) -> Host:
        """Every other address is on the link, whatever it is."""
        namespace = self._namespace(name)
        port = f"port{len(self._hosts)}"
        _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", namespace, "address", "add", f"{address}/32", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", device, "up")
        _ip("-n", namespace, "route", "add", "default", "dev", "eth0")
        host = Host(name, address, namespace)
        self._hosts.append(host)
        self._undo.callback(host.close)
        return host

    def close(self) -> None:
        """Whatever failed in between, what was made is removed."""
        self._undo.close()

    def _namespace(self, name: str) -> str:
        namespace = f"{_PREFIX}-{os.getpid()}-{name}"
        _ip("netns", "add", namespace)
        self._undo.callback(_remove, namespace)
        # `ip netns exec` shows the file as /etc/resolv.conf.
        directory = _CONFIGURATION / namespace
        directory.mkdir(parents=True)
        (directory / "resolv.conf").write_text(f"nameserver {self._name_server}\noptions timeout:1 attempts:1\n")
        return namespace


def unavailable() -> str:
    """Why no network can be made here; "" if one can."""
    missing = [tool for tool in ("ip", "iptables-restore") if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        return f"needs root, ip and iptables-restore; uid is {os.geteuid()}, missing: {missing}"
    try:
        network = Network("127.0.0.1")
        try:
            network.add("trial", "10.0.0.1").set_firewall("*filter\nCOMMIT\n")
        finally:
            network.close()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespace with a firewall can be made here: {error}"
    return ""


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _remove(namespace: str) -> None:
    _ip("netns", "delete", namespace)
    shutil.rmtree(_CONFIGURATION / namespace, ignore_errors=True)


def _remove_leftovers() -> None:
    """Of processes that were killed before they could."""
    for path in _NAMESPACES.glob(f"{_PREFIX}-*"):
        if not Path("/proc", path.name.split("-")[2]).exists():
            _remove(path.name)


def _enter(namespace: str) -> None:
    """Put this thread, and what it starts, into the namespace."""
    with open(_NAMESPACES / namespace) as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
