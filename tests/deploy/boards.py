"""The dashboards as Grafana reads them: panels, queries, and what it puts in for variables."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.grafana import make_dashboards

Json = dict[str, Any]
BOARDS: dict[str, Json] = {
    name.removesuffix(".json"): json.loads((make_dashboards.DIRECTORY / name).read_text())
    for name in make_dashboards.DASHBOARDS
}


@dataclass(frozen=True)
class Query:
    board: str
    panel: str
    expression: str

    def __str__(self) -> str:
        return f"{self.board} / {self.panel}: {self.expression}"


def panels(board: Json) -> list[Json]:
    """All but the rows."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries(name: str) -> list[Query]:
    return [
        Query(name, panel["title"], target["expr"]) for panel in panels(BOARDS[name]) for target in panel["targets"]
    ]


QUERIES = [query for name in BOARDS for query in queries(name)]


def filled(text: str, values: Mapping[str, str]) -> str:
    """`text` with variables replaced. A variable without a value is an error, as it is in Grafana."""
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], text)


def one_of(values: Sequence[str]) -> str:
    """What Grafana puts in for several chosen values: a regular expression inside of a string."""
    escaped = [re.sub(r"([\\$^*{}\[\]'+?.()|])", r"\\\\\1", value) for value in values]
    return f"({'|'.join(escaped)})" if len(escaped) > 1 else escaped[0]
