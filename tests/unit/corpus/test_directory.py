"""Directories as documents: what is in them, what is not and is said, and what is refused."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from foundry.cli.run_request import read_document
from foundry.corpus import directory, walk
from foundry.corpus.directory import Corpus, read_directory, told
from foundry.errors import DocumentUnreadable, FoundryError, InvalidArgument
from foundry.identity import content_digest
from tests.unit.cli.command import foundry, refused


def made(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def test_files_stand_under_their_paths_in_a_stable_order(tmp_path: Path) -> None:
    files = {
        "b.md": "Notes.\r\nMore.\r\n",
        "src/z.py": "print('z')\n",
        "src/a.py": "TICKS = '```'\n",
        "a.html": "<h1>Harbour</h1><p>It is <b>open</b>.</p><script>no()</script>",
    }
    first = read_directory(made(tmp_path / "one", files))
    assert first.text == (
        "# a.html\n\n# Harbour\n\nIt is **open**.\n\n"
        "# b.md\n\nNotes.\nMore.\n\n"
        "# src/a.py\n\n````\nTICKS = '```'\n````\n\n"
        "# src/z.py\n\n```\nprint('z')\n```\n"
    )
    again = read_directory(made(tmp_path / "two", dict(reversed(files.items()))))
    assert content_digest(again.text.encode()) == content_digest(first.text.encode())
    assert first.paths == ["a.html", "b.md", "src/a.py", "src/z.py"]


def test_what_is_left_out_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "MAX_FILE_BYTES", 100)
    files: dict[str, str | bytes] = {
        "kept.txt": "x" * 100,
        "large.txt": "x" * 101,
        "binary.bin": b"\x00\x01",
        "latin.txt": b"caf\xe9",
        "empty.md": " \n",
        ".env": "SECRET=1",
        ".git/config": "secret",
        "two\nlines.md": "# forged",
    }
    root = made(tmp_path, files)
    os.mkfifo(root / "pipe")
    (root / "again.txt").symlink_to("kept.txt")
    corpus = read_directory(root)
    assert corpus.paths == ["kept.txt"]
    assert corpus.left_out == {
        "a link to what is read in its own place": ["again.txt"],
        "a name that is no text": ["'two\\nlines.md'"],
        "empty": ["empty.md"],
        "hidden": [".env", ".git"],
        "larger than 100 bytes": ["large.txt"],
        "not a file": ["pipe"],
        "not text in UTF-8": ["binary.bin", "latin.txt"],
    }
    assert list(told({"hidden": list("abcdefg")})) == ["left out (hidden): a, b, c, d, e and 2 more"]


def test_gitignore_files_are_honoured_as_git_has_them(tmp_path: Path) -> None:
    files = {
        ".gitignore": "*.log\nbuild/\n/top.txt\n",
        "a.log": "x",
        "top.txt": "x",
        "build/out.txt": "x",
        "src/top.txt": "x",
        "src/.gitignore": "!kept.log\nown.txt\n",
        "src/kept.log": "x",
        "src/own.txt": "x",
        "own.txt": "x",
    }
    corpus = read_directory(made(tmp_path, files))
    assert corpus.paths == ["own.txt", "src/kept.log", "src/top.txt"]
    assert corpus.left_out["named by .gitignore"] == ["a.log", "build", "src/own.txt", "top.txt"]


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret.txt", "nested/../../secret.txt", "/etc", ".."])
def test_links_out_of_the_directory_are_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    root = made(tmp_path / "root", {"a.md": "a", "nested/b.md": "b"})
    (root / "link").symlink_to(target)
    with pytest.raises(InvalidArgument, match="link is a link out of the directory"):
        read_directory(root)


def test_links_in_circles_end(tmp_path: Path) -> None:
    root = made(tmp_path, {"a.md": "a", "sub/b.md": "b"})
    (root / "sub" / "up").symlink_to("..")
    assert read_directory(root).paths == ["a.md", "sub/b.md"]
    (root / "self").symlink_to("self")
    with pytest.raises(InvalidArgument, match="self is a link that leads nowhere"):
        read_directory(root)


def test_bounds_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = made(tmp_path / "many", {f"{number}.txt": "text" for number in range(5)})
    for module, bound, most in (
        (walk, "MAX_FILES", 4),
        (walk, "MAX_ENTRIES", 4),
        (directory, "MAX_BYTES", 19),
    ):
        with monkeypatch.context() as bounded:
            bounded.setattr(module, bound, most)
            with pytest.raises(InvalidArgument, match=str(most)):
                read_directory(root)
    deep = made(tmp_path / "deep", {f"{'d/' * 32}a.txt": "as deep as may be"})
    assert len(read_directory(deep).paths) == 1
    with pytest.raises(InvalidArgument, match="more than 32 directories deep"):
        read_directory(made(tmp_path / "deeper", {f"{'d/' * 33}a.txt": "too deep"}))
    with pytest.raises(InvalidArgument, match=r"\.gitignore has more than"):
        read_directory(made(tmp_path / "ignoring", {".gitignore": "x\n" * 2**15 + "x", "a.md": "a"}))
    with pytest.raises(DocumentUnreadable, match="no file with text"):
        read_directory(made(tmp_path / "bare", {".hidden": "a"}))


def test_a_file_that_is_no_pdf_is_named(tmp_path: Path) -> None:
    with pytest.raises(DocumentUnreadable, match=r"papers/a\.pdf can't be read"):
        read_directory(made(tmp_path, {"papers/a.pdf": b"%PDF-1.7 and nothing else"}))


def test_a_docx_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("[Content_Types].xml", "<Types/>")
        file.writestr("word/document.xml", " " * 2**26)
    with pytest.raises(FoundryError, match=r"bomb\.docx"):
        read_document(tmp_path / "bomb.docx")


def test_a_single_html_file_is_a_document(tmp_path: Path) -> None:
    assert read_document(made(tmp_path, {"a.htm": "<p>The <i>harbour</i>.</p>"}) / "a.htm") == "The *harbour*."
    with pytest.raises(DocumentUnreadable, match=r"a\.html can't be read"):
        read_document(tmp_path / "a.html")


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return made(tmp_path / "notes", {"a.md": "The harbour is open. " * 20, "b.bin": b"\0", "c.md": "The price is 12."})


def test_train_and_documents_take_a_directory(notes: Path) -> None:
    corpus: Corpus = read_directory(notes)
    shown = foundry("documents", "add", str(notes), "--dry-run")
    assert (shown.exit_code, shown.stdout) == (0, corpus.text)
    assert "left out (not text in UTF-8): b.bin" in shown.stderr
    run = foundry("train", str(notes), "--name", "x", "--dry-run")
    assert content_digest(corpus.text.encode()) in run.stdout, run.output
    shutil.rmtree(notes)
    assert "can't be read" in refused("documents", "add", str(notes))
