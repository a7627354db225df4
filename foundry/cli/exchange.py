"""foundry cartridges export and import: cartridges as files, in our format and in those of others."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from foundry import extras
from foundry.cli.gateway import connect
from foundry.cli.terminal import Json, note, print_json
from foundry.errors import InvalidArgument

if TYPE_CHECKING:
    from foundry.formats.files import Format
    from foundry.formats.hub import Repository

_FORMATS = "safetensors, peft, research, research-fixed or tokasaurus"
# In a repository; the others are directories, whose files have their names.
_FILE_NAMES = {"safetensors": "cartridge.safetensors", "research": "cache.pt", "research-fixed": "cache.pt"}


def export_cartridge(
    reference: Annotated[str, typer.Argument(help="name, name@17, name@latest, name@tag or name@blake3:HEX.")],
    path: Annotated[
        Path,
        typer.Argument(
            help="The file, or for peft and tokasaurus the directory, to be written; hf:OWNER/NAME[@BRANCH] commits it "
            "to a repository of the Hugging Face hub."
        ),
    ],
    kind: Annotated[str, typer.Option("--format", help=f"One of {_FORMATS}.")] = "safetensors",
    base_model: Annotated[
        str, typer.Option("--base-model", help="What the format is to name as its model, such as a hub id.")
    ] = "",
    public: Annotated[
        bool, typer.Option("--public", help="A repository that is made on the hub is for everybody.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a version to a file: ours, a PEFT adapter, or a checkpoint of the research library or of Tokasaurus."""
    extras.require("model", extras.MODEL)
    from foundry.formats import files, hub
    from foundry.identity import CartridgeBytes
    from foundry.model.cartridge import Cartridge

    chosen = _format(kind)
    repository = _repository(path)
    if repository is None and path.exists():
        raise InvalidArgument(f"{path} is there already", field="path")
    with connect(start=False) as client:
        found = client.cartridges.get(reference)
        name, version = found["name"], found["version"]["version"]
        content = client.cartridges.download(name, version)
    cartridge = Cartridge.from_bytes(CartridgeBytes.from_file(bytearray(content)))
    place = str(path)
    if repository is None:
        files.write(cartridge, path, chosen, base_model=base_model)
    else:
        with TemporaryDirectory(prefix="foundry-export-") as directory:
            written = Path(directory) / _FILE_NAMES.get(chosen, "adapter")
            files.write(cartridge, written, chosen, base_model=base_model)
            place = str(hub.push(written, repository, message=f"{name}@{version}", public=public))
    if as_json:
        print_json({"name": name, "version": version, "digest": found["version"]["digest"], "path": place})
    note(f"{name}@{version} is in {place}.")


def import_cartridge(
    path: Annotated[
        Path, typer.Argument(help="The file or directory, or hf:OWNER/NAME[@REVISION] on the Hugging Face hub.")
    ],
    name: Annotated[str, typer.Argument(help="The cartridge's name, whose newest version it becomes.")],
    kind: Annotated[str, typer.Option("--format", help=f"auto, {_FORMATS}.")] = "auto",
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            help="The model's directory, for formats that do not say of which model they are; by default the local "
            "stack's.",
        ),
    ] = None,
    file: Annotated[str, typer.Option("--file", help="Which file of the hub's repository, if it has several.")] = "",
    document: Annotated[
        str | None, typer.Option("--document", help="Digest of the document that it stands in for.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a cartridge from elsewhere a version of a name: served, evaluated and trained on like any other."""
    extras.require("model", extras.MODEL)
    from foundry.formats import files, hub

    place = path.name
    if (repository := _repository(path)) is not None:
        path, pinned = hub.pull(repository, file)
        place = str(pinned)
    elif file:
        raise InvalidArgument("--file is for repositories of the hub", field="file")
    chosen = files.format_of(path) if kind == "auto" else _format(kind)
    cartridge = files.read(path, chosen, lambda: model or _local_model())
    content = b"".join(cartridge.to_bytes().file_parts())
    origin = f"{chosen} {place}".encode("ascii", "replace").decode()[:200]
    with connect(start=False) as client:
        made = client.cartridges.upload(name, content, origin=origin, document=document)
    if as_json:
        print_json(made)
    note(f"{made['name']}@{made['version']} has {made['header']['num_tokens']} tokens, {made['digest']}.")


def _repository(path: Path) -> Repository | None:
    """Raises InvalidArgument for what begins as one and is none."""
    from foundry.formats.hub import PREFIX, Repository

    return Repository.parse(str(path)) if str(path).startswith(PREFIX) else None


def _format(kind: str) -> Format:
    from typing import get_args

    from foundry.formats.files import Format

    if kind not in get_args(Format):
        raise InvalidArgument(f"{kind!r:.100} is not a format: expected {_FORMATS}", field="kind")
    found: Format = kind  # type: ignore[assignment]
    return found


def _local_model() -> Path:
    """Raises InvalidArgument where no local stack says it."""
    from foundry.local.home import Home

    state = None if os.environ.get("FOUNDRY_GATEWAY") else Home().running()
    if state is None:
        raise InvalidArgument("the file does not say of which model it is: name the model's directory with --model")
    return Path(state.model_directory)
