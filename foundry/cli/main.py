"""The entry point `foundry`: one module per group of commands."""

from __future__ import annotations

import typer

from foundry.cli import cartridges, chat, doctor, documents, evaluate, keys, runs, size, stack, store, train
from foundry.cli.terminal import CommandGroup

app = typer.Typer(
    cls=CommandGroup,
    name="foundry",
    help="Train KV-cache prefixes (cartridges) that stand in for long documents, and serve them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
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


if __name__ == "__main__":
    app()
