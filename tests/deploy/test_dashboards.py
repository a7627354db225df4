"""The dashboards' files: made from the code, readable, and of metrics and labels that exist."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana import make_dashboards
from docs import make_metrics
from tests.deploy import promql
from tests.deploy.boards import BOARDS, QUERIES, Query, panels
from tests.deploy.prometheus import DIRECTORY

GRAFANA = Path(make_dashboards.__file__).parent / "provisioning"
# Of Prometheus itself, and of every Prometheus client.
OTHERS = {"up", *re.findall(r"`(process_\w+)`", make_metrics.PAGE.read_text())}
# What Prometheus and its operator put on every series, and what histograms have.
TARGET_LABELS = {"namespace", "job", "instance", "pod", "le"}
ROW = re.compile(r"^\| `(?P<name>[\w:]+)` \| (?P<type>\w+) \| (?P<labels>[^|]*) \|", re.MULTILINE)


def named(query: Query) -> str:
    return f"{query.board}-{query.panel}"


def documented() -> dict[str, set[str]]:
    """Labels by the name of each series that docs/metrics.md promises."""
    found: dict[str, set[str]] = {name: set() for name in OTHERS}
    for row in ROW.finditer(make_metrics.PAGE.read_text()):
        labels = set(re.findall(r"`(\w+)`", row["labels"]))
        suffixes = ("_bucket", "_sum", "_count") if row["type"] == "histogram" else ("",)
        found |= {row["name"] + suffix: labels for suffix in suffixes}
    return found


def test_files_are_what_the_code_makes() -> None:
    made = {name: make_dashboards.written(make()) for name, make in make_dashboards.DASHBOARDS.items()}
    assert made == {path.name: path.read_text() for path in make_dashboards.DIRECTORY.iterdir()}


@pytest.mark.parametrize("query", QUERIES, ids=named)
def test_metrics_and_labels_exist(query: Query) -> None:
    names, known = promql.metrics(query.expression), documented()
    assert names
    assert names - known.keys() == set()
    of_these = {label for name in names for label in known[name]}
    assert promql.labels(query.expression) - of_these - TARGET_LABELS == set()


@pytest.mark.parametrize("query", QUERIES, ids=named)
def test_legends_name_labels_that_the_query_keeps(query: Query) -> None:
    """What is summed away shows as nothing in a legend."""
    board = BOARDS[query.board]
    (legend,) = [
        target["legendFormat"]
        for panel in panels(board)
        for target in panel["targets"]
        if (panel["title"], target["expr"]) == (query.panel, query.expression)
    ]
    shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
    aggregated = re.match(
        r"(?:histogram_quantile\([\d.]+, )?(?:sum|max|min|avg|count)\s*(?:by \(([^)]*)\))?", query.expression
    )
    if aggregated:
        assert shown <= set(re.findall(r"\w+", aggregated[1] or "")) - {"le"}
    else:
        names, known = promql.metrics(query.expression), documented()
        assert shown <= TARGET_LABELS | {label for name in names for label in known[name]}


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
class TestBoard:
    def test_every_panel_says_what_it_is(self, board: dict[str, Any]) -> None:
        for panel in panels(board):
            assert panel["title"]
            assert panel["description"].endswith((".", "?")), panel["title"]
            assert "?" in panel["description"], f"{panel['title']} answers no question"
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert panel["targets"], panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}"

    def test_rows_are_questions(self, board: dict[str, Any]) -> None:
        rows = [panel for panel in board["panels"] if panel["type"] == "row"]
        assert rows
        assert [row["title"] for row in rows if not row["title"].endswith("?")] == []

    def test_ids_and_titles_are_unique(self, board: dict[str, Any]) -> None:
        for key in ("id", "title"):
            assert [each for each, count in Counter(panel[key] for panel in board["panels"]).items() if count > 1] == []
        for panel in panels(board):
            letters = [target["refId"] for target in panel["targets"]]
            assert len(set(letters)) == len(letters)

    def test_panels_do_not_overlap(self, board: dict[str, Any]) -> None:
        places = [(panel["title"], panel["gridPos"]) for panel in board["panels"]]
        for _, at in places:
            assert at["x"] + at["w"] <= 24
        overlapping = [
            (a, b)
            for (a, p), (b, q) in combinations(places, 2)
            if p["x"] < q["x"] + q["w"] and q["x"] < p["x"] + p["w"]
            if p["y"] < q["y"] + q["h"] and q["y"] < p["y"] + p["h"]
        ]
        assert overlapping == []

    def test_variables(self, board: dict[str, Any]) -> None:
        variables = {variable["name"]: variable for variable in board["templating"]["list"]}
        assert list(variables) == ["datasource", "namespace", "job", "instance"]
        for name in ("namespace", "job", "instance"):
            # `.+` would leave out what has no such label.
            assert variables[name]["allValue"] == ".*"
            assert variables[name]["includeAll"]


def test_uids_are_stable() -> None:
    assert {name: board["uid"] for name, board in BOARDS.items()} == {
        "training": "foundry-training",
        "serving": "foundry-serving",
        "store-and-fleet": "foundry-store-and-fleet",
    }


def test_queries_keep_to_the_variables() -> None:
    """Every selector is of the chosen namespace, and none has a rate over a fixed time."""
    for query in QUERIES:
        for selector in promql.selectors(query.expression):
            assert 'namespace=~"$namespace"' in selector, query
        ranges = set(re.findall(r"\[([^\]]*)\]", query.expression))
        assert ranges <= {"$__rate_interval", "$__range"} or "last_over_time" in query.expression, query


def test_provisioning_is_of_compose() -> None:
    (source,) = yaml.safe_load((GRAFANA / "datasources" / "prometheus.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "dashboards" / "foundry.yaml").read_text())["providers"]
    assert source["url"] == "http://prometheus:9090"
    assert source["isDefault"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    configuration = yaml.safe_load((DIRECTORY / "prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == configuration["global"]["scrape_interval"]


def test_names_are_read_from_expressions() -> None:
    expression = (
        'histogram_quantile(0.95, sum by (le, stage) (rate(a:b_bucket{x=~"{}|c(",y!="1"}[5m]))) > 1e-5 * '
        "max(d offset 1h) and on (job) group_left (service) e{} unless (f) or vector(0)"
    )
    assert promql.metrics(expression) == {"a:b_bucket", "d", "e", "f"}
    assert promql.selectors(expression)[0] == 'a:b_bucket{x=~"{}|c(",y!="1"}'
    assert promql.labels(expression) == {"le", "stage", "x", "y", "job", "service"}
