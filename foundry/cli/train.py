"""foundry train: a document becomes a cartridge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundry.cli.gateway import connect
from foundry.cli.runs import watch
from foundry.cli.terminal import note
from foundry.errors import DocumentUnreadable

if TYPE_CHECKING:
    from foundry.client import FoundryClient


def train(
    file: Annotated[Path, typer.Argument(help="The document: a text file in UTF-8.")],
    name: Annotated[str, typer.Option(help="Name of the cartridge, name or tenant/name.")],
    tokens: Annotated[int, typer.Option(min=2, help="Length of the cartridge (p).")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 40,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per step.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer to train on.")] = 64,
    objective: Annotated[str, typer.Option(help="forward_kl, reverse_kl, jsd or topk.")] = "forward_kl",
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.01,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    num_prompts: Annotated[int, typer.Option(min=8, help="Questions that the model asks itself.")] = 64,
    prompts: Annotated[
        Path | None, typer.Option(help='Prompts instead of its own questions: JSON lines {"prompt": ...}.')
    ] = None,
    heldout: Annotated[
        Path | None, typer.Option(help="Prompts that are never trained on, in the same format, to measure with.")
    ] = None,
    heldout_every: Annotated[int, typer.Option(min=0, help="Measure every so many steps; 0: first and last.")] = 10,
    detach: Annotated[bool, typer.Option("--detach", help="Print the run's id and return.")] = False,
) -> None:
    """Train a cartridge for a document, on-policy, and watch. Ctrl-C stops watching, not the run."""
    # Before the stack is started: a wrong path should not take half a minute to be found.
    document = read(file)
    files = {"prompts": prompts and read(prompts), "heldout": heldout and read(heldout)}
    with connect(start=True) as client:
        spec: dict[str, Any] = {
            "name": name,
            "document": client.documents.create(document, title=file.name)["digest"],
            "num_tokens": tokens,
            "num_steps": steps,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "objective": objective,
            "learning_rate": lr,
            "seed": seed,
            "heldout_every": heldout_every,
            "prompts": {"kind": "selfstudy", "num_prompts": num_prompts},
        }
        for role, content in files.items():
            if content:
                spec[role] = prompts_document(client, content, title=f"{role} of {name}")
        run = client.runs.create(**spec)
        if detach:
            note(f"Watch it:  foundry runs follow {run['id']}")
            print(run["id"])
            return
        watch(client, run)


def read(file: Path) -> bytes:
    """Raises DocumentUnreadable."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise DocumentUnreadable(f"{file} can't be read: {error.strerror}", field="document") from error


def prompts_document(client: FoundryClient, content: bytes, *, title: str) -> dict[str, str]:
    """Put a prompts file where the trainer finds it."""
    return {"kind": "document", "digest": client.documents.create(content, title=title)["digest"]}
