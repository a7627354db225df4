"""foundry keys: API keys of the gateway, directly in the store, for operators."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from foundry.cli.store import connected
from foundry.cli.terminal import App, Json, Limit, note, print_json, print_table

if TYPE_CHECKING:
    from foundry.store import ApiKey
    from foundry.store.api_keys import KeyLimits, Scope

app = App("Make, list and revoke API keys in the store that FOUNDRY_STORE__* names, else the local stack's.")


def _limit(help: str) -> Any:
    return typer.Option(min=0, help=f"{help}; default: no limit of its own.")


@app.command()
def create(
    scope: Annotated[list[str], typer.Option(help="query, train or admin; give it again for each.")],
    tenant: Annotated[str, typer.Option(help="Whose key it is; default: nobody's, for names without a tenant.")] = "",
    label: Annotated[str, typer.Option(help="What it is for, for people to read.")] = "",
    expires_days: Annotated[float | None, typer.Option(min=0.0, max=36500.0, help="Default: never.")] = None,
    requests_per_minute: Annotated[int | None, _limit("HTTP requests")] = None,
    tokens_per_minute: Annotated[int | None, _limit("Tokens of prompts and answers")] = None,
    concurrent_requests: Annotated[int | None, _limit("Completions at one time")] = None,
    concurrent_runs: Annotated[int | None, _limit("Runs of the tenant that are not over")] = None,
    steps_per_run: Annotated[int | None, _limit("Steps of one run")] = None,
    stored_bytes: Annotated[int | None, _limit("Bytes of the tenant's documents and durable cartridges")] = None,
    as_json: Json = False,
) -> None:
    """Make a key and print it, this once: the store keeps only a hash of it."""
    from foundry.store.api_keys import KeyLimits

    limits = KeyLimits(
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrent_requests=concurrent_requests,
        concurrent_runs=concurrent_runs,
        steps_per_run=steps_per_run,
        stored_bytes=stored_bytes,
    )
    expires_at = None if expires_days is None else datetime.now(UTC) + timedelta(days=expires_days)
    key, text = asyncio.run(_create(tenant, label, scope, expires_at, limits))
    if as_json:
        print_json(_shown(key) | {"key": text})
        return
    print(text)
    note(f"Key {key.key_id} of {_whose(key)}, for {', '.join(key.scopes)}. It is not shown again.")


async def _create(
    tenant: str, label: str, scopes: list[str], expires_at: datetime | None, limits: KeyLimits
) -> tuple[ApiKey, str]:
    # What is no scope is refused with the rest.
    asked = cast("list[Scope]", scopes)
    async with connected() as store:
        return await store.api_keys.create(
            tenant=tenant, label=label, scopes=asked, expires_at=expires_at, limits=limits
        )


@app.command("list")
def ls(limit: Limit = None, as_json: Json = False) -> None:
    """Keys, oldest first, without what only their owners know."""
    keys = sorted(asyncio.run(_list()), key=lambda key: key.created_at)[:limit]
    if as_json:
        print_json([_shown(key) for key in keys])
        return
    now = datetime.now(UTC)
    rows = [
        (
            key.key_id,
            key.tenant or "-",
            ",".join(key.scopes),
            key.created_at,
            key.ended(now) or (f"expires at {key.expires_at}" if key.expires_at else "good"),
            key.label,
        )
        for key in keys
    ]
    columns = ["id", "tenant", "scopes", "created", "state", "label"]
    print_table(columns, rows, empty="There are no keys yet; 'foundry keys create --scope query' makes one.")


async def _list() -> list[ApiKey]:
    async with connected() as store:
        return await store.api_keys.list()


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As 'foundry keys list' prints it.")],
    as_json: Json = False,
) -> None:
    """End a key for good. Gateways learn of it within their api_keys_refresh_seconds."""
    asyncio.run(_revoke(key_id))
    if as_json:
        print_json({"revoked": key_id})
    note(f"Key {key_id} is revoked.")


async def _revoke(key_id: str) -> None:
    async with connected() as store:
        await store.api_keys.revoke(key_id)


def _shown(key: ApiKey) -> dict[str, Any]:
    return key.model_dump(mode="json", exclude={"secret_digest"})


def _whose(key: ApiKey) -> str:
    return f"the tenant {key.tenant}" if key.tenant else "nobody, for names without a tenant"
