"""A small run on a tiny model for end-to-end tests, and its step events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from foundry.errors import StoreUnavailable
from foundry.store import CartridgeStore, DocumentPrompts, RunSpec, RunState
from tests.process import Process
from tests.services import Stack, wait_serving

STEPS, CHECKPOINT_EVERY = 7, 3
DOCUMENT = "The harbour is open again. The treaty was signed in the spring. The price of grain is twelve. " * 2
QUESTIONS = ("What is open?", "When was the treaty signed?", "What is the price of grain?", "Who signed?", "Why?")


def start_trainer(stack: Stack) -> tuple[Process, Process, Process]:
    """Rollout, teacher and trainer, serving."""
    rollout, teacher = start_servers(stack)
    trainer = spawn_trainer(stack, rollout, teacher)
    wait_serving(trainer)
    return rollout, teacher, trainer


def start_servers(stack: Stack) -> tuple[Process, Process]:
    """Rollout and teacher, serving."""
    rollout = stack.rollout()
    teacher = stack.spawn("teacher", "--model", str(stack.model))
    for process in (rollout, teacher):
        wait_serving(process)
    return rollout, teacher


def spawn_trainer(stack: Stack, rollout: Process, teacher: Process, *arguments: str, module: str = "") -> Process:
    return stack.spawn(
        "trainer",
        *("--model", str(stack.model), "--rollout-addresses", rollout.address, "--teacher-address", teacher.address),
        *("--lease-seconds", "1", *arguments),
        module=module,
    )


async def create_run(store: CartridgeStore, name: str, **changes: Any) -> str:
    prompts = "\n".join(json.dumps({"prompt": question}) for question in QUESTIONS)
    settings: dict[str, Any] = {
        "document": await store.documents.put(DOCUMENT),
        "num_tokens": 20,
        "num_steps": STEPS,
        "batch_size": 3,
        "max_new_tokens": 10,
        "prompts": DocumentPrompts(digest=await store.documents.put(prompts)),
        "learning_rate": 0.02,
        "heldout_every": 0,
        "checkpoint_every": CHECKPOINT_EVERY,
        "policy_mismatch_threshold": 1e-5,
        "seed": 4,
    }
    return await store.runs.create(RunSpec(name=name, **(settings | changes)))


async def step_events(store: CartridgeStore, run_id: str, *, follow: bool = True) -> AsyncIterator[dict[str, Any]]:
    """Steps as they are reported, or those that were; fails unless the run succeeds."""
    async for _, event in store.runs.events(run_id, follow=follow):
        if event["type"] == "step":
            yield event
        elif event["type"] == "finished":
            assert event["state"] == RunState.SUCCEEDED, event


async def follow(store: CartridgeStore, run_id: str) -> AsyncIterator[dict[str, Any]]:
    """Events of a run until it has ended, past outages of Redis; what only a lost Redis knew is left out."""
    after, over = "0-0", False
    while not over:
        try:
            async for event_id, event in store.runs.events(run_id, after):
                # Ids are times: those of an emptied Redis come after all that was before.
                after, over = event_id, event["type"] == "finished"
                yield event
        except StoreUnavailable:
            await asyncio.sleep(0.02)


def numbers(event: dict[str, Any]) -> dict[str, Any]:
    """What a run computes; times and addresses are the machine's, attempts and versions depend on what was lost."""
    others = ("seconds", "version", "attempt", "policy_mismatch_by_server")
    return {key: value for key, value in event.items() if key not in others}
