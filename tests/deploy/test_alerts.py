"""The alerts: valid, tried one by one with promtool, and explained in docs/alerts.md."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs import make_settings
from foundry.store import RunSpec
from tests.deploy import promql
from tests.deploy.boards import BOARDS, panels
from tests.deploy.prometheus import DIRECTORY, RULES, binary
from tests.deploy.test_dashboards import TARGET_LABELS, documented

ROOT = DIRECTORY.parents[1]
PAGE = (ROOT / "docs" / "alerts.md").read_text()
CASES = sorted(Path(__file__).with_name("alerts").glob("*.yaml"))
GROUPS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"]
ALL_RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in ALL_RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in ALL_RULES if "record" in rule}


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([binary("promtool"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_and_configuration_are_valid() -> None:
    promtool("check", "rules", RULES)
    promtool("check", "config", DIRECTORY / "prometheus.yml")


def test_the_chart_has_the_same_rules() -> None:
    assert (ROOT / "deploy" / "helm" / "cartridge-foundry" / "files" / "rules.yaml").resolve() == RULES.resolve()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_alert_fires_when_it_should_and_only_then(case: Path) -> None:
    promtool("test", "rules", case)


def test_every_alert_is_tried_both_ways() -> None:
    tried = {
        (check["alertname"], bool(check["exp_alerts"]))
        for case in CASES
        for test in yaml.safe_load(case.read_text())["tests"]
        for check in test["alert_rule_test"]
    }
    assert tried == {(name, fires) for name in ALERTS for fires in (True, False)}


@pytest.mark.parametrize("name", ALERTS)
def test_alert_says_what_it_is(name: str) -> None:
    alert = ALERTS[name]
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/alerts.md#{name.lower()}"


@pytest.mark.parametrize("name", ALERTS)
def test_alert_has_its_section(name: str) -> None:
    (section,) = re.findall(rf"^### {name}\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    severity = section.split()[0].rstrip(".").lower()
    assert severity == ALERTS[name]["labels"]["severity"]
    assert "\nLook at: " in section
    assert "\nDo: " in section


def test_sections_are_of_alerts() -> None:
    assert re.findall(r"^### (\w+)$", PAGE, re.MULTILINE) == list(ALERTS)


def test_the_page_names_panels_and_settings_that_exist() -> None:
    titles = {panel["title"] for board in BOARDS.values() for panel in panels(board)}
    assert set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*", PAGE)) - {"Critical", "Warnings"} <= titles
    settings = make_settings.PAGE.read_text()
    options = set(RunSpec.model_fields)
    named = {word for word in re.findall(r"`([a-z]+_[a-z_]+)`", PAGE) if f"| `{word}` |" not in settings}
    assert named - options == set()


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_metrics_and_labels_exist(rule: dict[str, Any]) -> None:
    names, known = promql.metrics(rule["expr"]), documented()
    assert names - known.keys() - RECORDED == set()
    # Of what is recorded: vLLM's one label besides those of a target.
    of_these = {label for name in names - RECORDED for label in known[name]} | {"model_name"}
    assert promql.labels(rule["expr"]) - of_these - TARGET_LABELS == set()


def test_what_is_recorded_is_recorded_before_it_is_read() -> None:
    """Rules of one group are evaluated in order, groups beside each other."""
    for group in GROUPS:
        recorded: set[str] = set()
        for rule in group["rules"]:
            assert promql.metrics(rule["expr"]) & RECORDED <= recorded, rule
            recorded |= {rule["record"]} if "record" in rule else set()
