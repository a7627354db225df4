"""HTTPS: the certificate that the gateway shows to people and applications."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from pathlib import Path

from foundry.certificates import Certificate


class Https(Certificate[ssl.SSLContext]):
    def __init__(self, certificate_file: Path, key_file: Path) -> None:
        """Raises InvalidArgument, which names the file that can't be used."""
        super().__init__({"https_server_certificate_file": certificate_file, "https_server_key_file": key_file})

    def _make(self, contents: Sequence[bytes]) -> ssl.SSLContext:
        context = self._server_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        return context
