"""foundry documents: the texts that cartridges stand in for, and files of prompts."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from foundry.cli.gateway import connect
from foundry.cli.terminal import App, Json, Limit, Yes, confirm, note, print_json, print_table, printable

app = App("List, show and remove stored documents.")
Digest = Annotated[str, typer.Argument(help="The document's digest, blake3:HEX.")]


@app.command()
def ls(limit: Limit = None, as_json: Json = False) -> None:
    """Documents, oldest first."""
    with connect(start=False) as client:
        listed = client.documents.list(limit=limit)
    if as_json:
        print_json(listed)
        return
    rows = [(each["digest"], each["num_bytes"], each["created_at"], each["title"]) for each in listed]
    print_table(["digest", "bytes", "created", "title"], rows, empty="There are no documents yet.")


@app.command()
def show(
    digest: Digest,
    text: Annotated[bool, typer.Option("--text", help="Print the text instead.")] = False,
    as_json: Json = False,
) -> None:
    """A document: its title, its size and since when it is there; or its text."""
    with connect(start=False) as client:
        if text:
            content = client.documents.text(digest)
            print_json({"digest": digest, "text": content}) if as_json else sys.stdout.write(content)
            return
        found = client.documents.get(digest)
    if as_json:
        print_json(found)
        return
    for key, value in found.items():
        if key != "object":
            print(f"{key:12} {printable(str(value))}")


@app.command()
def rm(digest: Digest, yes: Yes = False, as_json: Json = False) -> None:
    """Delete a document. Cartridges that were trained on it stay; a run that is not over and needs it fails."""
    with connect(start=False) as client:
        confirm(f"Delete document {digest}?", yes)
        client.documents.delete(digest)
    if as_json:
        print_json({"deleted": digest})
    note(f"Deleted {digest}.")
