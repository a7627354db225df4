"""LaTeX projects: one text of many files, nothing from outside, and an end whatever inputs what."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import pytest

from foundry.corpus import latex
from foundry.corpus.directory import read_directory
from foundry.corpus.latex import Project
from foundry.errors import InvalidArgument
from tests.unit.corpus.test_directory import made


def expanded(files: dict[str, str], main: str = "main.tex", max_characters: int = 10**6) -> str:
    return Project(files, max_characters=max_characters).text(main)


def test_comments_go_and_what_only_looks_like_one_stays() -> None:
    text = (
        "A % said to nobody\n  % a whole line\n50\\% of \\\\% after a line break\n"
        "\\verb|% kept| and \\verb*+%+\n\\begin{verbatim}\n% kept \\input{no}\n\\end{verbatim}\n"
        "\\begin{comment}\nnobody\n\\end{comment}\nB\n"
    )
    assert expanded({"main.tex": text}) == (
        "A\n50\\% of \\\\\n\\verb|% kept| and \\verb*+%+\n\\begin{verbatim}\n% kept \\input{no}\n\\end{verbatim}\n\nB\n"
    )


def test_files_stand_where_they_are_input() -> None:
    files = {
        "paper/main.tex": "\\input{intro}|\\include{ch/one}|\\input two.tex |\\inputencoding{utf8}\n%\\input{gone}\n",
        "paper/intro.tex": "I",
        "paper/ch/one.tex": "1\\input{ch/deeper}",
        "paper/ch/deeper.tex": "D",
        "paper/two.tex": "2",
    }
    assert expanded(files, "paper/main.tex") == "I|1D|2 |\\inputencoding{utf8}\n"


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../secret", "a/../../secret", "~/secret", "|ls", "\\jobname", "../../etc/passwd", '"../x"']
)
def test_what_is_outside_is_never_input(name: str) -> None:
    files = {"main.tex": f"\\input{{{name}}}", "secret.tex": "secret"}
    with pytest.raises(InvalidArgument, match="not in the directory"):
        expanded(files)


def test_a_project_below_may_reach_up_to_the_root_and_no_further() -> None:
    files = {"p/main.tex": "\\input{../shared}", "shared.tex": "S"}
    assert expanded(files, "p/main.tex") == "S"
    with pytest.raises(InvalidArgument, match="not in the directory"):
        expanded(files | {"p/main.tex": "\\input{../../shared}"}, "p/main.tex")


def test_what_inputs_itself_or_too_much_ends() -> None:
    with pytest.raises(InvalidArgument, match="inputs itself"):
        expanded({"main.tex": "\\input{a}", "a.tex": "\\input{main}"})
    chain = {f"{number}.tex": f"\\input{{{number + 1}}}" for number in range(20)} | {"20.tex": "end"}
    with pytest.raises(InvalidArgument, match="more than 16 deep"):
        expanded(chain, "0.tex")
    for text in ("x", ""):
        laughs = {f"{number}.tex": f"\\input{{{number + 1}}}" * 10 for number in range(12)} | {"12.tex": text * 1000}
        with pytest.raises(InvalidArgument, match=r"too long|more than 10000 files"):
            expanded(laughs, "0.tex")


@pytest.mark.parametrize(
    "text",
    [
        "\\begin{verbatim}" * 50_000,
        "".join(f"\\verb{chr(0x4E00 + number)}" for number in range(20_000)),
        "\\input " * 100_000,
        " " * 10**6 + "%",
        "\\" * 10**6,
        "\\input{" * 100_000,
    ],
)
def test_hostile_text_is_read_in_linear_time(text: str) -> None:
    began = time.process_time()
    latex.is_main(text)
    with suppress(InvalidArgument):
        expanded({"main.tex": text}, max_characters=10**7)
    # A second for what takes a few hundredths: quadratic would be minutes.
    assert time.process_time() - began < 5


def test_a_directory_with_a_main_file_is_its_project(tmp_path: Path) -> None:
    files: dict[str, str | bytes] = {
        "main.tex": "\\documentclass{article}\n\\input{intro} % here\n\\input{absent}\n",
        "intro.tex": "The harbour is open.\n",
        "old.tex": "An old draft.\n",
        "style.sty": "\\ProvidesPackage{style}",
        "figure.pdf": b"no pdf at all",
        "README.md": "Build with latexmk.",
    }
    corpus = read_directory(made(tmp_path, files))
    assert corpus.text == (
        "# README.md\n\nBuild with latexmk.\n\n"
        "# main.tex\n\n\\documentclass{article}\nThe harbour is open.\n\n\\input{absent}\n"
    )
    assert corpus.left_out == {
        "input by LaTeX, and not there": ["absent"],
        "no main file of LaTeX inputs it": ["old.tex"],
        "what LaTeX works with": ["figure.pdf", "style.sty"],
    }


def test_a_main_file_that_another_takes_in_is_there_once(tmp_path: Path) -> None:
    part = "\\documentclass[main]{subfiles}\nPart."
    corpus = read_directory(made(tmp_path, {"main.tex": "\\documentclass{book}\n\\subfile{part}", "part.tex": part}))
    assert corpus.text.count("Part.") == 1
    assert corpus.paths == ["main.tex"]


def test_without_a_main_file_all_are_texts(tmp_path: Path) -> None:
    assert (
        read_directory(made(tmp_path, {"b.tex": "B % kept\n", "a.tex": "A"})).text
        == "# a.tex\n\nA\n\n# b.tex\n\nB % kept\n"
    )
