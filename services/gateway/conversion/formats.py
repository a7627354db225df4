"""What a document may be sent as."""

from __future__ import annotations

from typing import Literal

Format = Literal["text", "html", "pdf", "docx"]

BY_MEDIA_TYPE: dict[str, Format] = {
    "text/plain": "text",
    "text/markdown": "text",
    "text/html": "html",
    "application/xhtml+xml": "html",
    "application/pdf": "pdf",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": "docx",
}
BY_SUFFIX: dict[str, Format] = {
    "txt": "text",
    "md": "text",
    "markdown": "text",
    "html": "html",
    "htm": "html",
    "pdf": "pdf",
    "docx": "docx",
}
# What a browser or a library says of a file that it does not know.
UNKNOWN = frozenset({"", "application/octet-stream", "binary/octet-stream"})
