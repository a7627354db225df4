"""Writes docs/settings.md from the services' settings; with --check says whether it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from foundry.store import StoreSettings
from services.gateway.settings import ConversionSettings, DefaultLimits, GatewaySettings, JobSettings, OidcSettings
from services.rollout.settings import RolloutSettings, TokasaurusSettings, VllmSettings
from services.teacher.settings import TeacherSettings
from services.trainer.settings import TrainerSettings

PAGE = Path(__file__).with_name("settings.md")
SERVICES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("gateway", GatewaySettings),
    ("rollout", RolloutSettings),
    ("teacher", TeacherSettings),
    ("trainer", TrainerSettings),
)
GROUPS: dict[str, type[BaseModel]] = {
    "conversions": ConversionSettings,
    "jobs": JobSettings,
    "limits": DefaultLimits,
    "oidc": OidcSettings,
    "store": StoreSettings,
    "tokasaurus": TokasaurusSettings,
    "vllm": VllmSettings,
}
INTRODUCTION = """# Settings

Made from the code by `make docs`. Every setting is an option of `python -m services.NAME.main` (`--max-sequences 8`)
and a variable (`FOUNDRY_MAX_SEQUENCES=8`); the option wins. Those of conversions, jobs, limits, oidc, store,
tokasaurus and vllm are nested: `--store.redis-url`, `FOUNDRY_STORE__REDIS_URL`. `--dry-run` prints what holds, without
secrets.

Unknown options are refused, unknown names in a group (`FOUNDRY_STORE__REDIS_PASWORD`), and variables that are almost
a setting's name (`FOUNDRY_MAX_SEQUENCS`, `FOUNDRY_STORE_KEEP_HOT`). Other `FOUNDRY_` variables are left alone: they may
be another service's, a tool's or Kubernetes' own. A service whose settings are wrong says in one line each which,
without the values, and exits with status 2.
"""


def page() -> str:
    tables = [table(f"services.{name}", settings) for name, settings in SERVICES]
    return "\n".join([INTRODUCTION, *tables, *(table(name, group) for name, group in GROUPS.items())])


def meaning(_: str, field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


def default(_: str, field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined or field.default_factory is not None:
        return "computed"
    return f"`{field.default}`"


# Title of a column, and what stands in it for a field.
COLUMNS: dict[str, Callable[[str, FieldInfo], str]] = {
    "setting": lambda name, field: f"`{name}`",
    "default": default,
    "meaning": meaning,
}


def table(title: str, model: type[BaseModel], columns: Mapping[str, Callable[[str, FieldInfo], str]] = COLUMNS) -> str:
    fields = [(name, field) for name, field in model.model_fields.items() if field.annotation not in GROUPS.values()]
    rows = [f"| {' | '.join(cell(name, field) for cell in columns.values())} |" for name, field in fields]
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([f"## {title}", "", *head, *rows, ""])


def write_or_check(page: Path, text: str) -> int:
    """Exit status: with --check 1 unless the page is up to date."""
    if "--check" not in sys.argv:
        page.write_text(text)
        return 0
    if not page.exists() or page.read_text() != text:
        print(f"docs/{page.name} is not what the code says: run 'make docs'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(write_or_check(PAGE, page()))
