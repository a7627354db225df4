"""The page of the study's results: python -m benchmarks.study.report [DIR]

With DIR, where `benchmarks.study.grid` wrote, first gathers what is there into benchmarks/results/study.json; then
makes docs/results.md and its figures from that file alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from benchmarks.study import plots
from benchmarks.study.document import FINAL
from benchmarks.study.grid import (
    CHANGES,
    CURVES,
    FAMILY_ABLATION,
    GENERAL,
    INITIALISERS,
    SAME_PROMPTS,
    STARTS_AND_MODES,
    STARTS_AND_MODES_ELSEWHERE,
    Cell,
)
from benchmarks.study.intervals import Interval, interval
from benchmarks.study.results import Axis, Quantity, Result, Study, flags, measurements, paired

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "study.json"
PAGE = ROOT / "docs" / "results.md"

_WIDTH = 120
_TOKENS = (33_000, 66_000, 100_000)
_MODE_TOKENS = (16_000, 33_000, 50_000)
_HEAD = """\
# How a cartridge learns: results

Made by `python -m benchmarks.study.report` from `benchmarks/results/study.json`; the text stands in the script.
The jobs are those of `benchmarks/study/grid.py`, run by the product's own code.

Model: the demo model, 135M parameters ({about}). Documents: three about things that do not exist, so that no model \
knows them (`benchmarks/study/documents` and `examples/handbook.md`). A cartridge's length p is a fraction of the \
document's tokens n. What is not said is the recipe `standard` (`docs/training.md`), with the answer tokens as named \
here. Recipes were chosen with an eye to the questions about these documents.

- **KL** is the mean KL(teacher ‖ student) a token, in nats, exact over the vocabulary, along the teacher's greedy
  answers (at most 32 tokens) to all questions of the document. No wording of a question is ever trained on.
- **right** is the share of questions answered right, greedily, within 24 tokens: of those that the model answers right
  with the whole document and wrong without it, and of all.
- **general KL** is the same KL on prompts about no document, from the model with nothing before it.
- **seconds** are those of making the start, writing answers, scoring, updates and decoding by the policy; measuring is
  left out. {shared} What is written before training counts when it is first used.
- Figures are means over documents of means over seeds; in brackets the 95 % interval of a bootstrap over questions and
  seeds. With so few seeds that part of it is rough, and documents are not drawn anew.
"""
_SHARED = "Up to {} jobs ran beside each other on the devices of one machine: compare seconds with each other only."


def page(study: Study, figures: Path) -> str:
    """The page as Markdown; its figures go into the directory `figures`, beside which the page will stand."""
    figures.mkdir(parents=True, exist_ok=True)
    parts = [_head(study), _documents(study)]
    for make in (
        _curves,
        _final,
        _starts,
        _starts_elsewhere,
        _modes,
        _same_prompts,
        _families,
        _changes,
        _general,
        _initialisers,
    ):
        parts += _section(make, study, figures)
    return "\n".join(parts)


def _section(make: Callable[[Study, Path], str], study: Study, figures: Path) -> list[str]:
    """Nothing of a group without results."""
    text = make(study, figures)
    # Tables and figures are lines of their own.
    return (
        ["\n".join(line if line[:1] in ("|", "!") else fill(line, _WIDTH) for line in text.split("\n"))] if text else []
    )


def _head(study: Study) -> str:
    about = "; ".join(f"{each['dtype']}, {each['device']}, torch {each['torch']}" for each in study.about)
    workers = max(row["workers"] for row in study.rows)
    text = _HEAD.format(about=about, shared=_SHARED.format(workers) if workers > 1 else "")
    return "\n".join(
        fill(line, _WIDTH, subsequent_indent="  " if line.startswith((" ", "-")) else "") for line in text.split("\n")
    )


def _documents(study: Study) -> str:
    rows = [
        [
            name,
            f"{each['context_tokens']}",
            f"{len(each['answerable'])}",
            f"{each['answerable'].count('1')}",
            f"{each['teacher_right'].count('1')}",
            f"{sum(each['answer_tokens'])}",
        ]
        for name, each in study.documents.items()
    ]
    head = ["document", "n", "questions", "of these answerable", "right here with the document", "held-out tokens"]
    return f"## Documents\n\n{_table(head, rows)}"


def _curves(study: Study, figures: Path) -> str:
    found = _found(study, _by_length(CURVES))
    if not found:
        return ""
    plots.curves(figures / "lengths.svg", "answer_tokens", found)
    plots.curves(figures / "lengths-seconds.svg", "seconds", found)
    rows = [
        [label, _tokens(at), *_figures(by_document, "answer_tokens", at)]
        for label, by_document in found.items()
        for at in (0, *_TOKENS, 250_000)
    ]
    return (
        "## Length and training\n\n"
        "`compact` starts, `hybrid` training: 95 in 100 answer tokens written, then the cartridge's own. With the "
        f"whole document before it the model answers {100 * _whole_document(study):.0f} % of all questions. From n/4 "
        "up the KL to that model rises while more answers come right: a cartridge becomes surer of the document than "
        "its teacher is (hard labels, below).\n\n"
        f"![KL and right answers along answer tokens]({figures.name}/lengths.svg)\n\n"
        f"![The same along seconds]({figures.name}/lengths-seconds.svg)\n\n"
        + _table(["p", "answer tokens", *_FIGURES], rows)
    )


def _final(study: Study, figures: Path) -> str:
    return _tabled(
        study,
        _by_length(CURVES),
        "## A document that nothing was chosen by\n\n"
        f"Recipes were chosen with an eye to the questions about the other documents. About `{FINAL}` nothing was "
        "measured before they stood: what the goals of a recipe are worth elsewhere. At 250k answer tokens:\n\n",
        final=True,
    )


def _starts(study: Study, figures: Path) -> str:
    found = _found(study, STARTS_AND_MODES)
    if len(found) < 2:
        return ""
    hybrid = {label: by_document for label, by_document in found.items() if label.endswith(", hybrid")}
    plots.curves(figures / "starts.svg", "answer_tokens", hybrid or found)
    return (
        "## Start and mode\n\n"
        "p = n/4, 50k answer tokens. `compact` keeps the document's tokens that are attended to most, with their "
        "values refitted; `first_tokens` its first ones; `random` ones drawn at random. Trained, both stay "
        "behind what `compact` is untrained.\n\n"
        f"![Starts along answer tokens]({figures.name}/starts.svg)\n\n"
        "At the end:\n\n"
        + _ends(found)
        + "\nBy document, KL and right answers of the answerable:\n\n"
        + _by_document(study, found)
    )


def _starts_elsewhere(study: Study, figures: Path) -> str:
    return _tabled(
        study,
        STARTS_AND_MODES_ELSEWHERE,
        "## Start and mode at other lengths\n\n"
        "50k answer tokens, each length with its own learning rate. At every length written answers bring most, and "
        "the cartridge's own after them change nothing that can be seen; alone, behind `compact`, they lower KL a "
        "little and bring no answers. Everywhere the other starts, trained, stay behind `compact` untrained.\n\n",
    )


def _modes(study: Study, figures: Path) -> str:
    found = {
        label.removeprefix("compact, "): by_document
        for label, by_document in _found(study, STARTS_AND_MODES).items()
        if label.startswith("compact, ")
    }
    if len(found) < 2:
        return ""
    plots.curves(figures / "modes.svg", "answer_tokens", found)
    plots.curves(figures / "modes-seconds.svg", "seconds", found)
    return (
        "## On-policy, off-policy, or one after the other\n\n"
        "From the same `compact` starts at p = n/4. `off`: answers of the model with the document, and the document "
        "recited; `on`: the cartridge's own answers to the model's questions; `hybrid`: 95 % `off`, then `on`. "
        "The data differ with the mode as they do in the product; the next section has the same prompts for both. "
        "Each run's learning rate falls to 0 at its own 50k tokens, so a run is not at its best before.\n\n"
        "The cartridge's own answers at the end of `hybrid` change nothing that can be seen. `on` alone lowers KL a "
        "little and brings no answers.\n\n"
        f"![Modes along answer tokens]({figures.name}/modes.svg)\n\n"
        f"![Modes along seconds]({figures.name}/modes-seconds.svg)\n\n" + _compared(found)
    )


def _same_prompts(study: Study, figures: Path) -> str:
    found = _found(study, SAME_PROMPTS)
    if len(found) < 2:
        return ""
    text = (
        "## The same prompts, whoever answers\n\n"
        "`compact`, p = n/4, 50k answer tokens: the model's own questions, or the document's sentences to be "
        "completed. Who answers makes little difference at equal tokens; the cartridge's own answers take four to six "
        "times as long. Of `cloze`, `on` has one seed: what is compared below is that one.\n\n" + _ends(found)
    )
    for family in ("question", "cloze"):
        modes = {mode: found.get(f"{family}, {mode}") for mode in ("off", "on")}
        both = {mode: by_document for mode, by_document in modes.items() if by_document}
        if len(both) == len(modes):
            text += f"\n`{family}`. {_compared(both)}"
    return text


def _families(study: Study, figures: Path) -> str:
    return _tabled(
        study,
        FAMILY_ABLATION,
        "## What is trained on\n\n"
        "`compact`, p = n/4, mode `off`, 100k answer tokens, in equal parts of each family. Any one left "
        "out costs at most three answers in a hundred, but without the model's own (`question`) KL doubles. These "
        "alone, what methods of this kind usually train on, keep KL least and teach no answers beyond the start's; the "
        "document's own words, all other families, do.\n\n",
    )


def _changes(study: Study, figures: Path) -> str:
    return _tabled(
        study,
        CHANGES,
        "## How it is trained\n\n"
        "`compact`, p = n/4, mode `off`, 100k answer tokens, with one thing changed. The recipe has half hard labels: "
        "how likely the document's own words are counts as much as the teacher's belief in them. More of it brings "
        "more right answers and a student that is surer than its teacher, which KL counts against it; without any "
        "soft ones (`nll`, and 1.0) both get worse.\n\n",
    )


def _general(study: Study, figures: Path) -> str:
    return _tabled(
        study,
        GENERAL,
        "## The model elsewhere\n\n"
        "`compact`, p = n/4, mode `off`, 100k answer tokens, some of them of answers to general prompts, by the model "
        "without any document. How far a cartridge moves the model on such prompts before training stands in the first "
        "table. The whole document itself moves the model as far as a cartridge does: part of what a cartridge does "
        "elsewhere is what the document does. The last row is a bound, not a cartridge to use: trained on hardly "
        "anything else it has forgotten the document, and still moves the model.\n\n",
    )


def _initialisers(study: Study, figures: Path) -> str:
    return _tabled(
        study,
        _by_length(INITIALISERS),
        "## Starts before any training\n\n"
        "`compact` as it is, and with one part of it changed: values not refitted, every layer fitted to the whole "
        "document's queries instead of those behind what the layers below kept (`sequential`), keys that don't take "
        "over the attention to what is left out (`restore_mass`), other numbers of matching steps, another power of "
        "the attention weights than 2, or other turns to be looked at than recitations and completions: one of both "
        "alone, or the model's own questions besides. Of the parts alone only matching is missed at every length, and "
        "more of it helps; without any of them KL doubles. Training makes up for most of it (above).\n\n",
    )


def _by_length(cells: Sequence[Cell]) -> list[Cell]:
    return sorted(cells, key=lambda cell: cell.job.compression)


# Tables

_FIGURES = ["KL", "right of answerable", "right of all", "general KL", "seconds", "jobs"]


def _found(study: Study, cells: Sequence[Cell], *, final: bool = False) -> dict[str, dict[str, list[Result]]]:
    """By label what there is of each cell."""
    by_label = {cell.label: study.of(cell, final=final) for cell in cells}
    return {label: by_document for label, by_document in by_label.items() if by_document}


def _tabled(study: Study, cells: Sequence[Cell], text: str, *, final: bool = False) -> str:
    """The text, and what each cell ends with. One alone says nothing."""
    found = _found(study, cells, final=final)
    return text + _ends(found) if len(found) > 1 else ""


def _ends(found: dict[str, dict[str, list[Result]]]) -> str:
    return _table(["", *_FIGURES], [[label, *_figures(by_document)] for label, by_document in found.items()])


def _figures(by_document: dict[str, list[Result]], axis: Axis = "answer_tokens", at: float = float("inf")) -> list[str]:
    """The columns `_FIGURES` of a cell at a place on the axis."""
    kl, answerable, right = (
        interval(measurements(by_document, quantity, axis, at)) for quantity in ("kl", "answerable", "right")
    )
    general = _mean(by_document, lambda result: _at(result, axis, at, lambda mark: mark["general_kl"]))
    seconds = _mean(by_document, lambda result: _at(result, axis, at, lambda mark: sum(mark["seconds"].values())))
    num_jobs = sum(map(len, by_document.values()))
    return [_nats(kl), _percent(answerable), _percent(right), f"{general:.3f}", f"{seconds:.0f}", f"{num_jobs}"]


def _by_document(study: Study, found: dict[str, dict[str, list[Result]]]) -> str:
    def row(by_document: dict[str, list[Result]]) -> Iterator[str]:
        for name in study.documents:
            if name in by_document:
                alone = {name: by_document[name]}
                kl, right = (interval(measurements(alone, quantity)).value for quantity in ("kl", "answerable"))
                count = right * flags(study.documents[name]["answerable"]).sum()
                yield f"{kl:.3f}, {count:.1f}"
            else:
                yield ""

    return _table(["", *study.documents], [[label, *row(by_document)] for label, by_document in found.items()])


def _compared(found: dict[str, dict[str, list[Result]]]) -> str:
    """The modes at equal tokens and at equal seconds, and how far they are apart, on what all of them have."""
    modes = dict(zip(found, paired(list(found.values())), strict=True))
    if not all(modes.values()):
        return ""
    # Beyond the shortest there is nothing to compare.
    shortest = min(_mean(by_document, lambda result: result.along("seconds")[-1]) for by_document in modes.values())
    places: list[tuple[Axis, float, str]] = [
        *(("answer_tokens", at, f"{_tokens(at)} tokens") for at in _MODE_TOKENS),
        *(("seconds", shortest * third / 3, f"{shortest * third / 3:.0f} seconds") for third in (1, 2, 3)),
    ]
    first, *others = modes
    head = ["at", *modes, *(f"{other} less {first}" for other in others)]

    def rows(quantity: Quantity, said: Callable[[Interval], str]) -> Iterator[list[str]]:
        for axis, at, label in places:
            taken = {mode: measurements(by_document, quantity, axis, at) for mode, by_document in modes.items()}
            differences = [interval(taken[other], taken[first]) for other in others]
            yield [label, *(said(interval(each)) for each in taken.values()), *map(said, differences)]

    return (
        f"KL:\n\n{_table(head, list(rows('kl', _nats)))}\n"
        f"Right of the answerable, and the difference:\n\n{_table(head, list(rows('answerable', _percent)))}"
    )


def _mean(by_document: dict[str, list[Result]], figure: Callable[[Result], float]) -> float:
    """Over documents, of the means over seeds."""
    return float(np.mean([np.mean([figure(each) for each in results]) for results in by_document.values()]))


def _whole_document(study: Study) -> float:
    """Share of all questions that the teacher answers right, a mean over documents."""
    shares = [flags(each["teacher_right"]).mean() for name, each in study.documents.items() if name != FINAL]
    return float(np.mean(shares))


def _at(result: Result, axis: Axis, at: float, figure: Callable[[dict[str, Any]], float]) -> float:
    return float(np.interp(at, result.along(axis), [figure(mark) for mark in result.marks]))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _nats(each: Interval) -> str:
    return f"{each.value:.3f} [{each.low:.3f}, {each.high:.3f}]"


def _percent(each: Interval) -> str:
    return f"{100 * each.value:.0f} % [{100 * each.low:.0f}, {100 * each.high:.0f}]"


def _tokens(number: float) -> str:
    return f"{number / 1000:.0f}k" if number else "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, nargs="?", help="results to gather first")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--page", type=Path, default=PAGE, help="its figures go into a directory of its name beside it")
    arguments = parser.parse_args()
    if arguments.directory is not None:
        Study.gather(arguments.directory).write(arguments.result)
    text = page(Study.read(arguments.result), arguments.page.with_suffix(""))
    arguments.page.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
