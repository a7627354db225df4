"""Writes docs/runs.md from the fields of a run; with --check says whether it is up to date."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from docs.make_settings import default, meaning, table, write_or_check
from foundry.cli.train import run_options
from foundry.store import DocumentPrompts, Resources, RunRecord, RunRequest, SelfStudyPrompts
from foundry.store.spec import CHOSEN

PAGE = Path(__file__).with_name("runs.md")
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
INTRODUCTION = """# Runs

Made from the code by `make docs`. A run is asked for with `POST /v1/runs`, whose body has these keys, or with
`foundry train FILE --name NAME`, whose options stand for them. `foundry train --config run.yaml` takes the keys from a
file (YAML or JSON), where `document`, `prompts` and `heldout` may be paths too, relative to it:

    name: handbook
    document: handbook.md
    recipe: quick
    compression: 8
    heldout: handbook.heldout.jsonl

Options win over the file. `--dry-run` prints the run that results and starts nothing. Unknown keys are refused. What
is not given follows from the recipe, where the column says so; [training.md](training.md) says what to choose.
"""


def page() -> str:
    parts = {
        "Prompts of kind `selfstudy`": ("prompts", SelfStudyPrompts),
        "Prompts of kind `document`": ("prompts", DocumentPrompts),
        "Resources": ("resources", Resources),
    }
    tables = [table(title, part, _columns(key)) for title, (key, part) in parts.items()]
    answer = table("What `GET /v1/runs/ID` answers", RunRecord, {"key": _key, "meaning": meaning})
    return "\n".join([INTRODUCTION, table("Request", RunRequest, _columns()), *tables, answer])


def _columns(*path: str) -> Mapping[str, Callable[[str, FieldInfo], str]]:
    spellings = {option.key: ", ".join(f"`{each}`" for each in option.spellings) for option in run_options()}
    files = {("document",): "`FILE`", ("prompts",): "`--prompts FILE`", ("heldout",): "`--heldout FILE`"}
    options = spellings | files
    return {
        "key": _key,
        "option": lambda name, _: options.get((*path, name), ""),
        "default": lambda name, field: "" if name in ("document", "text", "title") else _default(name, field),
        "range": _range,
        "meaning": meaning,
    }


def _key(name: str, field: FieldInfo) -> str:
    return f"`{field.serialization_alias or name}`"


def _default(name: str, field: FieldInfo) -> str:
    if name in CHOSEN:
        return "the recipe's"
    if isinstance(field.default, BaseModel):
        return f"`{field.default.model_dump()}`"
    return "" if field.default in (None, "") else default(name, field)


def _range(_: str, field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    bounds = [(sign, getattr(each, name, None)) for each in field.metadata for name, sign in SIGNS.items()]
    return ", ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)


if __name__ == "__main__":
    raise SystemExit(write_or_check(PAGE, page()))
