"""Mutual TLS: the files of this service's certificate, its key and the authority, read again when they are renewed."""

from __future__ import annotations

import functools
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from foundry.certificates import Certificate
from foundry.errors import InvalidArgument

# What gRPC and its TLS library say of a handshake that failed, and what that means.
_MEANINGS = (
    ("is not in peer certificate", "its certificate does not carry the name by which it was asked: see its dnsNames"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not of the authority in tls_ca_file, or has expired"),
    ("WRONG_VERSION_NUMBER", "it serves without TLS"),
    ("Socket closed", "it may serve with TLS, and close when it gets no certificate of its authority"),
)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the files held at one moment, in PEM."""

    certificate_chain: bytes
    key: bytes
    authority: bytes

    def for_channel(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate_chain)

    def for_server(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate_chain)], self.authority)


class Tls(Certificate[Credentials]):
    def __init__(self, certificate_file: Path, key_file: Path, authority_file: Path) -> None:
        """Raises InvalidArgument, which names the file that can't be used."""
        self._authority_file = authority_file
        super().__init__(
            {"tls_certificate_file": certificate_file, "tls_key_file": key_file, "tls_ca_file": authority_file}
        )

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server that takes clients of the authority only, and presents the certificate of the day to each."""
        presented = self.current()

        def renewed() -> Any:
            """None for no change, which the library's types leave out."""
            nonlocal presented
            before, presented = presented, self.current()
            return None if presented == before else presented.for_server()

        return grpc.dynamic_ssl_server_credentials(presented.for_server(), renewed, require_client_authentication=True)

    def _make(self, contents: Sequence[bytes]) -> Credentials:
        """Raises InvalidArgument where gRPC would only refuse to connect, without a reason."""
        try:
            self._server_context().load_verify_locations(self._authority_file)
        except ssl.SSLError as error:
            raise InvalidArgument(
                f"tls_ca_file {self._authority_file} holds no certificate in PEM: {error}", field="tls_ca_file"
            ) from None
        return Credentials(*contents)


@functools.cache
def tls_of(certificate_file: Path, key_file: Path, authority_file: Path) -> Tls:
    """One for the whole process: what could be read last is kept for all who connect. Raises InvalidArgument."""
    return Tls(certificate_file, key_file, authority_file)


def meaning(details: str) -> str | None:
    """In plain words, why a connection failed of which gRPC says `details`; None if TLS is no part of it."""
    if not details.startswith("failed to connect"):
        return None
    return next((plain for said, plain in _MEANINGS if said in details), None)
