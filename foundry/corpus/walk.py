"""The files of a directory, in an order that does not depend on the file system, and nothing outside it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foundry import extras
from foundry.errors import DocumentUnreadable, InvalidArgument

MAX_ENTRIES = 100_000
MAX_FILES = 10_000
MAX_DEPTH = 32
_IGNORE = ".gitignore"
_MAX_IGNORE_BYTES = 2**16


@dataclass
class LeftOut:
    """Paths that are not read, by the reason."""

    by_reason: dict[str, list[str]] = field(default_factory=dict)

    def add(self, path: str, why: str) -> None:
        self.by_reason.setdefault(why, []).append(path)


def walk(root: Path, left_out: LeftOut) -> list[str]:
    """Paths of regular files below `root`, with slashes, sorted by their parts: what `.gitignore` files name, and what
    is hidden, is not among them.

    Raises DocumentUnreadable for what can't be read, InvalidArgument for a link that leads out of the directory, and
    beyond the bounds on entries, files and depth.
    """
    extras.require("data", extras.CORPORA)
    whole = root.resolve()
    counted = _Counted()
    found = list(_below(whole, "", [], left_out, counted))
    if len(found) > MAX_FILES:
        raise InvalidArgument(f"{root} has {len(found)} files to be read, at most {MAX_FILES} are", field="document")
    return found


class _Counted:
    def __init__(self) -> None:
        self._num_entries = 0

    def one(self, root: Path) -> None:
        self._num_entries += 1
        if self._num_entries > MAX_ENTRIES:
            raise InvalidArgument(f"{root} has more than {MAX_ENTRIES} entries", field="document")


def _below(
    root: Path, directory: str, specs: Sequence[tuple[str, Any]], left_out: LeftOut, counted: _Counted
) -> Iterator[str]:
    if directory.count("/") > MAX_DEPTH:
        raise InvalidArgument(f"{directory[:200]} is more than {MAX_DEPTH} directories deep", field="document")
    if (spec := _spec(root / directory)) is not None:
        specs = [*specs, (directory, spec)]
    for name, is_directory in _entries(root, directory, left_out, counted):
        path = f"{directory}{name}"
        if name.startswith("."):
            # `.git`, settings, secrets: what a directory has for programs, not for readers.
            if name != _IGNORE:
                left_out.add(path, "hidden")
        elif _ignored(f"{path}/" if is_directory else path, specs):
            left_out.add(path, "named by .gitignore")
        elif is_directory:
            yield from _below(root, f"{path}/", specs, left_out, counted)
        else:
            yield path


def _entries(root: Path, directory: str, left_out: LeftOut, counted: _Counted) -> list[tuple[str, bool]]:
    """Names of files and directories, sorted, and which they are."""
    found = []
    try:
        with os.scandir(root / directory) as entries:
            for entry in entries:
                counted.one(root)
                path = f"{directory}{entry.name}"
                # Bytes that are no text, and what would begin another line of the document.
                if not entry.name.isprintable():
                    left_out.add(ascii(path), "a name that is no text")
                elif entry.is_symlink():
                    _check_within(root, path)
                    left_out.add(path, "a link to what is read in its own place")
                elif entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False):
                    found.append((entry.name, entry.is_dir(follow_symlinks=False)))
                else:
                    left_out.add(path, "not a file")
    except OSError as error:
        raise DocumentUnreadable(f"{error.filename} can't be read: {error.strerror}", field="document") from error
    return sorted(found)


def _check_within(root: Path, path: str) -> None:
    try:
        target = (root / path).resolve()
    except (OSError, RuntimeError) as error:
        raise InvalidArgument(f"{path} is a link that leads nowhere", field="document") from error
    if not target.is_relative_to(root):
        raise InvalidArgument(
            f"{path} is a link out of the directory: remove it, or put a copy in its place", field="document"
        )


def _spec(directory: Path) -> Any:
    """What a directory's own file says; None where there is none."""
    from pathspec import GitIgnoreSpec

    content = read_file(directory / _IGNORE, _MAX_IGNORE_BYTES, missing=b"")
    if content is None:
        raise InvalidArgument(f"{directory / _IGNORE} has more than {_MAX_IGNORE_BYTES} bytes", field="document")
    if not content:
        return None
    try:
        return GitIgnoreSpec.from_lines(content.decode(errors="replace").splitlines())
    except ValueError as error:
        raise InvalidArgument(f"{directory / _IGNORE} can't be understood: {error}", field="document") from error


def _ignored(path: str, specs: Sequence[tuple[str, Any]]) -> bool:
    """As git has it: the file nearest to the path decides, if it says anything of it."""
    for directory, spec in reversed(specs):
        said = spec.check_file(path.removeprefix(directory)).include
        if said is not None:
            return bool(said)
    return False


def read_file(path: Path, max_bytes: int, *, missing: bytes | None = None) -> bytes | None:
    """A regular file's bytes, None if it has more; `missing` where there is none.

    It is not followed if it has become a link meanwhile, nor waited for if it has become a pipe. Raises
    DocumentUnreadable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if missing is not None:
            return missing
        raise DocumentUnreadable(f"{path} can't be read: {error.strerror}", field="document") from error
    except OSError as error:
        raise DocumentUnreadable(f"{path} can't be read: {error.strerror}", field="document") from error
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise DocumentUnreadable(f"{path} is not a file", field="document")
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise DocumentUnreadable(f"{path} can't be read: {error.strerror}", field="document") from error
    return content if len(content) <= max_bytes else None
