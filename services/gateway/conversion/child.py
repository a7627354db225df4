"""python -m services.gateway.conversion.child FORMAT SECONDS MEMORY_BYTES TEXT_BYTES: a file on standard input, its
Markdown on standard output, at most one byte more than TEXT_BYTES; why not, in one line, on standard error.

Parsers of files that strangers made are kept where they can do nothing but fail: without the gateway's secrets, without
files to write, and with bounds that the system keeps.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings

from foundry.confined import bound, failed


def main() -> int:
    kind, seconds, memory_bytes, text_bytes = sys.argv[1], *map(int, sys.argv[2:5])
    content = sys.stdin.buffer.read()
    bound(seconds, memory_bytes)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    try:
        text = convert(kind, content)
    except MemoryError:
        return failed(f"reading it takes more than {memory_bytes} bytes of memory")
    except RecursionError:
        return failed("it is nested too deeply")
    except Exception as error:
        # Whatever a parser raises of a file that is none.
        return failed(f"{type(error).__name__}: {error}")
    sys.stdout.buffer.write(text.encode(errors="replace")[: text_bytes + 1])
    return 0


def convert(kind: str, content: bytes) -> str:
    # By its kind and not by a guess: only the parser that was asked for sees the file.
    return {"html": _html, "pdf": _pdf, "docx": _docx}[kind](content)


def _html(content: bytes) -> str:
    from bs4 import BeautifulSoup
    from bs4.dammit import EncodingDetector
    from markdownify import MarkdownConverter

    try:
        markup = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        declared = EncodingDetector.find_declared_encoding(content, is_html=True)
        if declared is None:
            raise ValueError("it is not in UTF-8 and says no other charset") from None
        markup = content.decode(declared)
    soup = BeautifulSoup(markup, "html.parser")
    for each in soup(["head", "script", "style", "template", "img"]):
        each.decompose()
    markdown: str = MarkdownConverter(heading_style="ATX", bullets="-").convert_soup(soup)
    return markdown.strip()


def _docx(content: bytes) -> str:
    import mammoth

    return _html(mammoth.convert_to_html(io.BytesIO(content)).value.encode())


def _pdf(content: bytes) -> str:
    from pdfminer.high_level import extract_text

    # A form feed ends each page.
    text: str = extract_text(io.BytesIO(content))
    return text.replace("\f", "\n").strip()


if __name__ == "__main__":
    sys.exit(main())
