"""Writes docs/cli.md from the commands; with --check says whether it is up to date."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

from docs.make_settings import write_or_check
from foundry.cli.main import app
from foundry.cli.terminal import FAILED, INTERRUPTED, STATUSES

PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = """# The command line

Made from the code by `make docs`. `foundry` is installed with the package; `python -m foundry` is the same.
`foundry --install-completion` has the shell complete commands and options.

- Commands talk to the gateway of `FOUNDRY_GATEWAY` (with or without `/v1`), else to the local stack; `FOUNDRY_API_KEY`
  is what they show it. `gc`, `store` and `keys` work on the store itself: `FOUNDRY_STORE__*`, else the local stack's.
- The answer goes to standard output, whatever else is said to standard error. `-q` leaves only answers and errors.
- `--json` prints JSON; with `train`, `chat`, `runs follow` and `runs logs` a line for each event.
- Tables shorten nothing: what they print can be given to another command.
- `-` is standard input, for a question and for a file.
- What fails prints one line, `error: ...`, and ends with a status that says of which kind it is.
"""


def page() -> str:
    return "\n".join([INTRODUCTION, _statuses(), *_commands(get_command(app), "foundry")])


def _statuses() -> str:
    rows = [
        (0, "done"),
        (FAILED, "failed: a run, a check that found something, a file or disk, a fault of ours"),
        *((status, meaning) for status, meaning, _ in STATUSES),
        (INTERRUPTED, "Ctrl-C"),
    ]
    return "\n".join(
        ["| status | meaning |", "|---|---|", *(f"| {status} | {meaning} |" for status, meaning in rows), ""]
    )


def _commands(command: Any, path: str, parent: Any = None) -> Iterator[str]:
    # `train` makes its options when it is used.
    context = command.make_context(path, [], parent=parent, resilient_parsing=True)
    command = context.command
    names = [] if not hasattr(command, "list_commands") else command.list_commands(context)
    if parent is not None:
        yield f"## {path}\n" if not names else f"## {path} ...\n"
        yield f"{(command.help or '').strip()}\n"
    if not names:
        yield _parameters(command, context)
    for name in names:
        yield from _commands(command.get_command(context, name), f"{path} {name}", context)


def _parameters(command: Any, context: Any) -> str:
    records = [record for param in command.params if (record := _record(param, context))]
    rows = [f"| `{spelt}` | {' '.join(about.split())} |" for spelt, about in records]
    return "\n".join(["| argument or option | |", "|---|---|", *rows, ""])


def _record(param: Any, context: Any) -> tuple[str, str] | None:
    record = param.get_help_record(context)
    if record is None or param.name in ("help", "quiet"):
        return None
    return tuple(part.replace("|", "\\|") for part in record)


if __name__ == "__main__":
    raise SystemExit(write_or_check(PAGE, page()))
