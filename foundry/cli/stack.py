"""foundry up, down, status: the local stack."""

from __future__ import annotations

from typing import Annotated

import psutil
import typer

from foundry.cli.terminal import Json, note, print_json, print_table


def up(
    model: Annotated[
        str | None, typer.Option(help="demo, a local directory or a hub id. Default: what is running, else demo.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="The gateway's port. Default: free from 8000.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Start the local stack in the background and print the gateway's address."""
    from foundry.local.stack import LocalStack

    state = LocalStack(model=model, port=port, say=note).up()
    note(f"The stack is ready with the model {state.model}; 'foundry down' stops it.")
    print_json({"gateway_url": state.gateway_url, "model": state.model}) if as_json else print(state.gateway_url)


def down(as_json: Json = False) -> None:
    """Stop the local stack. Cartridges, documents and runs stay."""
    from foundry.local.stack import LocalStack

    was_running = LocalStack(say=note).down()
    if as_json:
        print_json({"was_running": was_running})
    note("The stack is stopped." if was_running else "No stack was running.")


def status(as_json: Json = False) -> None:
    """Show what runs and whether it answers. Exits with status 1 unless all of it does."""
    import asyncio

    from foundry.local.health import look
    from foundry.local.home import Home

    home = Home()
    state = home.running()
    if state is None:
        if as_json:
            print_json({"running": False, "home": str(home.path)})
        note(f"No stack is running in {home.path}; 'foundry up' starts one.")
        raise typer.Exit(1)
    serving = asyncio.run(look(state))
    if as_json:
        # The URL of Valkey stays out: it holds its password.
        shown = state.model_dump(mode="json", exclude={"start_time", "objects_url", "redis_url"})
        for name, service in shown["services"].items():
            service["serving"] = serving[name]
        print_json({"running": True, "home": str(home.path), **shown})
    else:
        print(f"{state.gateway_url}  model {state.model}  home {home.path}  {state.state}")
        rows = [
            (
                name,
                "serving" if serving[name] else "not serving",
                service.address,
                service.metrics or "-",
                service.pid,
                service.restarts,
                _resident_megabytes(service.pid),
                service.log,
            )
            for name, service in state.services.items()
        ]
        print_table(
            ["service", "state", "address", "metrics", "pid", "restarts", "MB", "log"],
            rows,
            empty="Nothing has started.",
        )
    if state.state != "ready" or not all(serving.values()):
        raise typer.Exit(1)


def _resident_megabytes(pid: int) -> str:
    try:
        return str(psutil.Process(pid).memory_info().rss // 10**6)
    except psutil.Error:
        return "-"
