"""foundry gc and foundry store: upkeep of the store, directly on Redis and object storage, for operators."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundry.cli.terminal import App, Json, note, print_json
from foundry.errors import InvalidArgument, Unavailable

if TYPE_CHECKING:
    from foundry.store import CartridgeStore, Collected, StoreSettings
    from foundry.store.upkeep.sign import Signed

_VARIABLES = "FOUNDRY_STORE__"

app = App("Check and restore the store that FOUNDRY_STORE__* names, else the local stack's.")


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would go.")] = False,
    keep_last: Annotated[
        int | None, typer.Option(min=1, help="Durable versions to keep per name; default: the setting keep_durable.")
    ] = None,
    max_age_days: Annotated[
        float | None, typer.Option(min=0.0, help="Let older durable versions go; default: the setting.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Sweep the store: versions, runs and documents beyond retention, what nothing needs, checkpoints of ended runs.

    Tagged, leased and latest versions stay, and those of a run that still holds the name. Safe beside publishers.
    """
    asyncio.run(_gc(dry_run, keep_last, max_age_days, as_json))


async def _gc(dry_run: bool, keep_last: int | None, max_age_days: float | None, as_json: bool) -> None:
    collected: list[Collected] = []
    async with connected() as store:
        await store.ping()
        try:
            async for each in store.gc(keep_last=keep_last, max_age_days=max_age_days, dry_run=dry_run):
                collected.append(each)
                if not as_json:
                    print(f"{each.kind:10}  {each.num_bytes:>12}  {each.key}  ({each.why})", flush=True)
        finally:
            # Also after an error: what went is gone.
            if as_json:
                total = {"things": len(collected), "num_bytes": sum(each.num_bytes for each in collected)}
                print_json({"dry_run": dry_run, "swept": [asdict(each) for each in collected], "total": total})
            else:
                note(f"{'Would sweep' if dry_run else 'Swept'}: {_summary(collected)}.")


def _summary(collected: Sequence[Collected]) -> str:
    num_things = Counter(each.kind for each in collected)
    num_bytes = {kind: sum(each.num_bytes for each in collected if each.kind == kind) for kind in num_things}
    return ", ".join(f"{num_things[kind]} {kind} ({num_bytes[kind]} bytes)" for kind in num_bytes) or "nothing"


@app.command()
def verify(as_json: Json = False) -> None:
    """Hash every blob that a manifest names, and the hot bytes. Exits with status 1 if anything is not as it should be.

    Prints what is missing, corrupt, or orphaned (nothing names it; 'foundry gc' removes it).
    """
    asyncio.run(_verify(as_json))


async def _verify(as_json: bool) -> None:
    wrong: list[dict[str, Any]] = []
    num_checked: Counter[str] = Counter()
    num_bytes = 0
    async with connected() as store:
        # Now, and not after hours of reading blobs.
        await store.ping()
        async for checked in store.verify():
            num_checked[checked.kind] += 1
            num_bytes += checked.num_bytes
            if checked.state == "ok":
                continue
            wrong.append(asdict(checked))
            if not as_json:
                print(f"{checked.state:8}  {checked.kind:8}  {checked.key}  ({checked.why})", flush=True)
    if as_json:
        print_json({"checked": dict(num_checked), "num_bytes": num_bytes, "wrong": wrong})
    else:
        counts = ", ".join(f"{num} {kind}" for kind, num in sorted(num_checked.items()))
        note(f"Checked {counts or 'nothing'}, {num_bytes} bytes: {len(wrong) or 'nothing'} wrong.")
    if wrong:
        raise typer.Exit(1)


@app.command()
def sign(as_json: Json = False) -> None:
    """Sign records of the object storage that have no signature yet, or an older key's. Exits with status 1 if some
    can't be signed: they are damaged, or of a key that store.signing_key_file does not have."""
    asyncio.run(_sign(as_json))


async def _sign(as_json: bool) -> None:
    found: list[Signed] = []
    async with connected() as store:
        async for each in store.sign():
            found.append(each)
            if not as_json:
                print(f"{each.state:8}  {each.key}" + (f"  ({each.why})" if each.why else ""), flush=True)
    refused = [each for each in found if each.state == "refused"]
    if as_json:
        print_json({"records": [asdict(each) for each in found]})
    else:
        note(f"Signed {len(found) - len(refused)} records; {len(refused) or 'none'} refused.")
    if refused:
        raise typer.Exit(1)


@app.command()
def rebuild(
    force: Annotated[bool, typer.Option("--force", help="Also if Redis looks whole. Readers wait meanwhile.")] = False,
    as_json: Json = False,
) -> None:
    """Restore Redis from object storage: names, versions, tags and runs. Services do it by themselves after a loss."""
    asyncio.run(_rebuild(force, as_json))


async def _rebuild(force: bool, as_json: bool) -> None:
    async with connected() as store:
        rebuilt = await store.rebuild(force=force)
    if as_json:
        print_json({"restored": asdict(rebuilt) if rebuilt else None})
    elif rebuilt:
        print(
            f"Restored {rebuilt.num_names} names, {rebuilt.num_versions} durable versions, "
            f"{rebuilt.num_runs} runs that are not over."
        )
    else:
        print("Redis is whole: nothing was restored. --force does it all the same.")


@asynccontextmanager
async def connected() -> AsyncIterator[CartridgeStore]:
    """The store. Raises what `store_settings` raises."""
    from foundry import telemetry
    from foundry.store import CartridgeStore

    settings = store_settings()
    # On standard error: standard output is for the answer.
    telemetry.configure_logs("foundry", "warning")
    store = CartridgeStore(settings)
    try:
        yield store
    finally:
        await store.close()


def store_settings() -> StoreSettings:
    """FOUNDRY_STORE__* where one is set, else the running local stack's. Raises InvalidArgument, Unavailable."""
    from pydantic import ValidationError

    from foundry import variables
    from foundry.local.home import Home
    from foundry.store import StoreSettings

    values = {
        name.removeprefix(_VARIABLES).lower(): value
        for name, value in os.environ.items()
        if name.startswith(_VARIABLES)
    }
    misspelt = list(variables.misspelt(StoreSettings, within=("store",)))
    if misspelt:
        # Or the local stack's store would be taken.
        raise InvalidArgument("; ".join(misspelt), field="store")
    if not {"redis_url", "objects_url"} & values.keys():
        home = Home()
        state = home.running()
        if state is None:
            raise Unavailable(
                f"no stack is running in {home.path}: start it with 'foundry up', or name a store with "
                f"{_VARIABLES}REDIS_URL and {_VARIABLES}OBJECTS_URL"
            )
        values |= {"redis_url": state.redis_url, "objects_url": state.objects_url}
    try:
        return StoreSettings.model_validate(values)
    except ValidationError as error:
        found = variables.faults(error, StoreSettings, within=("store",))
        wrong = "; ".join(f"{variables.variable(path)}: {message}" for path, message in found)
        raise InvalidArgument(f"the store's settings are wrong: {wrong}", field="store") from error
