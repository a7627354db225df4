"""foundry eval: held-out questions, asked with a cartridge, without it, and with the whole document."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundry.cli.gateway import connect
from foundry.cli.store import connected
from foundry.cli.terminal import Json, note, print_json, print_table
from foundry.errors import (
    CartridgeNotFound,
    ExtraMissing,
    FingerprintMismatch,
    IdentityMismatch,
    InvalidArgument,
    Unavailable,
)

if TYPE_CHECKING:
    from foundry.evaluation.divergence import Divergence, Student
    from foundry.evaluation.questions import Question
    from foundry.evaluation.systems import Comparison
    from foundry.identity import CartridgeBytes
    from foundry.model.lm import FrozenLM
    from foundry.model.template import ChatTemplate


def evaluate(
    name: Annotated[str, typer.Argument(help="A cartridge: name, name@17, name@tag ...")],
    questions: Annotated[
        Path, typer.Option(help='Questions never trained on: JSON lines {"prompt": ..., "expected": ["...", ...]}.')
    ],
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 32,
    model: Annotated[
        Path | None, typer.Option(help="The model's directory, for the KL. Default: the local stack's.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where the KL is computed. Default: cuda if there, else cpu.")
    ] = None,
    no_kl: Annotated[bool, typer.Option("--no-kl", help="Leave the KL out: no model is loaded.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write everything to this file: answers, figures, intervals.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare a cartridge with its document on questions: right answers, tokens held, first token, and exact KL.

    Intervals hold 95 %, by the bootstrap over questions.
    """
    from foundry import extras
    from foundry.cli.run_request import read_text

    extras.require("model", ("numpy",))
    from foundry.evaluation.questions import read_questions
    from foundry.evaluation.report import Measured, report
    from foundry.evaluation.systems import compare

    # Before anything starts: what is wrong should not be found after the last question.
    asked = read_questions(read_text(questions), field=str(questions))
    if output is not None and not output.absolute().parent.is_dir():
        raise InvalidArgument(f"{output} can't be written: there is no directory {output.parent}", field="output")
    judge = None
    with connect(start=True) as client:
        comparison = compare(client, name, asked[0])
        left_out = list(comparison.left_out)
        try:
            judge = _judge(comparison, model, device, no_kl=no_kl)
        except (CartridgeNotFound, ExtraMissing, Unavailable) as error:
            left_out.append(f"The KL is left out: {error.message}")
        for line in left_out:
            note(line)
        answers = []
        for system in comparison.systems:
            note(f"Asking {len(asked)} questions: {system.label} ...")
            answers.append([system.ask(client, question, max_tokens=max_tokens) for question in asked])
    found = judge.divergences(asked, max_tokens) if judge is not None else [() for _ in answers]
    measured = [Measured(*each) for each in zip(comparison.systems, answers, found, strict=True)]
    result = {
        "questions_file": str(questions),
        "max_tokens": max_tokens,
        "left_out": left_out,
        **report(comparison, asked, measured),
    }
    if output is not None:
        output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    print_json(result) if as_json else _show(result)


@dataclass(frozen=True, slots=True)
class _Judge:
    """The frozen model, and what each system puts before its turn."""

    lm: FrozenLM
    template: ChatTemplate
    document: str
    students: Sequence[Student]

    def divergences(self, questions: Sequence[Question], max_tokens: int) -> list[tuple[Divergence, ...]]:
        """Of each system, question by question."""
        from foundry.evaluation.divergence import divergences

        note(f"Computing the KL along {len(questions)} answers to the whole document on {self.lm.device} ...")
        by_question = divergences(
            self.lm, self.template, self.document, self.students, questions, max_tokens=max_tokens
        )
        return list(zip(*by_question, strict=True))


def _judge(comparison: Comparison, model: Path | None, device: str | None, *, no_kl: bool) -> _Judge:
    """Raises ExtraMissing, Unavailable or CartridgeNotFound for what is not on this machine, and IdentityMismatch if
    what is here is not what the gateway's servers answer with."""
    from foundry import extras
    from foundry.local.home import Home

    if no_kl:
        raise Unavailable("--no-kl was given.")
    running = Home().running()
    directory = model or (Path(running.model_directory) if running is not None else None)
    if directory is None:
        raise Unavailable("no local stack runs, so no model is known here: name its directory with --model.")
    extras.require("model", extras.MODEL)
    digests = [system.digest for system in comparison.systems if system.digest is not None]
    cartridges = asyncio.run(_fetch(digests))
    import torch

    from foundry.model.lm import FrozenLM
    from foundry.model.template import ChatTemplate
    from foundry.settings import ModelSettings

    # The numbers and the clock of the services of this machine.
    settings = ModelSettings(model=directory)
    note(f"Loading the model in {directory} ...")
    lm = FrozenLM.load(
        directory, device=device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype=settings.dtype
    )
    if lm.spec.fingerprint != comparison.model_fingerprint:
        raise FingerprintMismatch(
            f"{directory} holds the model {lm.spec.fingerprint}, the gateway's servers have "
            f"{comparison.model_fingerprint}: name theirs with --model, or give --no-kl",
            field="model",
        )
    template = ChatTemplate(lm.tokenizer, settings.template_clock)
    if template.digest != comparison.template_digest:
        raise IdentityMismatch(
            f"the chat template here is {template.digest}, the gateway's servers use {comparison.template_digest}: set "
            "FOUNDRY_TEMPLATE_CLOCK to theirs, or give --no-kl"
        )
    students = [cartridges[each.digest] if each.digest is not None else each.document for each in comparison.systems]
    return _Judge(lm, template, comparison.document, students)


async def _fetch(digests: Sequence[str]) -> dict[str, CartridgeBytes]:
    async with connected() as store:
        return {digest: await store.fetch(digest) for digest in digests}


def _show(result: dict[str, Any]) -> None:
    rows = [
        (
            each["system"],
            each["held_tokens"],
            _cell(each["right"], f"{each['num_right']} of {each['num_expected']}"),
            f"{each['first_token_seconds']:.3f} s",
            _cell(each["kl"]),
        )
        for each in result["systems"]
    ]
    print_table(["", "tokens held", "right", "first token", "KL (nats/token)"], rows, empty="")
    print()
    differences = [
        (f"{each['system']} minus {each['minus']}", _cell(each["right"]), _cell(each["kl"]))
        for each in result["differences"]
    ]
    print_table(["difference", "share right", "KL (nats/token)"], differences, empty="")


def _cell(estimate: dict[str, float] | None, shown: str = "") -> str:
    if estimate is None:
        return "-"
    return f"{shown or _figure(estimate['value'])} [{_figure(estimate['low'])}, {_figure(estimate['high'])}]"


def _figure(value: float) -> str:
    # Without the sign of what rounds to nothing.
    return f"{round(value, 3) + 0.0:.3f}"
