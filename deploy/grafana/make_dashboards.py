"""Writes the chart's dashboards from their code; with --check says whether they are up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.serving import serving
from deploy.grafana.store_and_fleet import store_and_fleet
from deploy.grafana.training import training

DIRECTORY = Path(__file__).parents[1] / "helm" / "cartridge-foundry" / "files" / "dashboards"
DASHBOARDS = {"training.json": training, "serving.json": serving, "store-and-fleet.json": store_and_fleet}


def written(dashboard: Dashboard) -> str:
    return JSONEncoder(sort_keys=True, indent=2).encode(dashboard) + "\n"


def main() -> int:
    texts = {name: written(make()) for name, make in DASHBOARDS.items()}
    if "--check" not in sys.argv:
        for name, text in texts.items():
            (DIRECTORY / name).write_text(text)
        return 0
    if texts != {path.name: path.read_text() for path in DIRECTORY.glob("*.json")}:
        print(f"{DIRECTORY} is not what the code says: run 'make docs'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
