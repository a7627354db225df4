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
