"""A run's conversations as parquet, which `datasets` and TRL load: prompt and completion as messages, and their ids.

https://huggingface.co/docs/trl/dataset_formats has the columns `prompt` and `completion`; the others are ours.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

from foundry import extras
from foundry.errors import DigestMismatch, InvalidArgument
from foundry.store.conversations import ContentDigest, parts_of

# What is trained on, what the policy is asked, what is never trained on.
Part = Literal["train", "prompts", "heldout"]
PARTS: tuple[str, ...] = get_args(Part)
_HELDOUT = ("heldout", "general-heldout")
# A row group is as many conversations, or fewer that have as many tokens: all that is held at a time.
_GROUP_ROWS = 1024
_GROUP_TOKENS = 2**20


def write(rows: Iterable[Mapping[str, Any]], path: Path, part: Part, *, digest: str, about: Mapping[str, str]) -> int:
    """Write the rows of a part to a new file, of all rows of a data set as the gateway gives them; how many they are.

    All are read and hashed; unless they hash to `digest` no file is left. `about` goes into the file's metadata.
    Raises ExtraMissing, InvalidArgument, DigestMismatch.
    """
    extras.require("data", extras.DATA)
    from pyarrow import parquet

    if path.exists():
        raise InvalidArgument(f"{path} is there already", field="path")
    content, schema = ContentDigest(), _schema(part, about)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    num_rows = 0
    try:
        with parquet.ParquetWriter(beside, schema) as file:
            for group in _groups(_chosen(rows, part, content)):
                file.write_batch(_batch(group, schema))
                num_rows += len(group)
        if content.value != digest:
            raise DigestMismatch(f"the rows hash to {content.value}, the data set's record says {digest}")
        if not num_rows:
            raise InvalidArgument(f"the data set has no conversations to {part}", field="part")
        # A renaming alone would take another file's place.
        path.touch(exist_ok=False)
        os.replace(beside, path)
    except FileExistsError as error:
        raise InvalidArgument(f"{path} is there already", field="path") from error
    finally:
        with suppress(FileNotFoundError):
            beside.unlink()
    return num_rows


def _chosen(rows: Iterable[Mapping[str, Any]], part: Part, content: ContentDigest) -> Iterator[Mapping[str, Any]]:
    for row in rows:
        content.add([row])
        if _part_of(row["part"]) == part:
            yield row


def _part_of(shards: str) -> Part:
    if shards in _HELDOUT:
        return "heldout"
    return "prompts" if shards == parts_of(())[1] else "train"


def _groups(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    group: list[Mapping[str, Any]] = []
    num_tokens = 0
    for row in rows:
        group.append(row)
        num_tokens += len(row["turn_ids"]) + len(row["answer_ids"])
        if len(group) == _GROUP_ROWS or num_tokens >= _GROUP_TOKENS:
            yield group
            group, num_tokens = [], 0
    if group:
        yield group


def _schema(part: Part, about: Mapping[str, str]) -> Any:
    import pyarrow

    messages = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    ids = pyarrow.list_(pyarrow.int32())
    answered = [("completion", messages), ("completion_ids", ids), ("logprobs", pyarrow.list_(pyarrow.float32()))]
    columns = [
        *(("prompt", messages), ("prompt_ids", ids)),
        *(answered if part != "prompts" else ()),
        *((name, pyarrow.string()) for name in ("family", "kind", "author", "context")),
        *(("passage", pyarrow.int32()), ("truncated", pyarrow.bool_())),
    ]
    return pyarrow.schema(columns, metadata={f"foundry.{key}": value for key, value in about.items()})


def _batch(group: list[Mapping[str, Any]], schema: Any) -> Any:
    import pyarrow

    found = [
        {
            **{name: row[name] for name in ("family", "kind", "author", "context", "passage", "truncated")},
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "prompt_ids": row["turn_ids"],
            "completion": None if row["answer"] is None else [{"role": "assistant", "content": row["answer"]}],
            "completion_ids": row["answer_ids"],
            "logprobs": row["logprobs"],
        }
        for row in group
    ]
    return pyarrow.RecordBatch.from_pylist(found, schema=schema)
