"""A run's data set: read by REST, by the client, and written to parquet by the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from foundry.errors import DigestMismatch, FingerprintMismatch, InvalidArgument, NotFound
from foundry.formats import conversations
from foundry.store import CartridgeStore, DatasetSummary, RunState
from foundry.store.conversations import ContentDigest
from tests.contract.gateway_routes.site import Site
from tests.contract.gateway_routes.test_command_line import Foundry, foundry
from tests.store_data import run_spec
from tests.tiny import build_tokenizer

__all__ = ["foundry"]
DATASET, CONTEXT = "blake3:" + "d5" * 32, "blake3:" + "c7" * 32
SAID = "The harbour, “Ä”."


def row(family: str, number: int, author: str = "model", **values: Any) -> dict[str, Any]:
    ids = build_tokenizer()(SAID)["input_ids"] if author else []
    return {
        "family": family,
        "kind": "",
        "prompt": f"What is {number}?",
        "passage": number,
        "passage_tokens": 7,
        "turn_ids": [3, number],
        "context": CONTEXT,
        "author": author,
        "answer_ids": ids,
        "logprobs": [-0.1 - number / 7] * len(ids) if author == "model" else [],
        "truncated": False,
    } | values


# Of `cloze` two shards; of the general prompts the last place.
SHARDS = (
    ("heldout", 0, [row("prompts", 1), row("prompts", 2)]),
    ("asked", 0, [row("prompts", 3, author="")]),
    ("recite", 0, [row("recite", number, author="document") for number in range(4, 7)]),
    ("cloze", 0, [row("cloze", 7), row("cloze", 8)]),
    ("cloze", 1, [row("cloze", 9, truncated=True)]),
    ("general", 0, [row("general", 10)]),
    ("general-heldout", 0, [row("general-heldout", 11)]),
)
ROWS = [each for _, _, rows in SHARDS for each in rows]


@dataclass
class Written:
    run_id: str
    digest: str


def written(site: Site, *, dataset: str = DATASET, fingerprint: str | None = None, **spec: Any) -> Written:
    """A run that is over, whose trainer wrote the shards and said so."""
    content = ContentDigest()
    content.add(ROWS)
    of_site = site.stack.cartridge(1).header.model_fingerprint

    async def write(store: CartridgeStore) -> str:
        for family, number, rows in SHARDS:
            await store.datasets.append(dataset, family, number, rows)
        await store.datasets.finish(dataset, DatasetSummary(digest=content.value, families={}))
        settings = {"families": ("recite", "cloze"), "mode": "off", **spec}
        run_id = await store.runs.create(run_spec("exported", **settings))
        claimed = await store.runs.claim_run(run_id, "worker-0", 60, timeout_seconds=10)
        assert claimed is not None
        event = {"type": "dataset", "dataset": dataset, "digest": content.value, "families": {}}
        event |= {"model_fingerprint": of_site if fingerprint is None else fingerprint}
        await store.runs.report(run_id, claimed.attempt, event)
        await store.runs.finish(run_id, claimed.attempt, RunState.SUCCEEDED)
        return run_id

    return Written(site.stack.with_store(write), content.value)


def test_rows_come_in_the_order_of_their_digest(site: Site) -> None:
    run = written(site)
    found = site.client.runs.dataset(run.run_id)
    assert (found["dataset"], found["digest"]) == (DATASET, run.digest)
    rows = list(site.client.runs.dataset_rows(run.run_id))
    assert [{key: each[key] for key in ROWS[0]} for each in map(dict, rows)] == ROWS
    assert [each["part"] for each in rows] == [part for part, _, some in SHARDS for _ in some]
    assert [each["answer"] for each in rows] == [SAID if each["author"] else None for each in ROWS]
    page = site.http("GET", f"/v1/runs/{run.run_id}/dataset/rows?text=false&after=recite-000000").json()
    assert [each["family"] for each in page["data"]] == ["cloze", "cloze"]
    assert {each["answer"] for each in page["data"]} == {None}
    assert page["last_id"] == "cloze-000000"


@pytest.mark.parametrize("after", ["cloze", "../secret-000000", "other-000000", "cloze-99999999999999999999"])
def test_a_page_follows_a_page(site: Site, after: str) -> None:
    run = written(site)
    answer = site.http("GET", f"/v1/runs/{run.run_id}/dataset/rows", params={"after": after})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "after")


def test_without_a_data_set_there_is_none(site: Site) -> None:
    async def create(store: CartridgeStore) -> str:
        return await store.runs.create(run_spec("waiting"))

    run_id = site.stack.with_store(create)
    with pytest.raises(NotFound, match="has no data set"):
        site.client.runs.dataset(run_id)
    site.client.runs.cancel(run_id)
    run = written(site, dataset="blake3:" + "d6" * 32)

    async def delete(store: CartridgeStore) -> None:
        await store.datasets.delete("blake3:" + "d6" * 32)

    site.stack.with_store(delete)
    with pytest.raises(NotFound, match="is not kept any more"):
        list(site.client.runs.dataset_rows(run.run_id))


def test_another_model_does_not_write_their_text(site: Site) -> None:
    run = written(site, fingerprint="blake3:" + "0" * 64)
    with pytest.raises(FingerprintMismatch):
        list(site.client.runs.dataset_rows(run.run_id))


def test_of_an_older_trainer_there_are_ids_without_text(site: Site, foundry: Foundry, tmp_path: Path) -> None:
    run = written(site, fingerprint="")
    assert {each["answer"] for each in site.client.runs.dataset_rows(run.run_id)} == {None}
    said = foundry("runs", "export", run.run_id, str(tmp_path / "a"))
    assert "did not say of which model" in said.stderr
    table = parquet.read_table(tmp_path / "a")
    assert table.column("completion").to_pylist() == [None] * 7
    assert all(table.column("completion_ids").to_pylist())


def test_control_tokens_are_no_text_of_an_answer(site: Site) -> None:
    end = build_tokenizer().eos_token_id
    said = site.stack.cartridge(1).header.model_fingerprint
    rows = [row("recite", 1, answer_ids=[*build_tokenizer()(SAID)["input_ids"], end], logprobs=[])]
    dataset = "blake3:" + "d7" * 32

    async def write(store: CartridgeStore) -> str:
        await store.datasets.append(dataset, "recite", 0, rows)
        await store.datasets.finish(dataset, DatasetSummary(digest=dataset, families={}))
        run_id = await store.runs.create(run_spec("ended", families=("recite",), mode="off"))
        claimed = await store.runs.claim_run(run_id, "worker-0", 60, timeout_seconds=10)
        assert claimed is not None
        event = {"type": "dataset", "dataset": dataset, "digest": dataset, "families": {}, "model_fingerprint": said}
        await store.runs.report(run_id, claimed.attempt, event)
        await store.runs.finish(run_id, claimed.attempt, RunState.SUCCEEDED)
        return run_id

    (found,) = site.client.runs.dataset_rows(site.stack.with_store(write))
    assert (found["answer"], found["answer_ids"][-1]) == (SAID, end)


def test_it_is_exported_as_trl_takes_it(site: Site, foundry: Foundry, tmp_path: Path) -> None:
    run = written(site)
    path = tmp_path / "train.parquet"
    said = json.loads(foundry("runs", "export", run.run_id, str(path), "--json").stdout)
    assert (said["rows"], said["digest"], said["part"]) == (7, run.digest, "train")
    table = parquet.read_table(path)
    trained = [each for each in ROWS if each["family"] in ("recite", "cloze", "general")]
    assert table.column("prompt").to_pylist() == [[{"role": "user", "content": each["prompt"]}] for each in trained]
    assert table.column("completion").to_pylist() == [[{"role": "assistant", "content": SAID}]] * 7
    for column, key in (("prompt_ids", "turn_ids"), ("completion_ids", "answer_ids"), ("truncated", "truncated")):
        assert table.column(column).to_pylist() == [each[key] for each in trained]
    assert table.column("logprobs").type == pyarrow.list_(pyarrow.float32())
    assert table.schema.metadata[b"foundry.digest"].decode() == run.digest
    for part, numbers in (("prompts", [3]), ("heldout", [1, 2, 11])):
        foundry("runs", "export", run.run_id, str(tmp_path / part), "--part", part)
        found = parquet.read_table(tmp_path / part)
        assert [ids[1] for ids in found.column("prompt_ids").to_pylist()] == numbers
        assert ("completion" in found.column_names) == (part == "heldout")
    assert "is there already" in foundry("runs", "export", run.run_id, str(path), status=2).stderr
    assert "is no part" in foundry("runs", "export", run.run_id, str(path), "--part", "all", status=2).stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["heldout", "prompts", "train.parquet"]


def test_what_the_cartridge_answered_itself_is_not_claimed_to_be_there(
    site: Site, foundry: Foundry, tmp_path: Path
) -> None:
    run = written(site, mode="on")
    said = foundry("runs", "export", run.run_id, str(tmp_path / "a"), status=2).stderr
    assert "--part prompts" in said
    assert not list(tmp_path.iterdir())


def given(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**each, "part": "cloze", "answer": SAID} for each in rows]


def test_rows_that_are_not_those_of_the_digest_leave_no_file(tmp_path: Path) -> None:
    content = ContentDigest()
    content.add(ROWS)
    for rows in (ROWS[:-1], ROWS[::-1], [*ROWS, ROWS[0]], [ROWS[0] | {"prompt": "Another?"}, *ROWS[1:]], []):
        with pytest.raises(DigestMismatch):
            conversations.write(given(rows), tmp_path / "a", "train", digest=content.value, about={})
    assert not list(tmp_path.iterdir())
    assert conversations.write(given(ROWS), tmp_path / "a", "train", digest=content.value, about={}) == len(ROWS)
    with pytest.raises(InvalidArgument, match="no conversations to heldout"):
        conversations.write(given(ROWS), tmp_path / "b", "heldout", digest=content.value, about={})
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_row_groups_are_bounded_by_rows_and_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def groups(name: str) -> list[int]:
        content = ContentDigest()
        content.add(ROWS)
        conversations.write(given(ROWS), tmp_path / name, "train", digest=content.value, about={})
        meta = parquet.read_metadata(tmp_path / name)
        return [meta.row_group(number).num_rows for number in range(meta.num_row_groups)]

    assert groups("whole") == [11]
    monkeypatch.setattr(conversations, "_GROUP_ROWS", 4)
    assert groups("by-rows") == [4, 4, 3]
    monkeypatch.setattr(conversations, "_GROUP_TOKENS", 1)
    assert groups("by-tokens") == [1] * 11
