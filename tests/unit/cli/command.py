"""The command line in this process."""

from __future__ import annotations

from collections.abc import Mapping

from typer.testing import CliRunner, Result

from foundry.cli.main import app


def foundry(*arguments: str, environment: Mapping[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, arguments, env=environment)


def refused(*arguments: str, status: int = 2) -> str:
    """Standard error of a command that must fail: one line, no traceback."""
    result = foundry(*arguments)
    assert result.exit_code == status, result.output
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stdout == ""
    return result.stderr
