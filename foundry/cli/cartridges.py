"""foundry cartridges: what is in the store."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from foundry.cli.exchange import export_cartridge, import_cartridge
from foundry.cli.gateway import connect
from foundry.cli.terminal import App, Json, Limit, Yes, confirm, note, print_json, print_table, printable
from foundry.errors import InvalidArgument

app = App("List, show, tag, promote, roll back, grant, remove, export and import cartridges.")
app.command("export")(export_cartridge)
app.command("import")(import_cartridge)
Name = Annotated[str, typer.Argument(help="name or tenant/name.")]


@app.command()
def ls(limit: Limit = None, as_json: Json = False) -> None:
    """Cartridges by name, each with its newest version and its tags."""
    with connect(start=False) as client:
        listed = client.cartridges.list(limit=limit)
    if as_json:
        print_json(listed)
        return
    rows = [
        (
            item["name"],
            item["version"]["version"],
            item["version"]["header"]["num_tokens"],
            _tags(item["tags"]),
            item["version"]["created_at"],
            item["version"]["digest"],
        )
        for item in listed
    ]
    print_table(
        ["name", "version", "tokens", "tags", "created", "digest"],
        rows,
        empty="There are no cartridges yet; 'foundry train FILE --name NAME' makes one.",
    )


@app.command()
def show(
    reference: Annotated[str, typer.Argument(help="name, name@17, name@latest, name@tag or name@blake3:HEX.")],
    as_json: Json = False,
) -> None:
    """The version that a reference means: where it comes from, what is known about it, where its bytes are."""
    with connect(start=False) as client:
        found = client.cartridges.get(reference)
    if as_json:
        print_json(found)
        return
    manifest: dict[str, Any] = {**found["version"]}
    header = manifest.pop("header")
    print(f"{manifest.pop('name')}@{manifest.pop('version')}  {manifest.pop('digest')}")
    parents = [f"{ancestor['version'] or ancestor['digest']}" for ancestor in found["lineage"]]
    values: dict[str, Any] = {
        **manifest,
        "parents": " <- ".join(parents),
        "tags": _tags(found["tags"]),
        "kept": ", ".join(place for place in ("durable", "hot") if found[place]),
        **header,
    }
    for key, value in values.items():
        if key not in ("object", "parent") and value not in (None, "", {}):
            print(f"  {key:18} {printable(str(value))}")


@app.command()
def versions(name: Name, limit: Limit = None, as_json: Json = False) -> None:
    """Versions, oldest first."""
    with connect(start=False) as client:
        listed = client.cartridges.versions(name, limit=limit)
    if as_json:
        print_json(listed)
        return
    rows = [
        (
            item["version"],
            item["step"],
            "durable" if item["durable"] else "hot",
            item["run"],
            item["created_at"],
            item["digest"],
        )
        for item in listed
    ]
    print_table(["version", "step", "kept", "run", "created", "digest"], rows, empty=f"{name} has no versions.")


@app.command()
def tag(
    reference: Annotated[str, typer.Argument(help="The version to be tagged, e.g. handbook@17 or handbook@latest.")],
    tag: Annotated[str, typer.Argument(help="The tag; with --remove the one that goes.")],
    remove: Annotated[bool, typer.Option("--remove", help="Remove the tag instead.")] = False,
    as_json: Json = False,
) -> None:
    """Point a tag at a version, which is then kept."""
    with connect(start=False) as client:
        if remove:
            client.cartridges.untag(reference.partition("@")[0], tag)
            if as_json:
                print_json({"removed": tag})
            note(f"The tag {tag} is removed.")
            return
        found = client.cartridges.get(reference)
        moved = client.cartridges.tag(found["name"], tag, found["version"]["version"])
    if as_json:
        print_json(moved)
    note(f"{found['name']}@{tag} is now version {found['version']['version']}.")


@app.command()
def promote(
    reference: Annotated[str, typer.Argument(help="The version, e.g. handbook@17 or handbook@latest.")],
    tag: Annotated[str, typer.Argument(help="The tag that is to mean it, e.g. prod.")],
    as_json: Json = False,
) -> None:
    """Move a tag to a version and print from where to where; 'rollback' undoes it."""
    with connect(start=False) as client:
        found = client.cartridges.get(reference)
        moved = client.cartridges.tag(found["name"], tag, found["version"]["version"])
    if as_json:
        print_json(moved)
        return
    print(f"{found['name']}@{tag}: {moved['previous'] or 'nothing'} -> {moved['version']}")


@app.command()
def rollback(
    name: Name,
    tag: Annotated[str | None, typer.Argument(help="The tag that goes back to what it meant before.")] = None,
    to: Annotated[
        str | None, typer.Option("--to", help="Instead: the version whose bytes become latest, e.g. 17 or a tag.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let a tag mean what it meant before; or, with --to, publish an older version again as the newest.

    The first can be repeated, one step further back each time. The second makes a new version, because latest only goes
    forward.
    """
    if (tag is None) == (to is None):
        raise InvalidArgument(
            f"say what goes back: 'rollback {name} TAG' for a tag, 'rollback {name} --to VERSION' for latest"
        )
    with connect(start=False) as client:
        if tag is not None:
            moved = client.cartridges.rollback_tag(name, tag)
            print_json(moved) if as_json else print(f"{name}@{tag}: {moved['previous']} -> {moved['version']}")
            return
        assert to is not None
        latest = client.cartridges.get(name)["version"]["version"]
        new = client.cartridges.rollback(name, to)
    print_json(new) if as_json else print(f"{name}@latest: {latest} -> {new['version']} ({new['init']})")


@app.command()
def grant(
    name: Name,
    tenant: Annotated[str, typer.Argument(help="The other tenant.")],
    remove: Annotated[bool, typer.Option("--remove", help="Take the grant back.")] = False,
    as_json: Json = False,
) -> None:
    """Let another tenant query a cartridge: not its document, runs or versions, and it changes nothing."""
    with connect(start=False) as client:
        if remove:
            client.cartridges.ungrant(name, tenant)
            answer: Any = {"removed": tenant}
        else:
            answer = client.cartridges.grant(name, tenant)
    if as_json:
        print_json(answer)
    note(f"{tenant} may {'not query' if remove else 'query'} {name}, once the gateways have seen it.")


@app.command()
def grants(name: Name, limit: Limit = None, as_json: Json = False) -> None:
    """The other tenants that may query a cartridge."""
    with connect(start=False) as client:
        listed = client.cartridges.grants(name, limit=limit)
    if as_json:
        print_json(listed)
        return
    rows = [(item["tenant"], item["granted_at"]) for item in listed]
    print_table(["tenant", "granted"], rows, empty=f"{name} is granted to nobody.")


@app.command()
def rm(
    reference: Annotated[str, typer.Argument(help="name (with all its versions) or name@17 (one version).")],
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete a cartridge, or one version of it. What is deleted is gone."""
    name, at, version = reference.partition("@")
    if at and not version.isdecimal():
        raise InvalidArgument(
            f"{reference!r} names no version by its number: use {name}@NUMBER, or 'foundry cartridges tag --remove' "
            "to remove a tag"
        )
    with connect(start=False) as client:
        # Not looked at first: what is damaged can be deleted too.
        what = f"version {version} of {name}" if at else f"{name} and all its versions"
        confirm(f"Delete {what}?", yes)
        client.cartridges.delete(name, int(version) if at else None)
    if as_json:
        print_json({"deleted": reference})
    note(f"Deleted {what}.")


def _tags(tags: dict[str, int]) -> str:
    return ", ".join(f"{tag}={version}" for tag, version in sorted(tags.items()))
