"""Files of prompts as the services take them: JSON lines, whatever they were kept in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foundry import extras
from foundry.errors import DocumentUnreadable, InvalidArgument
from foundry.selfstudy.prompts import MAX_PROMPTS

# What of a row is read; data sets have many more columns, some of them large.
_COLUMNS = ("prompt", "messages", "document", "extra_info")
_BATCH_ROWS = 1024


def parquet_lines(file: Path) -> str:
    """The rows of a parquet file as JSON lines: `prompt` or `messages`, and which document a row is about.

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


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    columns = [name for name in _COLUMNS if name in table.schema_arrow.names]
    for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
        for row in batch.to_pylist():
            extra = row.pop("extra_info", None)
            # The rest of it is the reward's, and may be what JSON has no form for.
            about = row.get("document") or (extra.get("document") if isinstance(extra, dict) else None)
            yield {name: value for name, value in row.items() if value is not None} | (
                {"document": about} if about else {}
            )
