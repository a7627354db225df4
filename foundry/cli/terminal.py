"""What all commands do with the terminal: typed errors in one line, tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from foundry.errors import FoundryError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]


class CommandGroup(TyperGroup):
    """Turns a FoundryError into `error: ...` on standard error and status 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FoundryError as error:
            fail(error.message)


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(1)


def note(line: str) -> None:
    """One line about what is going on: on standard error, so that standard output holds the answer only."""
    print(line, file=sys.stderr, flush=True)


def confirm(question: str, yes: bool) -> None:
    """Ask, unless it was answered on the command line; anything but yes ends the command."""
    if not yes:
        typer.confirm(question, abort=True, err=True)


def print_json(values: Any) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """A plain table that can be cut with awk when standard output is no terminal; `empty` where there are no rows."""
    if not rows:
        note(empty)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(soft_wrap=not sys.stdout.isatty(), highlight=False, markup=False)
    if not sys.stdout.isatty():
        console.width = 400
    console.print(table)
