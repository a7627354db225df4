"""How cartridges get from this process into vLLM's, and how long they stay there.

vLLM's scheduler and its worker run in processes of their own. Each connects to a socket of ours when it makes its
connector. The worker is handed the memory of a cartridge as a file descriptor and copies it; the scheduler says which
sequences it has let go of. Only then is a cartridge of theirs forgotten: of a sequence that was cancelled the scheduler
may not know yet.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from foundry.errors import Unavailable

Role = Literal["scheduler", "worker"]

_MESSAGE_BYTES = 64 * 1024
# vLLM has made its connectors when it says that it is ready.
_CONNECT_SECONDS = 10.0
ENDED = "vLLM's engine process has ended; if it said why, that is on stderr"


class Handover:
    """This process's end. `load` and `unload` from any thread."""

    def __init__(self) -> None:
        self._directory = TemporaryDirectory(prefix="foundry-vllm-")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.address = str(Path(self._directory.name, "socket"))
        self._listener.bind(self.address)
        self._listener.listen()
        self._worker: socket.socket
        # One answer at a time.
        self._loading = threading.Lock()
        # Of what follows.
        self._lock = threading.Lock()
        self._digests: dict[str, Sequence[str]] = {}
        self._num_holders: Counter[str] = Counter()
        self._to_forget: set[str] = set()

    def connect(self, lost: Callable[[], None]) -> None:
        """With vLLM's processes, which are ready. `lost` is called, in a thread, when the scheduler's has ended."""
        self._listener.settimeout(_CONNECT_SECONDS)
        ends: dict[Role, socket.socket] = {}
        while len(ends) < 2:
            end, _ = self._listener.accept()
            ends[json.loads(end.recv(_MESSAGE_BYTES))] = end
        self._listener.close()
        self._directory.cleanup()
        self._worker = ends["worker"]
        threading.Thread(target=self._listen, args=(ends["scheduler"], lost), name="vllm-ended", daemon=True).start()

    def hold(self, sequence_id: str, digests: Sequence[str]) -> None:
        """The digests' cartridges stay until the scheduler has let go of the sequence, about to be sent there."""
        with self._lock:
            self._digests[sequence_id] = digests
            self._num_holders.update(digests)

    def load(self, digest: str, kv_PL2GD: Tensor, dtype: torch.dtype) -> None:
        """Blocks until the worker has its copy. Raises Unavailable if it has ended, or can't hold one more."""
        with self._lock:
            if digest in self._to_forget:
                # Equal digests are equal bytes.
                self._to_forget.remove(digest)
                return
        descriptor = os.memfd_create("cartridge")
        try:
            os.truncate(descriptor, kv_PL2GD.numel() * dtype.itemsize)
            _mapped(descriptor, kv_PL2GD.shape, dtype).copy_(kv_PL2GD)
            message = {"load": digest, "shape": kv_PL2GD.shape, "dtype": str(dtype).removeprefix("torch.")}
            with self._loading:
                socket.send_fds(self._worker, [json.dumps(message).encode()], [descriptor])
                answer = self._worker.recv(_MESSAGE_BYTES)
        except ConnectionError:
            answer = b""
        finally:
            os.close(descriptor)
        if (fault := json.loads(answer) if answer else ENDED) is not None:
            raise Unavailable(fault)

    def unload(self, digest: str) -> None:
        """At once, or when the scheduler has let go of the last sequence that used it."""
        with self._lock:
            if self._num_holders[digest]:
                self._to_forget.add(digest)
            else:
                self._forget(digest)

    def _listen(self, scheduler: socket.socket, lost: Callable[[], None]) -> None:
        while message := _received(scheduler):
            with self._lock:
                for digest in self._digests.pop(json.loads(message)):
                    self._num_holders[digest] -= 1
                    if not self._num_holders[digest] and digest in self._to_forget:
                        self._to_forget.remove(digest)
                        self._forget(digest)
        lost()

    def _forget(self, digest: str) -> None:
        del self._num_holders[digest]
        try:
            self._worker.send(json.dumps({"unload": digest}).encode())
        except ConnectionError:
            # Its memory has gone with it.
            return


class SchedulerEnd:
    """Of vLLM's scheduler."""

    def __init__(self, address: str) -> None:
        self._socket = _connect(address, "scheduler")
        # Nothing comes but the end.
        threading.Thread(target=_end_with, args=(self._socket,), name="foundry-parent", daemon=True).start()

    def ended(self, sequence_id: str) -> None:
        self._socket.send(json.dumps(sequence_id).encode())


class WorkerEnd(dict[str, Tensor]):
    """Of vLLM's worker: cartridges by digest, KV [P, L, 2, G, D] each, in (pinned) host memory."""

    def __init__(self, address: str, *, pin: bool) -> None:
        super().__init__()
        self._pin = pin
        self._socket = _connect(address, "worker")
        threading.Thread(target=self._receive, name="foundry-cartridges", daemon=True).start()

    def _receive(self) -> None:
        while True:
            try:
                message, descriptors, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES, 1)
            except ConnectionError:
                message = b""
            if not message:
                return _end_with(self._socket)
            told = json.loads(message)
            if "unload" in told:
                del self[told["unload"]]
                continue
            self._socket.send(json.dumps(self._load(descriptors[0], **told)).encode())

    def _load(self, descriptor: int, load: str, shape: Sequence[int], dtype: str) -> str | None:
        """What went wrong, if anything did."""
        try:
            theirs = _mapped(descriptor, shape, getattr(torch, dtype))
            self[load] = torch.empty(shape, dtype=theirs.dtype, pin_memory=self._pin).copy_(theirs)
        except (RuntimeError, OSError) as error:
            return f"vLLM's worker can't hold cartridge {load}: {error}"
        finally:
            os.close(descriptor)
        return None


def _connect(address: str, role: Role) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.connect(address)
    end.send(json.dumps(role).encode())
    return end


def _received(end: socket.socket) -> bytes:
    """A message; empty when the other end is closed."""
    try:
        return end.recv(_MESSAGE_BYTES)
    except ConnectionError:
        return b""


def _end_with(end: socket.socket) -> None:
    """End this process when the other one has ended, however that was: vLLM's scheduler does not watch its parent, and
    would keep the GPU's memory."""
    while _received(end):
        pass
    if end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4) != os.getpid().to_bytes(4, "little"):
        os.kill(os.getpid(), signal.SIGKILL)


def _mapped(descriptor: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    memory: Any = mmap.mmap(descriptor, 0)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)
