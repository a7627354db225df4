"""Runs that begin, end or read otherwise than most: every one gives a good cartridge or says what is wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from foundry.recipes import choose
from foundry.store import CartridgeStore, DocumentPrompts, RunRecord, RunRequest
from tests.e2e.training import DOCUMENT, QUESTIONS, create_run, follow, start_trainer
from tests.services import Stack

OTHER = "The lighthouse is closed. The keeper has gone to the mountains. Nobody knows when the ferry will sail. " * 2
DOCUMENTS = {
    "one sentence": "The harbour of Port Lune is open again since the second day of May.",
    "table": "name,price\n" + "".join(f"grain {number},{number * 3}\n" for number in range(30)),
    "code": "def price(grain):\n    if grain is None:\n        return 12\n    return grain.weight * 3\n" * 3,
    "JSON": json.dumps([{"name": f"grain {number}", "price": number * 3} for number in range(12)]),
    "one word": "harbour " * 60,
    "Arabic": "الميناء مفتوح مرة أخرى. تم توقيع المعاهدة في الربيع. ما هو سعر الحبوب؟ إنه اثنا عشر.",
    "Chinese": "港口又开放了。条约是在春天签署的。粮食的价格是多少？是十二。",
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = Stack(tmp_path_factory.mktemp("odd"))
    asyncio.run(stack.valkey.start())
    start_trainer(stack)
    yield stack
    stack.close()


class Ended:
    """A run that is over, and what happened in it."""

    def __init__(self, record: RunRecord, events: list[dict[str, Any]]) -> None:
        self.record, self.result, self.events = record, dict(record.result or {}), events

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == kind]


async def see_through(store: CartridgeStore, run_id: str) -> Ended:
    events = [event async for event in follow(store, run_id)]
    return Ended(await store.runs.get(run_id), events)


def run(stack: Stack, name: str, **changes: Any) -> Ended:
    async def go(store: CartridgeStore) -> Ended:
        return await see_through(store, await create_run(store, name, **changes))

    return stack.with_store(go)


def test_a_run_without_steps_publishes_its_start_and_measures_it(stack: Stack) -> None:
    ended = run(stack, "start-only", num_steps=0)
    assert ended.record.state == "succeeded"
    assert (ended.result["step"], ended.result["version"], len(ended.of("heldout"))) == (0, 1, 1)
    assert ended.result["best"]["step"] == 0


@pytest.mark.parametrize("init", ["compact", "first_tokens", "random"])
def test_a_start_stands_in_the_manifest(stack: Stack, init: str) -> None:
    ended = run(stack, f"init-{init.replace('_', '-')}", num_steps=0, init=init)

    async def manifest(store: CartridgeStore) -> str:
        return (await store.manifest(ended.record.spec.name, 1)).init

    assert stack.with_store(manifest).startswith(init)


def test_a_warm_start_is_that_version_also_for_another_document(stack: Stack) -> None:
    first = run(stack, "warm")

    async def go(store: CartridgeStore) -> tuple[Ended, str]:
        document = await store.documents.put(OTHER)
        changes: dict[str, Any] = {"init": "version", "init_version": "warm", "document": document, "num_steps": 1}
        ended = await see_through(store, await create_run(store, "warmer", **changes))
        return ended, (await store.manifest("warmer", 1)).digest

    ended, digest = stack.with_store(go)
    assert ended.record.state == "succeeded"
    assert digest == first.result["digest"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_version": "nobody"}, "CARTRIDGE_NOT_FOUND"),
        ({"init_version": "short"}, "has 16 tokens, the run asks for 20"),
        ({"init_version": "no@@reference"}, "INVALID_ARGUMENT"),
    ],
)
def test_what_is_no_warm_start_is_said(stack: Stack, changes: dict[str, Any], message: str) -> None:
    if changes["init_version"] == "short":
        run(stack, "short", num_steps=0, num_tokens=16)
    ended = run(stack, "cold", init="version", **changes)
    assert ended.record.state == "failed"
    assert message in (ended.record.error or "")


def test_another_text_may_be_the_start(stack: Stack) -> None:
    async def go(store: CartridgeStore) -> Ended:
        text = await store.documents.put(OTHER)
        return await see_through(store, await create_run(store, "texted", init="text", init_text=text, num_steps=1))

    assert stack.with_store(go).record.state == "succeeded"


def test_the_best_version_is_tagged_and_served(stack: Stack) -> None:
    # A rate at which it gets worse and worse.
    ended = run(stack, "worse", learning_rate=10.0, heldout_every=1, num_steps=6, patience=3)
    kls = [event["kl"] for event in ended.of("heldout")]
    best = min(range(len(kls)), key=kls.__getitem__)
    assert best < len(kls) - 1
    # It ended when three in a row were no better.
    assert len(kls) - 1 == best + 3
    assert ended.result["step"] == len(kls) - 1
    assert ended.result["best"]["step"] == best
    assert ended.result["best"]["kl"] == kls[best]

    async def served(store: CartridgeStore) -> tuple[str, str, int]:
        latest, tagged = await store.resolve("worse"), await store.resolve("worse@best")
        return latest.digest, tagged.digest, latest.version

    latest, tagged, version = stack.with_store(served)
    assert latest == tagged == ended.result["digest"] == ended.result["best"]["policy"]["digest"]
    # A version of its own, behind the last step's.
    assert version == ended.result["version"] == len(kls) + 1


def test_general_prompts_are_trained_on_and_measured(stack: Stack) -> None:
    ended = run(stack, "general", mode="hybrid", general_share=0.34, heldout_every=0, max_new_tokens=6)
    assert ended.record.state == "succeeded"
    kls = [event["general_kl"] for event in ended.of("heldout")]
    assert all(kl > 0 for kl in kls)
    (dataset,) = ended.of("dataset")
    assert dataset["families"]["general"]["conversations"] == 7
    assert dataset["families"]["general-heldout"]["conversations"] == 8


def test_one_cartridge_for_two_documents(stack: Stack) -> None:
    questions = [
        "What is open?",
        "Who has gone?",
        "When will the ferry sail?",
        "What is the price?",
        "Why is it closed?",
    ]

    async def go(store: CartridgeStore) -> Ended:
        documents = [await store.documents.put(text) for text in (DOCUMENT, OTHER)]
        lines = [
            json.dumps({"prompt": question, "document": documents[place % 2]})
            for place, question in enumerate(questions)
        ]
        prompts = {"kind": "document", "digest": await store.documents.put("\n".join(lines))}
        changes: dict[str, Any] = {"document": documents[0], "more_documents": documents[1:], "prompts": prompts}
        run_id = await create_run(store, "both", **changes, num_tokens=40, num_steps=30, batch_size=4, mode="hybrid")
        return await see_through(store, run_id)

    ended = stack.with_store(go)
    assert ended.record.state == "succeeded", ended.record.error
    kls = [event["kl"] for event in ended.of("heldout")]
    assert kls[-1] < kls[0], kls


def quick(stack: Stack, text: str) -> Ended:
    """By the quick recipe, as short as it can be, with a file of prompts: the tiny model has no room for self-study."""

    async def go(store: CartridgeStore) -> Ended:
        lines = "\n".join(json.dumps({"prompt": question}) for question in QUESTIONS)
        prompts = DocumentPrompts(digest=await store.documents.put(lines))
        request = RunRequest(
            name="odd",
            document=await store.documents.put(text),
            recipe="quick",
            num_steps=2,
            batch_size=6,
            max_new_tokens=8,
            general_share=0,
            prompts=prompts,
        )
        return await see_through(store, await store.runs.create(choose(request, len(text) // 3)))

    return stack.with_store(go)


@pytest.mark.parametrize("text", DOCUMENTS.values(), ids=DOCUMENTS)
def test_a_document_may_be_of_any_kind(stack: Stack, text: str) -> None:
    ended = quick(stack, text)
    assert ended.record.state == "succeeded", ended.record.error
    (dataset,) = ended.of("dataset")
    assert any(family in dataset["families"] for family in ("recite", "quote", "blank"))


@pytest.mark.parametrize(
    ("text", "num_tokens", "message"),
    [
        ("The harbour is open.", 100, "CARTRIDGE_TOO_LONG"),
        ("The harbour is open again. " * 200, 20, "Cut it into"),
    ],
)
def test_what_can_be_no_cartridge_is_said(stack: Stack, text: str, num_tokens: int, message: str) -> None:
    async def go(store: CartridgeStore) -> Ended:
        document = await store.documents.put(text)
        return await see_through(store, await create_run(store, "never", document=document, num_tokens=num_tokens))

    ended = stack.with_store(go)
    assert ended.record.state == "failed"
    assert message in (ended.record.error or "")
