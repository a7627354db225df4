"""Writes the chart's README.md from values.yaml and its comments; with --check says whether it is up to date."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from make_schema import comments

CHART = Path(__file__).parent / "cartridge-foundry"
README = CHART / "README.md"
INTRODUCTION = """# cartridge-foundry

A Helm chart for Kubernetes 1.20 and newer. With its defaults it runs the demo model on CPUs, with a Valkey and an
object storage of its own:

    helm install foundry deploy/helm/cartridge-foundry
    helm test foundry

It needs nothing cluster-wide and makes nothing outside its namespace. Its pods keep to the pod security standard
`restricted` and are cut off by NetworkPolicies but for the flows in [`files/flows.yaml`](files/flows.yaml). Claims
outlive a release: delete them by hand.

## Values

Made by `make docs`. The keys below `settings` are the services' own: [docs/settings.md](../../../docs/settings.md); the
chart refuses those that it sets itself, and every key that it does not know.
"""


def page() -> str:
    text = (CHART / "values.yaml").read_text()
    said = comments(text)
    values = yaml.safe_load(text)
    plain = [row(key, value, said) for key, value in values.items() if not isinstance(value, dict)]
    groups = [
        f"### {key}\n\n{table(rows(key, value, said))}" for key, value in values.items() if isinstance(value, dict)
    ]
    return "\n".join([INTRODUCTION, table(plain), *groups])


def rows(path: str, value: Any, said: dict[str, str]) -> Iterator[str]:
    """Of a group those of its keys; a value that is itself a map, such as resources, has a comment of its own."""
    if isinstance(value, dict) and path not in said:
        for key, below in value.items():
            yield from rows(f"{path}.{key}", below, said)
        if path.endswith(".settings") and not value:
            yield f"| `{path}` | | Settings by their names. |"
    else:
        yield row(path, value, said)


def row(path: str, value: Any, said: dict[str, str]) -> str:
    default, meaning = (text.replace("|", "\\|") for text in (json.dumps(value), said[path]))
    return f"| `{path}` | `{default}` | {meaning} |"


def table(lines: Iterable[str]) -> str:
    return "\n".join(["| value | default | meaning |", "|---|---|---|", *lines, ""])


def main() -> int:
    if "--check" not in sys.argv:
        README.write_text(page())
        return 0
    if not README.exists() or README.read_text() != page():
        print("the chart's README.md is not what values.yaml says: run 'make docs'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
