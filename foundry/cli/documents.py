"""foundry documents: the texts that cartridges stand in for, and files of prompts."""

from __future__ import annotations

from typing import Annotated

import typer

from foundry.cli.gateway import connect
from foundry.cli.terminal import Json, Yes, confirm, note, print_json, print_table

app = typer.Typer(help="List and remove stored documents.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def ls(as_json: Json = False) -> None:
    """All documents, oldest first."""
    with connect(start=False) as client:
        listed = client.documents.list()
    if as_json:
        print_json(listed)
        return
    rows = [(each["digest"], each["title"], each["num_bytes"], each["created_at"]) for each in listed]
    print_table(["digest", "title", "bytes", "created"], rows, empty="There are no documents yet.")


@app.command()
def rm(digest: Annotated[str, typer.Argument(help="The document's digest, blake3:HEX.")], yes: Yes = False) -> None:
    """Delete a document. Cartridges that were trained on it stay; a run that is not over and needs it fails."""
    with connect(start=False) as client:
        confirm(f"Delete document {digest}?", yes)
        client.documents.delete(digest)
    note(f"Deleted {digest}.")
