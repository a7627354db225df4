"""The chart's list of who may speak to whom, and the chart without one of them."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import yaml

from tests.deploy.chart import CHART

Flow = dict[str, Any]
_LIST = Path("files") / "flows.yaml"
FLOWS: list[Flow] = yaml.safe_load((CHART / _LIST).read_text())


def name(flow: Flow) -> str:
    return f"{flow['from']}-{flow['to']}"


def chart_without(flow: Flow, directory: Path) -> Path:
    """A copy of the chart in `directory` whose list lacks `flow`."""
    chart = directory / CHART.name
    copytree(CHART, chart, dirs_exist_ok=True)
    (chart / _LIST).write_text(yaml.safe_dump([other for other in FLOWS if other != flow]))
    return chart
