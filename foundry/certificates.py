"""Certificate files and what a process makes of them, made anew when the files are renewed in place."""

from __future__ import annotations

import ssl
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from foundry.errors import InvalidArgument

log = structlog.get_logger(__name__)

T = TypeVar("T")


class Certificate(ABC, Generic[T]):
    """What is made of the files, the certificate and its key first. What is renewed badly is logged, and what was made
    last is kept."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """`files` by the settings that name them. Raises InvalidArgument, which names the file that can't be used."""
        self._files = dict(files)
        self._contents = self._read()
        self._made = self._make(self._contents)
        self._complaint = ""

    def current(self) -> T:
        """Of the files as they are now, or as they were when they last could be used. Called from any thread."""
        try:
            found = self._read()
            if found != self._contents:
                made = self._make(found)
                if self._read() != found:
                    raise InvalidArgument("the TLS files are being renewed")
                self._contents, self._made = found, made
                log.info("certificate renewed", file=str(next(iter(self._files.values()))))
            self._complaint = ""
        except InvalidArgument as error:
            # Once: this is asked at every connection.
            if error.message != self._complaint:
                log.error("certificate not renewed: the one read before stays", error=error.message)
            self._complaint = error.message
        return self._made

    @abstractmethod
    def _make(self, contents: Sequence[bytes]) -> T:
        """Of what the files hold. Raises InvalidArgument."""

    def _server_context(self) -> ssl.SSLContext:
        """A server's, with certificate and key. Raises InvalidArgument if they can't be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        (name, file), (key_name, key_file) = list(self._files.items())[:2]
        try:
            # With a password, because a key that needs one would ask for it at the terminal.
            context.load_cert_chain(file, key_file, password="")
        except (ssl.SSLError, ValueError) as error:
            raise InvalidArgument(
                f"{name} {file} and {key_name} {key_file} are not a certificate and its key in PEM: {error}", field=name
            ) from None
        return context

    def _read(self) -> list[bytes]:
        return [_read(path, name) for name, path in self._files.items()]


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{name}: {path} can't be read: {error.strerror}", field=name) from None
