"""The whole loop on this machine: train a cartridge for examples/handbook.md, then ask about it in five ways.

    python examples/demo.py            (or: make demo, which installs first)

It fetches the demo model, starts the local stack, trains a cartridge of a quarter of the document's length by the quick
recipe, first on answers that are written with the document at hand, then on the cartridge's own. It asks the held-out
questions through the gateway without the document, behind the document's first tokens, behind the cartridge untrained
and trained, and with the whole document in the prompt, prints what it measured and writes it to demo-result.json. The
stack is stopped at the end; the cartridge stays in FOUNDRY_HOME.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from foundry.cli.progress import STAGES, RunView
from foundry.client import CartridgeJson, ChatAnswer, EventJson, Foundry, RunJson
from foundry.errors import FoundryError
from foundry.local.demo_model import resolve_model
from foundry.local.layout import num_cores
from foundry.local.stack import LocalStack

HERE = Path(__file__).parent
DOCUMENT, HELDOUT = HERE / "handbook.md", HERE / "handbook.heldout.jsonl"
NAME = "handbook"
NUM_EXAMPLES = 4
# Questions that are asked alone, and those that are then asked together.
NUM_TIMED, NUM_AT_A_TIME = 5, 6
console = Console(highlight=False)


@dataclass(frozen=True)
class Question:
    messages: list[dict[str, str]]
    expected: list[str]

    def is_right(self, answer: str) -> bool:
        return any(expected.casefold() in answer.casefold() for expected in self.expected)


@dataclass
class Way:
    """One way of asking, and the answers in the order of the questions."""

    label: str
    model: str
    system: str | None = None
    answers: list[ChatAnswer] = field(default_factory=list)
    num_right: int = 0
    # Of a document that the servers have never seen.
    cold: ChatAnswer | None = None


@dataclass(frozen=True)
class Trained:
    """A run that succeeded, and its step events."""

    run: RunJson
    result: dict[str, Any]
    steps: Sequence[EventJson]


class Phases:
    """Seconds of each phase, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        # Set by `make demo`, so that the installation counts.
        began = os.environ.get("FOUNDRY_DEMO_BEGAN")
        if began:
            self.seconds["install"] = time.time() - float(began)

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        console.rule(title, align="left", style="bold")
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


def main() -> int:
    options = parse()
    questions = read_questions(options.questions)
    phases = Phases()
    with phases.phase("model", "1  The model"):
        console.print(f"The demo model is in {resolve_model('demo', console.print)}")
    with ExitStack() as cleanup:
        with phases.phase("start", "2  The stack"):
            stack = cleanup.enter_context(LocalStack(options.home, "demo", say=console.print))
            client = cleanup.enter_context(Foundry(stack.url))
            console.print(f"The gateway listens at {stack.url}")
        with phases.phase("training", "3  Training a cartridge"):
            trained = train(client, NAME, options)
            run = trained.run
        with phases.phase("first_tokens", "4  Beside it, the document's first tokens"):
            num_tokens = run["spec"]["num_tokens"]
            start = {"init": "first_tokens", "num_tokens": num_tokens, "num_steps": 0, "general_share": 0}
            first = train(client, f"{NAME}-first", options, **start)
        with phases.phase("questions", "5  The same questions, five ways"):
            reference = f"{NAME}@{trained.result['version']}"
            untrained = f"{NAME}@{trained.steps[0]['version'] - 1}"
            ways = ask(client, questions, untrained, reference, run_id=run["id"], max_tokens=options.max_tokens)
        cartridge = client.cartridges.get(reference)
    result = summarize(phases, trained, first, cartridge, ways, questions)
    options.result.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    show(result, stack.home.objects)
    console.print(f"\nAll figures are in {options.result}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quick", help="where the values come from that are not given here")
    parser.add_argument("--tokens", type=int, help="length of the cartridge")
    parser.add_argument("--reference-tokens", type=int, help="that say what the start keeps")
    parser.add_argument("--steps", type=int, help="optimiser steps")
    parser.add_argument("--off-policy-share", type=float, help="share of steps before its own answers")
    parser.add_argument("--batch-size", type=int, help="prompts per step")
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--questions", type=int, default=16, help="how many of the held-out questions to ask")
    parser.add_argument("--max-tokens", type=int, default=24, help="most tokens of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, help="FOUNDRY_HOME; default: the one that `foundry` uses")
    parser.add_argument("--result", type=Path, default=Path("demo-result.json"), help="where to write the figures")
    return parser.parse_args()


def read_questions(limit: int) -> list[Question]:
    rows = [json.loads(line) for line in HELDOUT.read_text().splitlines()]
    return [Question(row["prompt"], row["expected"]) for row in rows[:limit]]


def train(client: Foundry, name: str, options: argparse.Namespace, **more: Any) -> Trained:
    """Interrupted, the run is cancelled, so that it does not go on later."""
    document = client.documents.create(DOCUMENT.read_bytes(), title=DOCUMENT.name)
    heldout = client.documents.create(HELDOUT.read_bytes(), title=HELDOUT.name)
    given = {
        "num_tokens": options.tokens,
        "reference_tokens": options.reference_tokens,
        "num_steps": options.steps,
        "off_policy_share": options.off_policy_share,
        "batch_size": options.batch_size,
        "learning_rate": options.lr,
    }
    run = client.runs.create(
        name=name,
        document=document["digest"],
        recipe=options.recipe,
        seed=options.seed,
        heldout={"kind": "document", "digest": heldout["digest"]},
        **{key: value for key, value in given.items() if value is not None} | more,
    )
    console.print(f"{run['id']}: {'; '.join(run['chosen'] or [])}")
    steps = []
    try:
        with RunView(name, console) as view:
            for event in client.runs.events(run["id"]):
                view.show(event)
                if event["type"] == "step":
                    steps.append(event)
    except KeyboardInterrupt:
        client.runs.cancel(run["id"])
        raise
    run = client.runs.get(run["id"])
    if run["state"] != "succeeded" or run["result"] is None:
        raise FoundryError(f"the run {run['state']}: {run['error']}")
    return Trained(run, run["result"], steps)


def ask(
    client: Foundry, questions: Sequence[Question], untrained: str, trained: str, *, run_id: str, max_tokens: int
) -> list[Way]:
    base = client.models()[0]["id"]
    ways = [
        Way("no document", base),
        Way("first tokens, untrained", f"{NAME}-first"),
        Way("cartridge, untrained", untrained),
        Way("cartridge", trained),
        Way("whole document", base, system=DOCUMENT.read_text()),
    ]
    for way in ways:
        system = [{"role": "system", "content": way.system}] if way.system else []

        def ask_one(question: Question, way: Way = way, system: list[dict[str, str]] = system) -> ChatAnswer:
            return client.chat(way.model, system + question.messages, max_tokens=max_tokens, temperature=0.0)

        # One by one as long as it takes to know how long a first token takes; then several at a time.
        way.answers += map(ask_one, questions[:NUM_TIMED])
        with ThreadPoolExecutor(NUM_AT_A_TIME) as asking:
            way.answers += asking.map(ask_one, questions[NUM_TIMED:])
        way.num_right = sum(question.is_right(each.text) for question, each in zip(questions, way.answers, strict=True))
        console.print(f"{way.label}: {way.num_right} of {len(questions)} right")
    # Training left this document's KV on the servers; another beginning makes it one that they must read first.
    unseen = {"role": "system", "content": f"{run_id}\n{ways[-1].system}"}
    ways[-1].cold = client.chat(base, [unseen, *questions[0].messages], max_tokens=1, temperature=0.0)
    return ways


def summarize(
    phases: Phases,
    trained: Trained,
    first: Trained,
    cartridge: CartridgeJson,
    ways: Sequence[Way],
    questions: Sequence[Question],
) -> dict[str, Any]:
    run, result, steps, manifest = trained.run, trained.result, trained.steps, cartridge["version"]
    # Behind a cartridge only the turn is sent, so what else a prompt has is the prefix.
    turn_tokens = [answer.prompt_tokens for answer in ways[1].answers]
    return {
        "machine": {
            "name": platform.node(),
            "processor": processor(),
            "cores": num_cores(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "python": platform.python_version(),
        },
        "seconds": {**rounded(phases.seconds), "total": round(sum(phases.seconds.values()), 1)},
        "run": {"id": run["id"], "name": NAME, "spec": run["spec"], "tokens_seen": result["tokens_seen"]},
        # The steps whose answers were there before them have no rollout.
        "seconds_per_step": {
            stage: round(statistics.mean(step["seconds"].get(stage, 0.0) for step in steps), 2)
            for stage in (*STAGES, "total")
        },
        "heldout_kl": {
            "first_tokens": first.result["heldout_kl_first"],
            "first": result["heldout_kl_first"],
            "last": result["heldout_kl_last"],
            "best": result["best"]["kl"],
        },
        "policy_mismatch_kl_max": max(
            (step["policy_mismatch_kl"] for step in steps if step["policy_mismatch_kl"] is not None), default=None
        ),
        "cartridge": {
            "reference": f"{NAME}@{manifest['version']}",
            "digest": manifest["digest"],
            "tokens": manifest["header"]["num_tokens"],
        },
        "ways": [way_figures(way, len(questions), prefix_tokens(way, turn_tokens)) for way in ways],
        "questions": [question.messages[-1]["content"] for question in questions],
    }


def way_figures(way: Way, num_questions: int, num_prefix_tokens: int) -> dict[str, Any]:
    return {
        "label": way.label,
        "right": way.num_right,
        "questions": num_questions,
        "prefix_tokens": num_prefix_tokens,
        "first_token_seconds": {
            "median": round(statistics.median(a.seconds_to_first_token for a in way.answers[:NUM_TIMED]), 3),
            "median_cached_tokens": statistics.median(a.cached_tokens for a in way.answers),
            "cold": round(way.cold.seconds_to_first_token, 3) if way.cold else None,
            "cold_cached_tokens": way.cold.cached_tokens if way.cold else None,
        },
        "answers": [answer.text.strip() for answer in way.answers],
    }


def prefix_tokens(way: Way, turn_tokens: Sequence[int]) -> int:
    """Tokens that the model sees before the turn: the cartridge's, or the document's with its template."""
    if way.system is None:
        return way.answers[0].cartridge_tokens
    return way.answers[0].prompt_tokens - turn_tokens[0]


def show(result: dict[str, Any], objects: Path) -> None:
    """`objects` is where the cartridge is kept."""
    console.rule("6  What came out", align="left", style="bold")
    kl, seconds = result["heldout_kl"], result["seconds"]
    console.print(
        f"Held-out KL to the teacher: first tokens {kl['first_tokens']:.3f}, at step 0 {kl['first']:.3f}, at the end "
        f"{kl['last']:.3f}, at best {kl['best']:.3f} (nats per token)"
    )
    per_step = "  ".join(f"{stage} {value} s" for stage, value in result["seconds_per_step"].items())
    console.print(f"One step, on average: {per_step}")
    spent = "  ".join(f"{phase} {value:.0f} s" for phase, value in seconds.items())
    console.print(f"Time: {spent}  ({result['machine']['cores']} cores, {result['machine']['processor']})\n")

    figures = Table("", "right", "prefix tokens", "first token (median)")
    for way in result["ways"]:
        right, first = f"{way['right']} of {way['questions']}", way["first_token_seconds"]
        figures.add_row(way["label"], right, str(way["prefix_tokens"]), f"{first['median'] * 1000:.0f} ms")
        if first["cold"] is not None:
            figures.add_row("  the first time it is sent", "", "", f"{first['cold'] * 1000:.0f} ms")
    console.print(figures)

    examples = Table("question", *(way["label"] for way in result["ways"]), show_lines=True)
    # Spread over the document, whichever came out well.
    for index in range(0, len(result["questions"]), max(1, len(result["questions"]) // NUM_EXAMPLES)):
        examples.add_row(result["questions"][index], *(way["answers"][index] for way in result["ways"]))
    console.print(examples)

    cartridge = result["cartridge"]
    console.print(
        f"The cartridge {cartridge['reference']} ({cartridge['tokens']} tokens) is kept as {cartridge['digest']}"
    )
    console.print(f"in {objects}\n", soft_wrap=True)
    command = Path(sys.executable).with_name("foundry")
    shown = os.path.relpath(command) if command.is_relative_to(Path.cwd()) else str(command)
    console.print("Next:")
    console.print(f'  {shown} ask {NAME} "{result["questions"][0]}"', soft_wrap=True)
    console.print(f"  {shown} chat {NAME}", soft_wrap=True)
    console.print(f"  {shown} train YOUR.md --name yours", soft_wrap=True)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 1) for key, value in values.items()}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except FoundryError as failure:
        sys.exit(f"error: {failure.message}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. Nothing is left running; 'make demo' starts again.")
