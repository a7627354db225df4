"""foundry runs: training runs, past and present."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundry.cli.gateway import connect
from foundry.cli.terminal import (
    INTERRUPTED,
    App,
    Json,
    JsonEvents,
    Limit,
    Yes,
    confirm,
    note,
    print_event,
    print_json,
    print_table,
    printable,
    quiet,
)
from foundry.errors import FoundryError, InvalidArgument

if TYPE_CHECKING:
    from foundry.client import Foundry, RunJson

app = App("List, show, follow, pause, resume, cancel and remove training runs.")
RunId = Annotated[str, typer.Argument(help="The run's id, e.g. run-k3v7q2xa.")]


@app.command()
def ls(limit: Limit = None, as_json: Json = False) -> None:
    """Runs, newest first."""
    with connect(start=False) as client:
        listed = client.runs.list(limit=limit)
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
            print(f"  {key:26} {printable(str(value))}")


@app.command()
def cancel(run_id: RunId, as_json: Json = False) -> None:
    """End a run after the step in hand. The versions published so far stay."""
    with connect(start=False) as client:
        run = client.runs.cancel(run_id)
    _answer(
        run, as_json, f"{run_id} is cancelled." if run["state"] == "cancelled" else f"{run_id} ends after this step."
    )


@app.command()
def pause(run_id: RunId, as_json: Json = False) -> None:
    """Put a run aside after the step in hand, until it is resumed. Its worker is free for others."""
    with connect(start=False) as client:
        run = client.runs.pause(run_id)
    paused = run["state"] == "paused"
    _answer(run, as_json, f"{run_id} is paused." if paused else f"{run_id} pauses after the step in hand.")


@app.command()
def resume(run_id: RunId, as_json: Json = False) -> None:
    """Let a paused run go on from where it stood."""
    with connect(start=False) as client:
        run = client.runs.resume(run_id)
    _answer(run, as_json, f"{run_id} goes on.")


@app.command()
def rm(run_id: RunId, yes: Yes = False, as_json: Json = False) -> None:
    """Delete a run that is over, with its events and checkpoints. The versions that it published stay."""
    with connect(start=False) as client:
        confirm(f"Delete {run_id}, its events and checkpoints?", yes)
        client.runs.delete(run_id)
    if as_json:
        print_json({"deleted": run_id})
    note(f"Deleted {run_id}.")


@app.command()
def follow(run_id: RunId, as_json: JsonEvents = False) -> None:
    """Watch a run until it ends. Ctrl-C stops watching, not the run."""
    with connect(start=False) as client:
        watch(client, client.runs.get(run_id), as_json=as_json)


@app.command()
def logs(run_id: RunId, as_json: JsonEvents = False) -> None:
    """What has happened in a run, and the lines of its worker's log, where this machine's stack has it."""
    from rich.console import Console

    from foundry.cli.progress import RunView

    with connect(start=False) as client:
        run = client.runs.get(run_id)
        with RunView(run["spec"]["name"], Console(force_terminal=False)) as view:
            for event in client.runs.events(run_id, follow=False):
                print_event(event) if as_json else view.show(event)
    for line in _worker_log(run_id):
        print_event({"type": "log", "line": line}) if as_json else print(line)
    if run["job"]:
        note(f"Its worker's log is in Kubernetes:  kubectl logs job/{run['job']} --all-containers")


@app.command()
def export(
    run_id: RunId,
    path: Annotated[Path, typer.Argument(help="The parquet file to be written.")],
    part: Annotated[
        str,
        typer.Option(
            help="train: the written answers that it trains on; prompts: what the cartridge was asked; heldout: what "
            "it was measured with."
        ),
    ] = "train",
    as_json: Json = False,
) -> None:
    """Write a run's data set to a parquet file: prompt and completion as messages, and their token ids."""
    from foundry import extras
    from foundry.formats import conversations

    extras.require("data", extras.DATA)
    if part not in conversations.PARTS:
        raise InvalidArgument(f"{part!r:.100} is no part: expected {', '.join(conversations.PARTS)}", field="part")
    with connect(start=False) as client:
        mode = client.runs.get(run_id)["spec"].get("mode")
        if part == "train" and mode == "on":
            raise InvalidArgument(
                f"{run_id} has mode on: the cartridge answered itself at every step, and such answers are not kept. "
                "--part prompts has what it was asked",
                field="run_id",
            )
        found = client.runs.dataset(run_id)
        about = {"run": run_id, **{key: found[key] for key in ("dataset", "digest", "model_fingerprint")}, "part": part}
        if part != "prompts" and not found["model_fingerprint"]:
            note("Its trainer did not say of which model the tokens are: completions are empty but for their ids.")
        rows = client.runs.dataset_rows(run_id)
        num_rows = conversations.write(rows, path, part, digest=found["digest"], about=about)  # type: ignore[arg-type]
    if as_json:
        print_json({**about, "path": str(path), "rows": num_rows})
    note(f"{num_rows} conversations of {run_id} are in {path}.")


def _worker_log(run_id: str) -> Iterator[str]:
    from foundry.local.home import Home
    from foundry.local.log_files import earlier

    log = Home().log_file("trainer")
    for path in (earlier(log), log):
        if path.is_file():
            with path.open(errors="replace") as lines:
                yield from (line.rstrip("\n") for line in lines if run_id in line)


def watch(client: Foundry, run: RunJson, *, as_json: bool = False) -> None:
    """Show a run's events until it ends. Raises FoundryError if it failed; Ctrl-C leaves it going."""
    run_id, name = run["id"], run["spec"]["name"]
    finished: Mapping[str, Any] = {}
    try:
        for event in _shown(client, run_id, name, as_json=as_json):
            finished = event
    except KeyboardInterrupt:
        note(
            f"\n{run_id} goes on. Watch it:  foundry runs follow {run_id}\n{' ' * len(run_id)}    End it:  "
            f"foundry runs cancel {run_id}"
        )
        raise typer.Exit(INTERRUPTED) from None
    if finished.get("state") == "failed":
        raise FoundryError(f"{run_id} failed: {finished['error']}")
    note(f"{run_id} {finished.get('state', 'ended')}.")
    if (result := finished.get("result")) and not as_json:
        print(f"{name}@{result['version']}  {result['digest']}")


def _shown(client: Foundry, run_id: str, name: str, *, as_json: bool) -> Iterator[Mapping[str, Any]]:
    """Its events, once they are on the terminal: with -q none are shown."""
    from rich.console import Console

    from foundry.cli.progress import RunView

    if as_json or quiet():
        for event in client.runs.events(run_id):
            if as_json:
                print_event(event)
            yield event
        return
    with RunView(name, Console(stderr=True)) as view:
        for event in client.runs.events(run_id):
            view.show(event)
            yield event


def _answer(run: RunJson, as_json: bool, said: str) -> None:
    if as_json:
        print_json(run)
    note(said)


def _steps(run: RunJson) -> str:
    step = (run["result"] or run["last_event"] or {}).get("step", 0)
    return f"{step}/{run['spec']['num_steps']}"


def _heldout(run: RunJson) -> str:
    result = run["result"] or {}
    if result.get("heldout_kl_last") is None:
        return ""
    return f"{result['heldout_kl_first']:.3f} → {result['heldout_kl_last']:.3f}"
