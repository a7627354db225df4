"""Mutual TLS: the files of this service's certificate, its key and the authority, read again when they are renewed."""

from __future__ import annotations

import functools
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import structlog

from foundry.errors import InvalidArgument

log = structlog.get_logger(__name__)

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


class Tls:
    """The files' credentials. What is renewed badly is logged, and what was read last is kept."""

    def __init__(self, certificate_file: Path, key_file: Path, authority_file: Path) -> None:
        """Raises InvalidArgument, which names the file that can't be used."""
        self._files = {
            "tls_certificate_file": certificate_file,
            "tls_key_file": key_file,
            "tls_ca_file": authority_file,
        }
        self._good = self._read()
        self._check()
        self._complaint = ""

    def current(self) -> Credentials:
        """Of the files as they are now, or as they were when they last could be used. Called from any thread."""
        try:
            found = self._read()
            if found != self._good:
                self._check()
                if self._read() != found:
                    raise InvalidArgument("the TLS files are being renewed")
                self._good = found
                log.info("certificate renewed", file=str(self._files["tls_certificate_file"]))
            self._complaint = ""
        except InvalidArgument as error:
            # Once: this is asked at every connection.
            if error.message != self._complaint:
                log.error("certificate not renewed: the one read before stays", error=error.message)
            self._complaint = error.message
        return self._good

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a server that takes clients of the authority only, and presents the certificate of the day to each."""
        presented = self.current()

        def renewed() -> Any:
            """None for no change, which the library's types leave out."""
            nonlocal presented
            before, presented = presented, self.current()
            return None if presented == before else presented.for_server()

        return grpc.dynamic_ssl_server_credentials(presented.for_server(), renewed, require_client_authentication=True)

    def _read(self) -> Credentials:
        return Credentials(*(_read(path, name) for name, path in self._files.items()))

    def _check(self) -> None:
        """Raises InvalidArgument where gRPC would only refuse to connect, without a reason."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate_file, key_file, authority_file = self._files.values()
        try:
            # With a password, because a key that needs one would ask for it at the terminal.
            context.load_cert_chain(certificate_file, key_file, password="")
        except (ssl.SSLError, ValueError) as error:
            raise InvalidArgument(
                f"tls_certificate_file {certificate_file} and tls_key_file {key_file} are not a certificate and its "
                f"key in PEM: {error}",
                field="tls_certificate_file",
            ) from None
        try:
            context.load_verify_locations(authority_file)
        except ssl.SSLError as error:
            raise InvalidArgument(
                f"tls_ca_file {authority_file} holds no certificate in PEM: {error}", field="tls_ca_file"
            ) from None


@functools.cache
def tls_of(certificate_file: Path, key_file: Path, authority_file: Path) -> Tls:
    """One for the whole process: what could be read last is kept for all who connect. Raises InvalidArgument."""
    return Tls(certificate_file, key_file, authority_file)


def meaning(details: str) -> str | None:
    """In plain words, why a connection failed of which gRPC says `details`; None if TLS is no part of it."""
    if not details.startswith("failed to connect"):
        return None
    return next((plain for said, plain in _MEANINGS if said in details), None)


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{name}: {path} can't be read: {error.strerror}", field=name) from None
