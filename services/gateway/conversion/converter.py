"""Has a process read a document, within bounds."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from foundry import confined, extras
from foundry.errors import DocumentUnreadable
from services.gateway.conversion.formats import Format
from services.gateway.errors import DocumentTooLarge, UnsupportedMediaType
from services.gateway.settings import ConversionSettings

_CHILD = "services.gateway.conversion.child"
_MAX_ERROR_BYTES = 4096


class Converter:
    def __init__(self, settings: ConversionSettings, *, max_text_bytes: int) -> None:
        """`max_text_bytes` is the longest document that the store takes."""
        self._settings, self._max_text_bytes = settings, max_text_bytes
        self._places = asyncio.Semaphore(settings.max_concurrent)

    async def markdown(self, kind: Format, content: bytes) -> bytes:
        """What the file says, in UTF-8.

        Raises UnsupportedMediaType where no converter is installed; DocumentUnreadable for what is no such file or is
        beyond the bounds; DocumentTooLarge if its text is.
        """
        if extras.missing(extras.DOCUMENTS):
            raise UnsupportedMediaType(
                f"{kind} is not read here: that needs pip install 'cartridge-foundry[documents]'; send its text",
                field="file",
            )
        async with self._places:
            text = await self._read(kind, content)
        if len(text) > self._max_text_bytes:
            raise DocumentTooLarge(
                f"the text of the {kind} has more than {self._max_text_bytes} bytes, more than the store takes",
                field="file",
            )
        return text

    async def _read(self, kind: Format, content: bytes) -> bytes:
        bounds = self._settings
        arguments = (kind, round(bounds.timeout_seconds), bounds.max_memory_bytes, self._max_text_bytes)
        process = await asyncio.create_subprocess_exec(
            *confined.command(_CHILD, *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=confined.environment(),
            start_new_session=True,
        )
        assert process.stdin is not None, "asked for pipes"
        assert process.stdout is not None, "asked for pipes"
        assert process.stderr is not None, "asked for pipes"
        try:
            async with asyncio.timeout(bounds.timeout_seconds):
                _, text, why = await asyncio.gather(
                    _feed(process.stdin, content),
                    _take(process.stdout, self._max_text_bytes + 1),
                    _take(process.stderr, _MAX_ERROR_BYTES),
                )
                status = await process.wait()
        except TimeoutError:
            raise DocumentUnreadable(
                f"the {kind} was not read within {bounds.timeout_seconds:g} s", field="file"
            ) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if status != 0:
            said = f"its reader ended with status {status}, out of its bounds"
            if status == confined.UNREADABLE:
                said = why.decode(errors="replace").strip()
            raise DocumentUnreadable(f"the {kind} can't be read: {said}", field="file")
        return text


async def _feed(pipe: asyncio.StreamWriter, content: bytes) -> None:
    # One that has ended says why by its status.
    with suppress(BrokenPipeError, ConnectionResetError):
        pipe.write(content)
        await pipe.drain()
    pipe.close()


async def _take(pipe: asyncio.StreamReader, max_bytes: int) -> bytes:
    """What it says up to that, and no more is held."""
    taken = bytearray()
    while part := await pipe.read(2**16):
        taken += part[: max_bytes - len(taken)]
    return bytes(taken)
