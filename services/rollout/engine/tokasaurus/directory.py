"""Cartridges as directories where the external server looks for them."""

from __future__ import annotations

import secrets
import shutil
import threading
from pathlib import Path

from foundry.errors import PartialPage, Unavailable
from foundry.formats import tokasaurus
from foundry.model.cartridge import Cartridge


class SharedDirectory:
    """Each load is a directory of its own, whose name has the digest's hex and a part that is drawn anew.

    The server keeps what it once read under an id and never looks again, also where it gave the memory to others since.
    So no id is used twice, and what another process wrote there is never taken for ours.
    """

    def __init__(self, directory: Path, page_tokens: int) -> None:
        self._directory, self._page_tokens = directory, page_tokens
        self._written: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()

    def write(self, digest: str, cartridge: Cartridge) -> None:
        """Raises PartialPage if the cartridge does not fill the server's pages, Unavailable if it can't be written."""
        num_tokens = cartridge.header.num_tokens
        if num_tokens % self._page_tokens:
            raise PartialPage(
                f"cartridge {digest} has {num_tokens} tokens; the Tokasaurus server has pages of {self._page_tokens} "
                "and would cut off what fills none: train one with a multiple of that many tokens",
                field="cartridges",
            )
        # What its own rules for ids leave as it is.
        name = f"foundry_{digest.rpartition(':')[2]}_{secrets.token_hex(8)}"
        try:
            self._put(cartridge, name)
        except OSError as error:
            raise Unavailable(f"cartridge {digest} can't be written to {self._directory}: {error}") from error
        with self._lock:
            self._written[digest] = name, num_tokens

    def find(self, digest: str) -> tuple[str, int]:
        """The id under which the server has a cartridge that was written, and its tokens."""
        with self._lock:
            return self._written[digest]

    def remove(self, digest: str) -> None:
        with self._lock:
            name, _ = self._written.pop(digest)
        shutil.rmtree(self._directory / name, ignore_errors=True)

    def clear(self) -> None:
        for digest in list(self._written):
            self.remove(digest)

    def _put(self, cartridge: Cartridge, name: str) -> None:
        # Under another name until it is whole.
        unfinished = self._directory / f".{name}"
        try:
            tokasaurus.write(cartridge, unfinished)
            unfinished.rename(self._directory / name)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
