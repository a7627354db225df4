"""Ports on loopback that stay ours for as long as the supervisor lives.

A reserved port is a socket bound and not listening: nothing else is given the port, neither by bind nor as the local
end of a connection, also while the service is being restarted. The service itself can listen there, because all
servers set SO_REUSEADDR and Linux lets two such sockets share a port as long as one at most listens. Other systems
don't, and the supervisor lets go of the sockets there.
"""

from __future__ import annotations

import errno
import socket

from foundry.errors import PortTaken

HOST = "127.0.0.1"
_FIRST_GATEWAY_PORT = 8000


def reserve(port: int = 0, *, lingering: bool = False) -> socket.socket:
    """Bind `port`, or any free one; with `lingering` even while connections of an earlier server linger there.

    Raises PortTaken if somebody has it: with `lingering`, who listens.
    """
    held = socket.socket()
    try:
        if lingering:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((HOST, port))
    except OSError as error:
        held.close()
        raise _refused(port, error) from error
    # Else only now: bound with it, two stacks that start together would reserve the same port.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return held


def reserve_gateway() -> socket.socket:
    """The first free port from 8000."""
    for port in range(_FIRST_GATEWAY_PORT, _FIRST_GATEWAY_PORT + 100):
        try:
            return reserve(port)
        except PortTaken:
            continue
    return reserve()


def address_of(held: socket.socket) -> str:
    return f"{HOST}:{held.getsockname()[1]}"


def _refused(port: int, error: OSError) -> PortTaken:
    if error.errno == errno.EACCES:
        return PortTaken(f"port {port} is reserved for root; use --port with a number from 1024", field="port")
    return PortTaken(
        f"port {port} is taken: another program listens on {HOST}:{port}; stop it, or use --port with another number",
        field="port",
    )
