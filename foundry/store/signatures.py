"""Signatures of stored records: who can write to the bucket, but has no key of the store, can't make one.

A record is signed together with its place, so that one that was moved is refused. The signature is a last line behind
the record: keyed BLAKE3 over both.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from foundry.errors import InvalidArgument

_PURPOSE = "cartridge-foundry: signatures of stored records"
_SETTING = "signing_key_file"
_LINE = '\n{{"signature": "blake3:{}"}}\n'
_SIGNED = re.compile(rb'\n\{"signature": "blake3:([0-9a-f]{64})"\}\n')
LINE_BYTES = len(_LINE.format("0" * 64))
# What an editor shows and nobody guesses.
_KEY = re.compile(r"[!-~]{32,}")


class Signer:
    """Signs with the first of its keys and takes signatures of any. Without keys it signs nothing, and takes all."""

    def __init__(self, keys: Sequence[str] = ()) -> None:
        self._keys = [blake3(key.encode(), derive_key_context=_PURPOSE).digest() for key in keys]

    @classmethod
    def of(cls, file: Path | None) -> Signer:
        """With the keys of a file, one a line. Raises InvalidArgument if it can't be used."""
        if file is None:
            return cls()
        try:
            keys = file.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            said = error.strerror if isinstance(error, OSError) else "it is no text"
            raise InvalidArgument(f"store.{_SETTING}: {file} can't be read: {said}", field=_SETTING) from None
        if not keys or not all(map(_KEY.fullmatch, keys)):
            raise InvalidArgument(
                f"store.{_SETTING}: {file} must hold keys of 32 or more characters without spaces, one a line",
                field=_SETTING,
            )
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    def signed(self, place: str, content: bytes) -> bytes:
        if not self._keys:
            return content
        return content + _LINE.format(_signature(self._keys[0], place, content)).encode()

    def opened(self, place: str, stored: bytes) -> bytes:
        """The record without its signature. Raises InvalidArgument if that is not of this record at this place."""
        content, signature = split(stored)
        if not self._keys:
            return content
        if not signature:
            raise InvalidArgument(
                "it has no signature. If it is from before there was a key: 'foundry store sign' signs what is whole"
            )
        if not any(hmac.compare_digest(_signature(key, place, content), signature) for key in self._keys):
            raise InvalidArgument(f"its signature is not of this place, or not by a key of store.{_SETTING}")
        return content


def split(stored: bytes) -> tuple[bytes, str]:
    """A record and its signature; "" if there is none."""
    found = _SIGNED.fullmatch(stored[-LINE_BYTES:])
    return (stored[:-LINE_BYTES], found[1].decode()) if found else (stored, "")


def _signature(key: bytes, place: str, content: bytes) -> str:
    return blake3(f"{place}\0".encode() + content, key=key).hexdigest()
