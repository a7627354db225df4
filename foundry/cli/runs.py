"""foundry runs: training runs, past and present."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundry.cli.gateway import connect
from foundry.cli.terminal import Json, Yes, confirm, note, print_json, print_table
from foundry.errors import FoundryError

if TYPE_CHECKING:
    from foundry.client import FoundryClient

app = typer.Typer(
    help="List, show, follow, cancel and remove training runs.", no_args_is_help=True, rich_markup_mode=None
)
RunId = Annotated[str, typer.Argument(help="The run's id, e.g. run-k3v7q2xa.")]


@app.command()
def ls(as_json: Json = False) -> None:
    """All runs, newest first."""
    with connect(start=False) as client:
        listed = client.runs.list()
    if as_json:
        print_json(listed)
        return
    rows = [
        [run["id"], run["spec"]["name"], run["state"], _steps(run), _heldout(run), run["created_at"]] for run in listed
    ]
    print_table(
        ["run", "cartridge", "state", "step", "held-out KL", "created"],
        rows,
        empty="There are no runs yet; 'foundry train FILE --name NAME' starts one.",
    )


@app.command()
def show(run_id: RunId, as_json: Json = False) -> None:
    """One run: what was asked, how it stands, how it ended."""
    with connect(start=False) as client:
        run = client.runs.get(run_id)
    if as_json:
        print_json(run)
        return
    print(f"{run['id']}  {run['spec']['name']}  {run['state']}  step {_steps(run)}")
    shown = {key: value for key, value in run.items() if key not in ("object", "id", "state", "spec", "last_event")}
    for key, value in {**shown, **run["spec"]}.items():
        if value not in (None, "", {}):
            print(f"  {key:26} {value}")


@app.command()
def cancel(run_id: RunId) -> None:
    """End a run after the step in hand. The versions published so far stay."""
    with connect(start=False) as client:
        run = client.runs.cancel(run_id)
    note(f"{run_id} is cancelled." if run["state"] == "cancelled" else f"{run_id} ends after the step in hand.")


@app.command()
def rm(run_id: RunId, yes: Yes = False) -> None:
    """Delete a run that is over, with its events and checkpoints. The versions that it published stay."""
    with connect(start=False) as client:
        confirm(f"Delete {run_id}, its events and checkpoints?", yes)
        client.runs.delete(run_id)
    note(f"Deleted {run_id}.")


@app.command()
def follow(run_id: RunId) -> None:
    """Watch a run until it ends. Ctrl-C stops watching, not the run."""
    with connect(start=False) as client:
        watch(client, client.runs.get(run_id))


def watch(client: FoundryClient, run: Mapping[str, Any]) -> None:
    """Show a run's events until it ends. Raises FoundryError if it failed; Ctrl-C leaves it going."""
    from rich.console import Console

    from foundry.cli.progress import RunView

    run_id, name = run["id"], run["spec"]["name"]
    finished: Mapping[str, Any] = {}
    try:
        with RunView(name, Console(stderr=True)) as view:
            for event in client.runs.events(run_id):
                view.show(event)
                finished = event
    except KeyboardInterrupt:
        note(
            f"\n{run_id} goes on. Watch it:  foundry runs follow {run_id}\n{' ' * len(run_id)}    End it:  "
            f"foundry runs cancel {run_id}"
        )
        raise typer.Exit(130) from None
    if finished.get("state") == "failed":
        raise FoundryError(f"{run_id} failed: {finished['error']}")
    note(f"{run_id} {finished.get('state', 'ended')}.")
    if result := finished.get("result"):
        print(f"{name}@{result['version']}  {result['digest']}")


def _steps(run: Mapping[str, Any]) -> str:
    step = (run["result"] or run["last_event"] or {}).get("step", 0)
    return f"{step}/{run['spec']['num_steps']}"


def _heldout(run: Mapping[str, Any]) -> str:
    result = run["result"] or {}
    if result.get("heldout_kl_last") is None:
        return ""
    return f"{result['heldout_kl_first']:.3f} → {result['heldout_kl_last']:.3f}"
