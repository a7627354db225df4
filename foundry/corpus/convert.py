"""PDF, HTML and DOCX on this machine, by the process that reads them for the gateway, within the same bounds."""

from __future__ import annotations

import subprocess

from foundry import confined, extras
from foundry.errors import DocumentUnreadable

# Started by its name, as the local stack starts services: nothing of it is imported.
_READER = "services.gateway.conversion.child"
KINDS = {".html": "html", ".htm": "html", ".pdf": "pdf", ".docx": "docx"}
_SECONDS = 60
_MEMORY_BYTES = 2**30


def markdown(path: str, kind: str, content: bytes, *, max_bytes: int) -> str:
    """Raises ExtraMissing, and DocumentUnreadable for what is no such file, or beyond the bounds."""
    extras.require("documents", extras.DOCUMENTS)
    try:
        done = subprocess.run(
            confined.command(_READER, kind, _SECONDS, _MEMORY_BYTES, max_bytes),
            input=content,
            capture_output=True,
            timeout=_SECONDS,
            env=confined.environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DocumentUnreadable(f"{path} was not read within {_SECONDS} s", field="document") from None
    if done.returncode != 0:
        said = f"its reader ended with status {done.returncode}, out of its bounds"
        if done.returncode == confined.UNREADABLE:
            said = done.stderr.decode(errors="replace").strip()
        raise DocumentUnreadable(f"{path} can't be read: {said}", field="document")
    if len(done.stdout) > max_bytes:
        raise DocumentUnreadable(f"the text of {path} has more than {max_bytes} bytes", field="document")
    return done.stdout.decode()
