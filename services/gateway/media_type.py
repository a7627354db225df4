"""What a body or a part of one says it is (RFC 9110, 8.3): names in any case, parameters behind them."""

from __future__ import annotations

from dataclasses import dataclass
from email.message import Message
from typing import Self

from services.gateway.errors import UnsupportedMediaType

_UTF_8 = frozenset({"utf-8", "utf8", "us-ascii"})


@dataclass(frozen=True, slots=True)
class MediaType:
    """`name` is in lower case, "" where nothing was said."""

    name: str

    @classmethod
    def of(cls, content_type: str) -> Self:
        """Raises UnsupportedMediaType for a text that is not in UTF-8."""
        message = Message()
        message["content-type"] = content_type
        charset = message.get_content_charset("utf-8")
        if charset not in _UTF_8:
            raise UnsupportedMediaType(f"{charset[:100]!r}: texts are sent in UTF-8", field="content-type")
        return cls(content_type.partition(";")[0].strip().lower())
