"""What all commands do with the terminal: errors in one line and with one status, tables for people, JSON for
programs."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import IO, Annotated, Any, TypeVar

import typer
import typer.main
from typer.core import TyperCommand, TyperGroup, TyperOption

from foundry.errors import FoundryError, InvalidArgument

Function = TypeVar("Function", bound=Callable[..., Any])
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JsonEvents = Annotated[bool, typer.Option("--json", help="Print a line of JSON for each event.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Print so many at the most. Default: all.")]

FAILED, USAGE, INTERRUPTED = 1, 2, 130
# Exit statuses, what they say, and the errors of `foundry.errors` that end so, by the class that they have on the wire.
STATUSES: tuple[tuple[int, str, frozenset[str]], ...] = (
    (USAGE, "the command, a value or a file is wrong as it stands", frozenset({"INVALID_ARGUMENT"})),
    (3, "what was named does not exist", frozenset({"NOT_FOUND"})),
    (4, "what exists contradicts it", frozenset({"ALREADY_EXISTS", "FAILED_PRECONDITION", "ABORTED"})),
    (5, "no key, or one that may not do that", frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED"})),
    (
        6,
        "not now: the stack, a service or the store is away, busy or full",
        frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}),
    ),
)
_quiet = False


def status_of(error: FoundryError) -> int:
    return next((status for status, _, codes in STATUSES if error.grpc_code in codes), FAILED)


class App(typer.Typer):
    """Commands of one group; every one of them takes -q."""

    def __init__(self, help: str, **more: Any) -> None:
        super().__init__(cls=CommandGroup, help=help, no_args_is_help=True, rich_markup_mode=None, **more)

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **more: Any
    ) -> Callable[[Function], Function]:
        return super().command(name, cls=cls or Command, **more)


class CommandGroup(TyperGroup):
    """Ends every failure that a user can meet in `error: ...` on standard error."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **more: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(
                args, prog_name, complete_var, standalone_mode=False, windows_expand_args=windows_expand_args, **more
            )
        # Names of files may hold bytes that are no text.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            status = super().main(
                args,
                prog_name or "foundry",
                complete_var,
                standalone_mode=False,
                windows_expand_args=windows_expand_args,
                **more,
            )
            sys.stdout.flush()
        except FoundryError as error:
            status = _say(error.message, status_of(error))
        except typer.Abort:
            status = _say("stopped, nothing was done", FAILED)
        except typer.TyperException as error:
            status = _say(_usage(error), error.exit_code)
        except BrokenPipeError:
            # Whoever read it, `head` perhaps, has enough.
            status = FAILED
        except OSError as error:
            where = f"{error.filename}: " if error.filename else "can't write: "
            status = _say(f"{where}{error.strerror}", FAILED)
        _let_go(sys.stdout)
        raise SystemExit(status or 0)


class Command(TyperCommand):
    """Says what is wrong with an option in the option's own name."""

    def __init__(self, name: str | None, *, params: list[Any] | None = None, **more: Any) -> None:
        super().__init__(name, params=[*(params or ()), *_shared_options()], **more)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FoundryError as error:
            field = error.field or ""
            names = {field.replace(".", "_"), field.rpartition(".")[2]}
            for option in self.params:
                if isinstance(option, TyperOption) and option.name in names and ctx.params.get(option.name) is not None:
                    said = error.message.removeprefix(f"{field} ")
                    error.message = f"{option.opts[0]}{':' if said == error.message else ''} {said}"
                    break
            raise


def _be_quiet(value: bool) -> None:
    global _quiet
    _quiet = value


_Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=_be_quiet, expose_value=False, help="Print nothing but the answer and errors."
    ),
]


@cache
def _shared_options() -> list[Any]:
    """What Typer makes of a function's options, for every command."""

    def options(quiet: _Quiet = False) -> None: ...

    app = typer.Typer(add_completion=False)
    app.command()(options)
    return list(typer.main.get_command(app).params)


def quiet() -> bool:
    return _quiet


def _usage(error: typer.TyperException) -> str:
    message, context = error.format_message(), getattr(error, "ctx", None)
    if context is None or message.startswith("Usage:"):
        return message
    return f"{message.removesuffix('.')} (see '{context.command_path} --help')"


def _say(message: str, status: int) -> int:
    # A group without a command prints its help.
    print(message if message.startswith("Usage:") else f"error: {message}", file=sys.stderr)
    return status


def _let_go(stream: IO[str]) -> None:
    """What could not be written is not tried again when Python ends."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def note(line: str) -> None:
    """One line about what is going on: on standard error, so that standard output holds the answer only."""
    if not _quiet:
        print(line, file=sys.stderr, flush=True)


def confirm(question: str, yes: bool) -> None:
    """Ask, unless it was answered on the command line; anything but yes ends the command."""
    if not yes:
        typer.confirm(question, abort=True, err=True)


def standard_input(what: str) -> str:
    """Raises InvalidArgument for what is not text."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{what} on standard input is not text in UTF-8: {error}") from error


def print_json(values: Any) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False))


def print_event(event: Mapping[str, Any]) -> None:
    """A line, at once."""
    print(json.dumps(event, ensure_ascii=False), flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, empty: str) -> None:
    """A plain table that can be cut with awk: nothing in it is shortened, whatever the terminal's width; `empty` where
    there are no rows."""
    if not rows:
        note(empty)
        return
    from rich.cells import cell_len

    lines = [[printable(str(cell)) for cell in row] for row in (columns, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def printable(text: str) -> str:
    """Without what would move the cursor or colour the terminal: titles are what others wrote."""
    return "".join(character if character.isprintable() else "�" for character in text)
