"""Threads for each service where four processes share a few cores: python -m benchmarks.threads

`foundry up`'s own stack trains the demo's document by the quick recipe's on-policy steps, with each number of threads
for rollout, teacher and trainer, strictly one after the other (`max_staleness` 0) and overlapped (1). Both numbers of
threads run for every `max_staleness`, one after the other, again and again; what is reported are medians over all
steps but each run's first: seconds of the stages, and between the ends of steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from examples.demo import DOCUMENT, processor
from foundry.client import FoundryClient
from foundry.local import layout
from foundry.local.demo_model import resolve_model
from foundry.local.stack import LocalStack


def steps_of(client: FoundryClient, num_steps: int, max_staleness: int) -> list[dict[str, Any]]:
    """Events of a run's steps, each with the seconds since the one before."""
    document = client.documents.create(DOCUMENT.read_text(), title="handbook")
    run = client.runs.create(
        name=f"threads-{max_staleness}",
        document=document["digest"],
        recipe="quick",
        mode="on",
        init="first_tokens",
        general_share=0,
        heldout_every=0,
        num_steps=num_steps,
        **({"max_staleness": max_staleness} if max_staleness else {}),
    )
    steps: list[dict[str, Any]] = []
    ended_at = 0.0
    for event in client.runs.events(run["id"]):
        if event["type"] == "step":
            now = time.perf_counter()
            steps.append(event["seconds"] | {"between": now - ended_at})
            ended_at = now
    ended = client.runs.get(run["id"])
    if ended["state"] != "succeeded":
        raise SystemExit(f"the run {ended['state']}: {ended['error']}")
    return steps[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, layout.num_cores()])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "threads.json")
    arguments = parser.parse_args()
    model = str(resolve_model("demo"))
    steps: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for _ in range(arguments.repeats):
        for threads in arguments.threads:
            with (
                # What the stack gives each of its services.
                patch.object(layout, "num_cores", return_value=threads),
                tempfile.TemporaryDirectory() as directory,
                LocalStack(Path(directory), model) as stack,
                FoundryClient(stack.url) as client,
            ):
                for max_staleness in arguments.staleness:
                    steps[max_staleness, threads] += steps_of(client, arguments.steps, max_staleness)
    rows = [
        {"max_staleness": max_staleness, "threads": threads, "steps": len(found)}
        | {name: round(statistics.median(step[name] for step in found), 2) for name in found[0]}
        for (max_staleness, threads), found in sorted(steps.items())
    ]
    print("".join(f"{name:>15}" for name in rows[0]))
    for row in rows:
        print("".join(f"{value:15}" for value in row.values()))
    arguments.result.write_text(json.dumps({"processor": processor(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
