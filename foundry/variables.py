"""Names of settings as variables and options, and what is wrong with what was written there.

A setting's path is its name, or group and name: ("store", "redis_url") is FOUNDRY_STORE__REDIS_URL and
--store.redis-url. No message shows a value: it may be a secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from difflib import get_close_matches

from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError

PREFIX = "FOUNDRY_"
# Above how alike settings of two services are (0.829): all of them may stand in one environment.
_ALIKE = 0.83
# What clients show a gateway, almost the name of its own `api_keys`.
_CLIENTS = {"API_KEY"}

Path = tuple[str, ...]


def variable(path: Path) -> str:
    return PREFIX + "__".join(path).upper()


def option(path: Path) -> str:
    return "--" + ".".join(path).replace("_", "-")


def paths(settings: type[BaseModel], within: Path = ()) -> Iterator[Path]:
    """Of all settings, groups and what is in them."""
    for name in settings.model_fields:
        yield (*within, name)
        group = _group(settings, name)
        if group is not None:
            yield from paths(group, (*within, name))


def misspelt(settings: type[BaseModel], within: Path = ()) -> Iterator[str]:
    """What to say of each variable that is almost one of these.

    Others are not ours: the environment also names settings of other services and of tools, and Kubernetes' Services.
    """
    known = {variable(path).removeprefix(PREFIX) for path in paths(settings, within)}
    for name in sorted(os.environ):
        given = name.upper().removeprefix(PREFIX)
        # What is unknown in a group that is known is refused with its values.
        if name.upper().startswith(PREFIX) and given not in known | _CLIENTS and given.partition("__")[0] not in known:
            for meant in get_close_matches(given, known, n=1, cutoff=_ALIKE):
                yield f"{name}: no such setting; {PREFIX}{meant} is one"


def faults(error: ValidationError, settings: type[BaseModel], within: Path = ()) -> Iterator[tuple[Path, str]]:
    """Path and message of all that pydantic found. A group that is missing stands for what is required in it."""
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        path = tuple(part for part in each["loc"] if isinstance(part, str))
        group = _group(settings, path[-1]) if len(path) == 1 else None
        if each["type"] == "missing" and group is not None:
            required = [(*path, name) for name, field in group.model_fields.items() if field.is_required()]
            yield from (((*within, *below), "required") for below in required)
        else:
            message = {"missing": "required", "extra_forbidden": "no such setting"}.get(each["type"], each["msg"])
            yield (*within, *path), message.removeprefix("Value error, ")


def unreadable(error: SettingsError) -> str:
    """What to say of options or JSON that pydantic-settings could not read."""
    text = str(error)
    field = re.search(r'field "(\w+)"|encountered for (\w+)', text)
    if field is not None:
        path = (field[1] or field[2],)
        return f"{variable(path)} ({option(path)}): not valid JSON"
    _, unknown, rest = text.partition("unrecognized arguments: ")
    if unknown:
        names = [each.partition("=")[0] for each in rest.split() if each.startswith("-")]
        return f"{', '.join(names) or 'an argument'}: no such option; --help lists them"
    return text.removeprefix("error parsing CLI: ").partition(" '")[0]


def _group(settings: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The settings nested under this name."""
    annotation = settings.model_fields[name].annotation if name in settings.model_fields else None
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
