"""The entry point `foundry`: one module per group of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from foundry.cli import cartridges, chat, doctor, documents, evaluate, keys, runs, size, stack, store, train
from foundry.cli.terminal import App

app = App(
    "Train KV-cache prefixes (cartridges) that stand in for long documents, and serve them.",
    name="foundry",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
app.command()(stack.up)
app.command()(stack.down)
app.command()(stack.status)
app.command(cls=train.TrainCommand)(train.train)
app.add_typer(runs.app, name="runs")
app.command()(chat.chat)
app.command()(chat.ask)
app.add_typer(cartridges.app, name="cartridges")
app.add_typer(documents.app, name="documents")
app.command("eval")(evaluate.evaluate)
app.command()(store.gc)
app.add_typer(store.app, name="store")
app.add_typer(keys.app, name="keys")
app.command()(size.size)
app.command()(doctor.doctor)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"foundry {version('cartridge-foundry')}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    app()
