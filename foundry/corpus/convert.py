"""PDF, HTML and DOCX on this machine, by the process that reads them for the gateway, within the same bounds."""

from __future__ import annotations

import os
import subprocess
import sys

from foundry import extras
from foundry.errors import DocumentUnreadable

# Started by its name, as the local stack starts services: nothing of it is imported.
_READER = "services.gateway.conversion.child"
KINDS = {".html": "html", ".htm": "html", ".pdf": "pdf", ".docx": "docx"}
_SECONDS = 60
_MEMORY_BYTES = 2**30


def markdown(path: str, kind: str, content: bytes, *, max_bytes: int) -> str:
    """Raises ExtraMissing, and DocumentUnreadable for what is no such file, or beyond the bounds."""
    extras.require("documents", extras.DOCUMENTS)
    arguments = (kind, _SECONDS, _MEMORY_BYTES, max_bytes)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", _READER, *map(str, arguments)],
            input=content,
            capture_output=True,
            timeout=_SECONDS,
            # Nothing of ours that a file could be after.
            env={"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DocumentUnreadable(f"{path} was not read within {_SECONDS} s", field="document") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[:300] or "its reader ended, out of its bounds"
        raise DocumentUnreadable(f"{path} can't be read: {said}", field="document")
    if len(done.stdout) > max_bytes:
        raise DocumentUnreadable(f"the text of {path} has more than {max_bytes} bytes", field="document")
    return done.stdout.decode()
