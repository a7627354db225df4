"""One document of a directory: each file under a heading with its path, the same bytes for the same files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from foundry.corpus.convert import KINDS, markdown
from foundry.corpus.latex import Project, is_main
from foundry.corpus.walk import LeftOut, read_file, walk
from foundry.errors import DocumentUnreadable, InvalidArgument

MAX_BYTES = 64 * 2**20
# Of a text, and of a file that a reader takes the text of.
MAX_FILE_BYTES = 2**20
MAX_CONVERTED_BYTES = 32 * 2**20
_PROSE = frozenset({".md", ".markdown", ".txt", ".rst", ".tex", *KINDS})
# What LaTeX works with or leaves behind, no part of what its project says; a .pdf there is a figure or the result.
_OF_LATEX = frozenset({".sty", ".cls", ".bst", ".aux", ".log", ".out", ".toc", ".lof", ".lot", ".blg", ".fls", ".pdf"})
_TICKS = re.compile(r"`{3,}")


@dataclass(frozen=True, slots=True)
class Corpus:
    """The document, the paths that are in it, and what is not, by the reason."""

    text: str
    paths: list[str]
    left_out: dict[str, list[str]]


def read_directory(root: Path) -> Corpus:
    """Text files, Markdown, HTML, PDF, DOCX, LaTeX projects and sources.

    Raises ExtraMissing, DocumentUnreadable, InvalidArgument for what is not in the directory but named there, and
    beyond the bounds.
    """
    left_out = LeftOut()
    texts = _texts(root, walk(root, left_out), left_out)
    _resolve_latex(texts, left_out)
    parts = [_part(path, texts[path]) for path in texts]
    if not parts:
        raise DocumentUnreadable(f"{root} has no file with text", field="document")
    text = "\n\n".join(parts) + "\n"
    if len(text.encode()) > MAX_BYTES:
        raise InvalidArgument(f"the files of {root} have more than {MAX_BYTES} bytes", field="document")
    return Corpus(text, list(texts), left_out.by_reason)


def _texts(root: Path, paths: list[str], left_out: LeftOut) -> dict[str, str]:
    """By path, in their order. Raises InvalidArgument as soon as it is too much."""
    of_latex = _has_latex(root, paths)
    texts: dict[str, str] = {}
    num_bytes = 0
    for path in paths:
        suffix = PurePosixPath(path).suffix.lower()
        if of_latex and suffix in _OF_LATEX:
            left_out.add(path, "what LaTeX works with")
            continue
        most = MAX_CONVERTED_BYTES if suffix in KINDS else MAX_FILE_BYTES
        content = read_file(root / path, most)
        if content is None:
            left_out.add(path, f"larger than {most} bytes")
            continue
        if suffix in KINDS:
            text = markdown(path, KINDS[suffix], content, max_bytes=MAX_BYTES)
        elif (decoded := _decoded(content)) is None:
            left_out.add(path, "not text in UTF-8")
            continue
        else:
            text = decoded
        if not text.strip():
            left_out.add(path, "empty")
            continue
        num_bytes += len(text.encode())
        if num_bytes > MAX_BYTES:
            raise InvalidArgument(f"the files of {root} have more than {MAX_BYTES} bytes", field="document")
        texts[path] = text
    return texts


def _has_latex(root: Path, paths: list[str]) -> bool:
    num_bytes = 0
    for path in paths:
        if path.lower().endswith(".tex") and (content := read_file(root / path, MAX_FILE_BYTES)) is not None:
            num_bytes += len(content)
            if is_main(_decoded(content) or ""):
                return True
            if num_bytes > MAX_BYTES:
                # As much as a document may have: what follows will not be one.
                return False
    return False


def _decoded(content: bytes) -> str | None:
    """None for what is no text. Lines end alike wherever the directory was copied from."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text.replace("\r\n", "\n")


def _resolve_latex(texts: dict[str, str], left_out: LeftOut) -> None:
    """Put main files with all that they input in the place of the .tex files."""
    files = {path: text for path, text in texts.items() if path.lower().endswith(".tex")}
    mains = [path for path, text in files.items() if is_main(text)]
    if not mains:
        return
    project = Project(files, max_characters=MAX_BYTES)
    whole = {main: project.text(main) for main in mains}
    for path in files:
        # A main file that another one takes in is there already.
        if path in whole and path not in project.inputs:
            texts[path] = whole[path]
            continue
        del texts[path]
        if path not in project.inputs:
            left_out.add(path, "no main file of LaTeX inputs it")
    for name in sorted(project.missing):
        left_out.add(name, "input by LaTeX, and not there")


def _part(path: str, text: str) -> str:
    text = text.strip("\n").rstrip()
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in _PROSE:
        return f"# {path}\n\n{text}"
    # Longer than any row of ticks in it.
    fence = "`" * max([3, *(len(row) + 1 for row in _TICKS.findall(text))])
    return f"# {path}\n\n{fence}\n{text}\n{fence}"


def told(left_out: dict[str, list[str]], *, shown: int = 5) -> Iterator[str]:
    """A line for people for each reason."""
    for why, paths in sorted(left_out.items()):
        some = ", ".join(paths[:shown])
        yield f"left out ({why}): {some}{f' and {len(paths) - shown} more' if len(paths) > shown else ''}"
