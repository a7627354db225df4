"""Signing what was written before the store had its key, or by an older one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from foundry.errors import DigestMismatch, InvalidArgument, NotFound
from foundry.store.objects.objects import Objects, is_record
from foundry.store.objects.runs import MAX_EVENTS_BYTES
from foundry.store.sealed import unseal
from foundry.store.signatures import LINE_BYTES, split
from foundry.store.unreadable import reading
from foundry.untrusted import parse_object


@dataclass(frozen=True, slots=True)
class Signed:
    """`refused`: what it holds is damaged, or its signature is by no key that we have: `why` says which."""

    state: Literal["signed", "refused"]
    key: str
    why: str = ""


async def sign(objects: Objects) -> AsyncIterator[Signed]:
    """Sign each record that is not signed by the newest key. What is so already is left out. Raises InvalidArgument
    without a key."""
    if not objects.signer:
        raise InvalidArgument("there is no key to sign with: set store.signing_key_file", field="signing_key_file")
    async for entry in objects.scan(""):
        if is_record(entry.key):
            with suppress(NotFound):
                try:
                    if await _sign(objects, entry.key):
                        yield Signed("signed", entry.key)
                except DigestMismatch as error:
                    yield Signed("refused", entry.key, error.message)


async def _sign(objects: Objects, key: str) -> bool:
    """False if nothing was to be done. Raises NotFound, DigestMismatch."""
    while True:
        # First: over what another writes after this look nothing is written.
        etag = (await objects.head(key)).etag
        with reading(key):
            stored = bytes(await objects.get(key, max_bytes=MAX_EVENTS_BYTES + LINE_BYTES))
            content, signature = split(stored)
            if stored == objects.signer.signed(key, content):
                return False
            if signature:
                objects.signer.opened(key, stored)
            else:
                _check(key, content)
        if await objects.put_if_match(key, content, etag):
            return True


def _check(key: str, content: bytes) -> None:
    """Raises InvalidArgument if it is not whole."""
    if key.endswith(".jsonl"):
        for line in content.splitlines():
            parse_object(line)
    elif "checksum" in parse_object(content):
        unseal(content)
