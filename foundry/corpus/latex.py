"""LaTeX projects: the main file with what it inputs in its place, without comments.

The source is kept as it is: models read it, and converters lose what they don't know. So no parser of TeX is needed;
what is found here stands on the surface: comments, what is verbatim, and three commands.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping

from foundry.errors import InvalidArgument

MAX_NESTED = 16
MAX_INPUTS = 10_000
# An argument of \verb stands on one line; further than this no end of it is sought.
_MAX_VERB = 1000
_DROPPED = "comment"
_SURFACE = re.compile(
    r"\\begin\{(?P<verbatim>verbatim\*?|Verbatim|lstlisting|minted|comment)\}"
    r"|\\verb\*?(?P<delimiter>[^\sA-Za-z*])"
    r"|\\(?:input|include|subfile)[ \t]*\{(?P<braced>[^{}\n]{1,400})\}"
    r"|\\input[ \t]+(?P<bare>[^\s{}\\%]{1,400})"
    r"|(?P<escaped>\\.)"
    r"|(?P<line>^[ \t]*%[^\n]*\n?)"
    r"|(?P<comment>%[^\n]*)",
    re.MULTILINE | re.DOTALL,
)
_MAIN = re.compile(r"^[^%\n]*\\documentclass\b", re.MULTILINE)


def is_main(text: str) -> bool:
    return _MAIN.search(text) is not None


class Project:
    """The .tex files of a directory by their paths, and what was found of them."""

    def __init__(self, files: Mapping[str, str], *, max_characters: int) -> None:
        self._files, self._left = files, max_characters
        self._num_inputs = 0
        # Those that others take in.
        self.inputs: set[str] = set()
        self.missing: set[str] = set()

    def text(self, main: str) -> str:
        """Raises InvalidArgument for a path that leads out of the directory, for files that input each other, and for
        more than `max_characters` in all."""
        return "".join(self._expanded(main, posixpath.dirname(main), ()))

    def _expanded(self, path: str, base: str, above: tuple[str, ...]) -> Iterator[str]:
        if path in above:
            raise InvalidArgument(
                f"{path} inputs itself, by {' and '.join(above[above.index(path) :])}", field="document"
            )
        if len(above) > MAX_NESTED:
            raise InvalidArgument(f"{above[0]} inputs files more than {MAX_NESTED} deep", field="document")
        for piece in _surface(self._files[path]):
            if isinstance(piece, str):
                self._left -= len(piece)
                if self._left < 0:
                    raise InvalidArgument(f"{(*above, path)[0]} becomes too long with what it inputs", field="document")
                yield piece
            elif (found := self._found(piece[0], path, base)) is None:
                self.missing.add(piece[0])
                yield piece[1]
            else:
                self._num_inputs += 1
                if self._num_inputs > MAX_INPUTS:
                    raise InvalidArgument(f"{path}: more than {MAX_INPUTS} files are input in all", field="document")
                self.inputs.add(found)
                yield from self._expanded(found, base, (*above, path))

    def _found(self, name: str, path: str, base: str) -> str | None:
        """As LaTeX looks for it: beside the main file, with the suffix or without."""
        name = name.strip().strip('"')
        whole = posixpath.normpath(posixpath.join(base, name))
        if name.startswith(("/", "~", "|", "\\")) or whole.split("/")[0] == "..":
            raise InvalidArgument(f"{path} inputs {name!r:.100}, which is not in the directory", field="document")
        return next((each for each in (f"{whole}.tex", whole) if each in self._files), None)


def _surface(text: str) -> Iterator[str | tuple[str, str]]:
    """Pieces of text without comments, and between them what is input: its name, and how that is written."""
    begin = place = 0
    while (match := _SURFACE.search(text, place)) is not None:
        place = match.end()
        if environment := match["verbatim"]:
            closing = f"\\end{{{environment}}}"
            end = text.find(closing, place)
            # One that does not end is the rest of the file.
            place = len(text) if end < 0 else end + len(closing)
            if environment == _DROPPED:
                yield text[begin : match.start()]
                begin = place
        elif delimiter := match["delimiter"]:
            end = text.find(delimiter, place, place + _MAX_VERB)
            if end >= 0 and "\n" not in text[place:end]:
                place = end + 1
        elif match["escaped"]:
            continue
        else:
            yield text[begin : match.start()].rstrip(" \t") if match["comment"] else text[begin : match.start()]
            begin = place
            if name := match["braced"] or match["bare"]:
                yield name, match[0]
    yield text[begin:]
