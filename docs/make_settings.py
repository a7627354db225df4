"""Writes docs/settings.md from the services' settings; with --check says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from foundry.store import StoreSettings
from services.gateway.settings import GatewaySettings, JobSettings
from services.rollout.settings import RolloutSettings, VllmSettings
from services.teacher.settings import TeacherSettings
from services.trainer.settings import TrainerSettings

PAGE = Path(__file__).with_name("settings.md")
SERVICES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("gateway", GatewaySettings),
    ("rollout", RolloutSettings),
    ("teacher", TeacherSettings),
    ("trainer", TrainerSettings),
)
GROUPS: dict[str, type[BaseModel]] = {"jobs": JobSettings, "store": StoreSettings, "vllm": VllmSettings}
INTRODUCTION = """# Settings

Made from the code by `make docs`. Every setting is an option of `python -m services.NAME.main` (`--max-sequences 8`)
and a variable (`FOUNDRY_MAX_SEQUENCES=8`); the option wins. Those of jobs, store and vllm are nested:
`--store.redis-url`, `FOUNDRY_STORE__REDIS_URL`. `--dry-run` prints what holds, without secrets.

Unknown options are refused, unknown names in a group (`FOUNDRY_STORE__REDIS_PASWORD`), and variables that are almost
a setting's name (`FOUNDRY_MAX_SEQUENCS`, `FOUNDRY_STORE_KEEP_HOT`). Other `FOUNDRY_` variables are left alone: they may
be another service's, a tool's or Kubernetes' own. A service whose settings are wrong says in one line each which,
without the values, and exits with status 2.
"""


def page() -> str:
    tables = [table(f"services.{name}", settings) for name, settings in SERVICES]
    return "\n".join([INTRODUCTION, *tables, *(table(name, group) for name, group in GROUPS.items())])


def table(title: str, settings: type[BaseModel]) -> str:
    rows = [
        row(name, field) for name, field in settings.model_fields.items() if field.annotation not in GROUPS.values()
    ]
    return "\n".join([f"## {title}", "", "| setting | default | meaning |", "|---|---|---|", *rows, ""])


def row(name: str, field: FieldInfo) -> str:
    description = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{name}` | {default(field)} | {description} |"


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined or field.default_factory is not None:
        return "computed"
    return f"`{field.default}`"


def main() -> int:
    if "--check" not in sys.argv:
        PAGE.write_text(page())
        return 0
    if not PAGE.exists() or PAGE.read_text() != page():
        print("docs/settings.md is not what the code says: run 'make docs'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
