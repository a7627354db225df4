"""A name server for one table of names: A records over UDP and TCP (RFC 1035), nothing else."""

from __future__ import annotations

import socketserver
import struct
import threading
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Any

_A = 1
_RESPONSE, _NAME_ERROR = 0x8180, 0x8183
_TTL_SECONDS = 1
# Points at the name in the question, which follows the 12 bytes of the header.
_SAME_NAME = 0xC00C


class NameServer:
    def __init__(self, address: str, names: Mapping[str, str]) -> None:
        """Listens on port 53 of the host that it is called on."""

        class Datagrams(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                question, socket = self.request
                socket.sendto(answer(question, names), self.client_address)

        class Streams(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while prefix := self.rfile.read(2):
                    said = answer(self.rfile.read(struct.unpack("!H", prefix)[0]), names)
                    self.wfile.write(struct.pack("!H", len(said)) + said)

        self._servers: list[Any] = [
            socketserver.ThreadingUDPServer((address, 53), Datagrams),
            socketserver.ThreadingTCPServer((address, 53), Streams),
        ]
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def answer(question: bytes, names: Mapping[str, str]) -> bytes:
    labels, at = [], 12
    while length := question[at]:
        labels.append(question[at + 1 : at + 1 + length].decode())
        at += 1 + length
    kind = struct.unpack("!H", question[at + 1 : at + 3])[0]
    address = names.get(".".join(labels).lower())
    found = address is not None and kind == _A
    flags = _NAME_ERROR if address is None else _RESPONSE
    said = question[:2] + struct.pack("!5H", flags, 1, int(found), 0, 0) + question[12 : at + 5]
    if address is not None and found:
        said += struct.pack("!3HIH", _SAME_NAME, _A, 1, _TTL_SECONDS, 4) + IPv4Address(address).packed
    return said
