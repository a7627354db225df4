"""Ask a service of ours how it is: `python -m foundry.rpc.probe [--live | --drain SECONDS] [ADDRESS]`, exit 0 if well.

For health checks and hooks that can only run a command. Without an address it asks the server that this container's
variables describe. `--live` is content with any answer: a server that loads its model is alive and does not serve yet.
`--drain` has a rollout server refuse new work, and returns when the work in flight has ended. The server then exits.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from foundry.errors import FoundryError
from foundry.rpc.access import authorization, token_of
from foundry.rpc.tls import Credentials, Tls
from foundry.v1 import rollout_pb2, rollout_pb2_grpc

_TIMEOUT_SECONDS = 4.0
# The name for itself that a service's certificate carries besides its own.
_OWN_NAME = "localhost"


def serving(address: str, credentials: Credentials | None = None, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> bool:
    """What the server's health service says. Raises grpc.RpcError if it does not answer in time."""
    with _channel(address, credentials) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)  # type: ignore[attr-defined]
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def drain(
    address: str, credentials: Credentials | None = None, *, token: str | None = None, timeout_seconds: float
) -> None:
    """Return when the rollout server has nothing in flight any more. Raises grpc.RpcError if that takes longer."""
    metadata = (authorization(token),) if token is not None else ()
    with _channel(address, credentials) as channel:
        stub = rollout_pb2_grpc.RolloutStub(channel)
        stub.Drain(rollout_pb2.DrainRequest(), timeout=timeout_seconds, metadata=metadata)


def own_address() -> str:
    """FOUNDRY_LISTEN, as a client in the same container reaches it. Raises KeyError if it is not set."""
    host, _, port = os.environ["FOUNDRY_LISTEN"].rpartition(":")
    return f"127.0.0.1:{port}" if host in ("", "0.0.0.0", "[::]") else f"{host}:{port}"


def own_credentials() -> Credentials | None:
    """Of the service's own files, which are a client's too. Raises InvalidArgument if they can't be used."""
    files = [os.environ.get(f"FOUNDRY_TLS_{name}_FILE") for name in ("CERTIFICATE", "KEY", "CA")]
    return Tls(*map(Path, filter(None, files))).current() if all(files) else None


def own_token() -> str | None:
    """An operator's, which a rollout server knows. Raises InvalidArgument if it can't be read."""
    directory = os.environ.get("FOUNDRY_RPC_TOKENS_DIRECTORY")
    return token_of("operator", Path(directory)) if directory else None


def _channel(address: str, credentials: Credentials | None) -> grpc.Channel:
    options = [("grpc.enable_http_proxy", 0), ("grpc.ssl_target_name_override", _OWN_NAME)]
    if credentials is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, credentials.for_channel(), options=options)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m foundry.rpc.probe", description="exit 0 if the service is well")
    parser.add_argument("address", nargs="?", help="host:port; default: this container's own server")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--live", action="store_true", help="any answer will do, NOT_SERVING too")
    asked.add_argument("--drain", type=float, metavar="SECONDS", help="wait so long for a rollout server's work to end")
    options = parser.parse_args(arguments)
    address = options.address or own_address()
    try:
        if options.drain is not None:
            drain(address, own_credentials(), token=own_token(), timeout_seconds=options.drain)
            return 0
        well = serving(address, own_credentials()) or options.live
    except grpc.RpcError as error:
        print(f"{address}: {error.code().name}: {error.details()}", file=sys.stderr)
        return 1
    except FoundryError as error:
        print(error.message, file=sys.stderr)
        return 1
    if not well:
        print(f"{address}: NOT_SERVING", file=sys.stderr)
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
