"""Writes the chart's values.schema.json; with --check says whether it is up to date.

Types and descriptions come from the services' settings, from values.yaml with its comments, and from
values.schema.yaml. Unknown keys are refused everywhere, so that a typo is an error and not a value that does nothing.
"""

from __future__ import annotations

import json
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from kubernetes_validate.utils import schema_contents
from pydantic import BaseModel

from foundry.store import StoreSettings
from services.gateway.settings import GatewaySettings
from services.rollout.settings import RolloutSettings
from services.teacher.settings import TeacherSettings
from services.trainer.settings import TrainerSettings

HERE = Path(__file__).parent
SCHEMA = HERE / "cartridge-foundry" / "values.schema.json"
# The newest release whose every field the chart's Kubernetes values may use.
KUBERNETES = "1.35"
SETTINGS: dict[str, type[BaseModel]] = {
    "gateway": GatewaySettings,
    "rollout": RolloutSettings,
    "teacher": TeacherSettings,
    "trainer": TrainerSettings,
    "store": StoreSettings,
}
# Settings that the chart makes from other values.
OWNED = {
    *("listen", "metrics_port", "dry_run", "otlp_endpoint"),
    *("tls_certificate_file", "tls_key_file", "tls_ca_file", "rpc_tokens_directory"),
    *("https_server_certificate_file", "https_server_key_file"),
    *("api_keys", "admin_key_file"),
    *("model", "model_name", "rollout_addresses", "teacher_address", "store", "worker", "run"),
    *("jobs.template", "jobs.namespace"),
}
OWNED_BY_STORE = re.compile(r"(redis|objects)_(?!timeout_seconds$|retry_seconds$)|signing_key_file$")

Json = dict[str, Any]


def schema() -> Json:
    definitions: Json = {}
    values = yaml.safe_load((HERE / "cartridge-foundry" / "values.yaml").read_text())
    found = _Values(definitions).describe("", values)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **found,
        "definitions": dict(sorted(definitions.items())),
    }


def settings_schema(service: str, given: Json) -> Json:
    """The settings that a user of the chart decides. Those that values.yaml gives are also read by templates."""
    made = _without_titles(SETTINGS[service].model_json_schema())
    closed = _closed(service, made["properties"], made.get("$defs", {}))
    described = f"Settings of the {service}, by their names; each is a FOUNDRY_ variable."
    return closed | {"required": sorted(given), "description": described}


def _closed(service: str, fields: Json, models: Json, path: str = "") -> Json:
    properties = {}
    for name, field in fields.items():
        if not _is_owned(service, path + name):
            described = {"description": " ".join(field["description"].split())}
            nested = _model_of(field, models)
            below = _closed(service, nested["properties"], models, f"{path}{name}.") if nested else field
            properties[name] = below | described
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _is_owned(service: str, path: str) -> bool:
    return bool(OWNED_BY_STORE.match(path)) if service == "store" else path in OWNED


def _model_of(field: Json, models: Json) -> Json | None:
    """The settings nested in this one, if it is a group."""
    for choice in (field, *field.get("anyOf", ())):
        if "$ref" in choice:
            model: Json = models[choice["$ref"].removeprefix("#/$defs/")]
            return model
    return None


class _Values:
    """Turns values.yaml into a schema."""

    def __init__(self, definitions: Json) -> None:
        self._definitions = definitions
        self._rules: dict[str, Json] = yaml.safe_load((HERE / "values.schema.yaml").read_text())
        self._comments = comments((HERE / "cartridge-foundry" / "values.yaml").read_text())

    def describe(self, path: str, value: Any) -> Json:
        return self._type(path, value) | ({"description": self._comments[path]} if path in self._comments else {})

    def _type(self, path: str, value: Any) -> Json:
        if path.endswith("settings"):
            return settings_schema(path.split(".")[0], value)
        for pattern, rule in self._rules.items():
            if fnmatchcase(path, pattern):
                found: Json = _kubernetes_references(rule, self._definitions)
                return found
        if isinstance(value, dict) and (value or not path):
            properties = {key: self.describe(f"{path}.{key}".lstrip("."), below) for key, below in value.items()}
            return {"type": "object", "additionalProperties": False, "properties": properties}
        if isinstance(value, bool):
            return {"type": "boolean"}
        if isinstance(value, int):
            return {"type": "integer", "minimum": 0}
        if isinstance(value, str):
            return {"type": "string"}
        raise ValueError(f"{path}: its default {value!r} has no type; say it in values.schema.yaml")


def comments(text: str) -> dict[str, str]:
    """The `# --` comment above each key, by the key's path."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    said: list[str] = []
    for line in text.splitlines():
        content = line.strip()
        if content.startswith("# -- "):
            said = [content.removeprefix("# -- ")]
        elif content.startswith("#"):
            said += [content.removeprefix("#").strip()] if said else []
        elif key := re.match(r"( *)([\w.-]+):", line):
            path = [above for above in path if above[0] < len(key[1])] + [(len(key[1]), key[2])]
            if said:
                found[".".join(name for _, name in path)] = " ".join(said)
            said = []
        else:
            said = []
    return found


def _kubernetes_references(rule: Any, definitions: Json) -> Any:
    """The rule with `kubernetes:` references put into `definitions`, and with them what they refer to."""
    if isinstance(rule, list):
        return [_kubernetes_references(part, definitions) for part in rule]
    if not isinstance(rule, dict):
        return rule
    if "$ref" not in rule:
        return {key: _kubernetes_references(part, definitions) for key, part in rule.items()}
    name = rule["$ref"].removeprefix("kubernetes:").removeprefix("#/$defs/")
    name = name if name.startswith("io.k8s.") else f"io.k8s.api.{name}"
    if name not in definitions:
        # Before what is below it: some refer to themselves.
        definitions[name] = {}
        definitions[name] = _kubernetes_references(_bare(_kubernetes_definitions()[name]), definitions)
    return {"$ref": f"#/definitions/{name}"}


def _kubernetes_definitions() -> Json:
    path = f"kubernetes-json-schema/v{KUBERNETES}.0-local-strict/_definitions.json"
    definitions: Json = schema_contents(path, KUBERNETES)["$defs"]
    return definitions


def _bare(node: Any) -> Any:
    """Without what is said for people and for the API server."""
    if isinstance(node, list):
        return [_bare(part) for part in node]
    if not isinstance(node, dict):
        return node
    said = {key for key, part in node.items() if isinstance(part, str) and key in ("description", "format")}
    return {key: _bare(part) for key, part in node.items() if key not in said and not key.startswith("x-kubernetes")}


def _without_titles(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_titles(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {key: _without_titles(part) for key, part in node.items() if not (key == "title" and isinstance(part, str))}


def main() -> int:
    text = json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
    if "--check" not in sys.argv:
        SCHEMA.write_text(text)
        return 0
    if not SCHEMA.exists() or SCHEMA.read_text() != text:
        print("the chart's values.schema.json is not what the code says: run 'make docs'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
