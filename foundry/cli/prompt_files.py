"""Files of prompts as the services take them: JSON lines, whatever they were kept in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foundry import extras
from foundry.errors import DocumentUnreadable, InvalidArgument
from foundry.selfstudy.prompts import MAX_PROMPTS

# What of a row is read, by its place in the file: data sets have much more, such as the ids and logprobs of every token
# of a message in those of the research library. Between a list and its parts Parquet has names that writers choose.
_READ = re.compile(
    r"(prompt|messages|completion)(\.[^.]+\.[^.]+\.(role|content))?|document|extra_info\.document",
)
_PICKLES = frozenset({".pkl", ".pickle"})
_BATCH_ROWS = 1024


def parquet_lines(file: Path) -> str:
    """The rows of a parquet file as JSON lines: `prompt` or `messages`, `completion`, and what document a row is about.

    Raises ExtraMissing, DocumentUnreadable, InvalidArgument for more rows than a file of prompts may have.
    """
    extras.require("data", extras.DATA)
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        if table.metadata.num_rows > MAX_PROMPTS:
            raise InvalidArgument(f"{file} has more than {MAX_PROMPTS} prompts", field=str(file))
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in _rows(table))
    except (pyarrow.ArrowException, OSError, TypeError, ValueError) as error:
        # Whatever Arrow raises of a file that is none, or of a value that JSON has no form for.
        said = " ".join(str(error).split())[:300]
        raise DocumentUnreadable(f"{file} is no parquet file of prompts: {said}", field=str(file)) from error


def refuse_pickle(file: Path) -> None:
    """Raises InvalidArgument: whoever loads a pickle runs what its writer wants."""
    if file.suffix.lower() in _PICKLES:
        raise InvalidArgument(
            f"{file} is a pickle, which is not read here: write its conversations as parquet with messages, where you "
            "trust the file",
            field=str(file),
        )


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    places = [table.schema.column(number).path for number in range(len(table.schema))]
    columns = [place for place in places if _READ.fullmatch(place)]
    for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
        for row in batch.to_pylist():
            extra = row.pop("extra_info", None)
            # The rest of it is the reward's, and may be what JSON has no form for.
            about = row.get("document") or (extra.get("document") if isinstance(extra, dict) else None)
            yield {name: value for name, value in row.items() if value is not None} | (
                {"document": about} if about else {}
            )
