"""foundry documents: the texts that cartridges stand in for, and files of prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from foundry.cli.gateway import connect
from foundry.cli.terminal import App, Json, Limit, Yes, confirm, note, print_json, print_table, printable
from foundry.errors import DocumentUnreadable, InvalidArgument

app = App("Add, list, show and remove stored documents.")
Digest = Annotated[str, typer.Argument(help="The document's digest, blake3:HEX.")]


@app.command()
def add(
    path: Annotated[
        Path, typer.Argument(help="A text file, a PDF, HTML or DOCX file, or a directory; - is standard input.")
    ],
    title: Annotated[str | None, typer.Option(help="Default: the name of the file or directory.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the text; send nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Keep a document. A directory is one: its notes, papers and sources, each file under its path."""
    from foundry.cli.run_request import read_document, title_of

    text = read_document(path)
    if dry_run:
        print_json({"text": text}) if as_json else sys.stdout.write(text)
        return
    with connect(start=False) as client:
        made = client.documents.create(text, title=title_of(path) if title is None else title)
    print_json(made) if as_json else print(made["digest"])


@app.command()
def longhealth(
    file: Annotated[Path, typer.Argument(help="LongHealth's JSON file of patients.")],
    directory: Annotated[Path, typer.Argument(help="Where document.md and questions.jsonl are written.")],
    patient: Annotated[
        list[str] | None, typer.Option("--patient", help="Only this one; may be given again. Default: all.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn LongHealth's patients into a document to train on and a file of questions for 'foundry eval'."""
    from foundry.corpus.longhealth import MAX_BYTES, read_longhealth
    from foundry.corpus.walk import read_file

    content = read_file(file.resolve(), MAX_BYTES)
    if content is None:
        raise DocumentUnreadable(f"{file} has more than {MAX_BYTES} bytes", field="file")
    found = read_longhealth(content, patient or ())
    written = {directory / "document.md": found.document, directory / "questions.jsonl": found.questions}
    for path in written:
        if path.exists():
            raise InvalidArgument(f"{path} is there already", field="directory")
    directory.mkdir(parents=True, exist_ok=True)
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    if as_json:
        print_json({"patients": found.patients, "directory": str(directory), "left_out": found.left_out})
    if found.left_out:
        note(printable(f"left out, without one right answer: {', '.join(found.left_out)}"))
    note(f"{len(found.patients)} patients and {found.questions.count(chr(10))} questions are in {directory}.")


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
