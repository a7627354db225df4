"""Prompts in parquet, as data sets of others have them."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from foundry.cli import prompt_files
from foundry.cli.prompt_files import parquet_lines
from foundry.errors import DocumentUnreadable, InvalidArgument
from foundry.selfstudy.prompts import read_lines
from tests.unit.cli.command import refused

ASKED = [{"role": "user", "content": "Was ist offen?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "Der Hafen."}]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_verls_rows_are_prompts(tmp_path: Path) -> None:
    digests = ["blake3:" + digit * 64 for digit in "12"]
    rows: list[dict[str, Any]] = [
        {
            "data_source": "handbook",
            "prompt": ASKED,
            "document": None,
            "ability": "qa",
            "reward_model": {"style": "rule", "ground_truth": "harbour"},
            # With what JSON has no form for.
            "extra_info": {"index": 7, "document": digests[0], "made": datetime.date(2026, 1, 1)},
            "raw": b"\xff",
        },
        {"data_source": "handbook", "prompt": ASKED, "document": digests[1], "extra_info": {"index": 8}},
        {"data_source": "handbook", "prompt": ASKED},
    ]
    lines = read_lines(parquet_lines(written(tmp_path / "rows.parquet", rows)), field="prompts")
    assert [line.messages for line in lines] == [ASKED] * 3
    assert [line.document for line in lines] == [*digests, None]


@pytest.mark.parametrize("rows", [[{"messages": ANSWERED}] * 2, [{"prompt": "Was ist offen?"}] * 2])
def test_chats_and_texts_are_prompts(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    text = parquet_lines(written(tmp_path / "rows.parquet", rows))
    assert [line.messages for line in read_lines(text, field="prompts")] == [ASKED] * 2
    assert "ä" in parquet_lines(written(tmp_path / "a.parquet", [{"prompt": "ä"}]))


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"messages": ANSWERED}, ANSWERED[-1]["content"]),
        ({"prompt": ASKED, "completion": ANSWERED[-1:]}, ANSWERED[-1]["content"]),
        ({"prompt": "What?", "completion": "That."}, "That."),
        ({"prompt": ANSWERED}, ""),
        ({"messages": ASKED}, ""),
    ],
)
def test_what_was_answered_is_known(row: dict[str, Any], answer: str, tmp_path: Path) -> None:
    (line,) = read_lines(parquet_lines(written(tmp_path / "rows.parquet", [row])), field="prompts")
    assert line.answer == answer


@pytest.mark.parametrize("completion", [7, [], [7], {"role": "assistant"}, [{"role": "assistant", "content": 7}], None])
def test_what_is_no_answer_is_none(completion: Any) -> None:
    (line,) = read_lines(json.dumps({"prompt": "What?", "completion": completion}), field="prompts")
    assert line.answer == ""


def research_rows() -> pyarrow.Table:
    """Self-study as the research library keeps it: each message with its tokens and their likeliest successors."""
    likeliest = pyarrow.struct(
        [
            ("token_idx", pyarrow.list_(pyarrow.int32())),
            ("token_id", pyarrow.list_(pyarrow.int32())),
            ("logprobs", pyarrow.list_(pyarrow.float32())),
            ("shape", pyarrow.list_(pyarrow.int32())),
        ]
    )
    message = pyarrow.struct(
        [
            ("content", pyarrow.string()),
            ("role", pyarrow.string()),
            ("token_ids", pyarrow.list_(pyarrow.int32())),
            ("top_logprobs", likeliest),
        ]
    )
    schema = pyarrow.schema(
        [
            ("messages", pyarrow.list_(message)),
            ("system_prompt", pyarrow.string()),
            ("metadata", pyarrow.string()),
            ("type", pyarrow.string()),
        ]
    )
    # With counts that don't fit each other, and numbers that JSON has no word for.
    scored = {"token_idx": [0, 0, 7], "token_id": [5], "logprobs": [float("-inf"), float("nan")], "shape": [2**31 - 1]}
    answer = {**ANSWERED[1], "token_ids": list(range(50_000)), "top_logprobs": scored}
    row = {
        "messages": [{**ASKED[0], "token_ids": [3]}, answer],
        "system_prompt": "A chunk of the document.",
        "type": "x",
    }
    return pyarrow.Table.from_pylist([row] * 3, schema=schema)


@pytest.mark.parametrize("nested_names", [True, False])
def test_self_study_of_the_research_library_is_prompts(tmp_path: Path, nested_names: bool) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(research_rows(), path, use_compliant_nested_type=nested_names)
    text = parquet_lines(path)
    assert [line.messages for line in read_lines(text, field="prompts")] == [ASKED] * 3
    # Nothing of what the file has of each token.
    assert len(text) < 1000


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("The harbour is open. " * 20)
    for name in ("dataset.pkl", "dataset.PICKLE"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
        for role in ("--prompts", "--heldout"):
            said = refused("train", str(tmp_path / "a.md"), "--name", "x", role, str(tmp_path / name))
            assert "is a pickle, which is not read here" in said
    assert not (tmp_path / "ran").exists()


def test_rows_come_in_order_however_many(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": str(number)} for number in range(3000)]
    text = parquet_lines(written(tmp_path / "rows.parquet", rows))
    assert [json.loads(line) for line in text.splitlines()] == rows


def test_what_holds_no_prompts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgument, match='line 1 has no "prompt"'):
        read_lines(parquet_lines(written(tmp_path / "a.parquet", [{"question": "a"}])), field="prompts")
    (tmp_path / "b.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    for name in ("b.parquet", "absent.parquet"):
        with pytest.raises(DocumentUnreadable, match="is no parquet file of prompts"):
            parquet_lines(tmp_path / name)
    with pytest.raises(DocumentUnreadable, match="not JSON serializable"):
        parquet_lines(written(tmp_path / "c.parquet", [{"prompt": b"bytes"}]))
    monkeypatch.setattr(prompt_files, "MAX_PROMPTS", 2)
    with pytest.raises(InvalidArgument, match="more than 2 prompts"):
        parquet_lines(written(tmp_path / "d.parquet", [{"prompt": "a"}] * 3))
