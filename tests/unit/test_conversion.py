"""Files that are made to hurt their reader: it ends within its bounds, and the gateway says why."""

from __future__ import annotations

import json

import pytest

from foundry import extras
from foundry.errors import DocumentUnreadable
from services.gateway.conversion import converter
from services.gateway.conversion.converter import Converter
from services.gateway.conversion.formats import Format
from services.gateway.errors import DocumentTooLarge, UnsupportedMediaType
from services.gateway.settings import ConversionSettings
from tests.files import docx, html

BOUNDS = ConversionSettings(timeout_seconds=30, max_memory_bytes=2**27)


@pytest.mark.parametrize(
    ("kind", "content", "why"),
    [
        # A few kilobytes that unpack to very many paragraphs.
        ("docx", docx("a</w:t></w:r></w:p><w:p><w:r><w:t>" * 300_000), r"memory|out of its bounds"),
        ("html", b"<div>" * 50_000, "nested too deeply"),
        ("html", b"<p>\xff", "not in UTF-8"),
        ("pdf", b"%PDF-1.7\n", "can't be read"),
    ],
)
async def test_what_hurts_its_reader_is_unreadable(kind: Format, content: bytes, why: str) -> None:
    with pytest.raises(DocumentUnreadable, match=why) as raised:
        await Converter(BOUNDS, max_text_bytes=1000).markdown(kind, content)
    assert raised.value.field == "file"


async def test_a_reader_that_takes_too_long_is_ended() -> None:
    bounds = ConversionSettings(timeout_seconds=1)
    with pytest.raises(DocumentUnreadable, match=r"within 1 s|out of its bounds"):
        await Converter(bounds, max_text_bytes=1000).markdown("html", b"<b><i>" * 2_000_000)


async def test_a_charset_that_is_declared_is_read() -> None:
    content = '<meta charset="latin-1"><p>Größe</p>'.encode("latin-1")
    assert await Converter(BOUNDS, max_text_bytes=1000).markdown("html", content) == "Größe".encode()


async def test_no_more_text_than_is_stored_is_held() -> None:
    with pytest.raises(DocumentTooLarge):
        await Converter(BOUNDS, max_text_bytes=1000).markdown("html", html("a" * 10**6))


async def test_a_reader_has_none_of_the_gateways_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOUNDRY_STORE__S3_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(converter, "_CHILD", "tests.printing_child")
    printed = json.loads(await Converter(BOUNDS, max_text_bytes=10**6).markdown("html", b""))
    assert not {name for name in printed if name.startswith("FOUNDRY_")}
    assert "PYTHONPATH" in printed


async def test_without_the_extra_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "DOCUMENTS", ("no_such_package",))
    with pytest.raises(UnsupportedMediaType, match=r"pip install 'cartridge-foundry\[documents\]'"):
        await Converter(BOUNDS, max_text_bytes=1000).markdown("pdf", b"")
