"""What language an answer is asked to be of: OpenAI's `response_format`, or vLLM's parameters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from foundry.errors import InvalidArgument
from foundry.v1 import rollout_pb2
from services.gateway.openai.requests.parameters import check_text

# vLLM's kinds, and their names as parameters of their own, which it had before.
_KINDS = ("json", "json_object", "regex", "choice", "grammar")
GUIDED = tuple(f"guided_{kind}" for kind in _KINDS)
_TYPES = {"text", "json_object", "json_schema"}


def asked_grammar(
    response_format: Mapping[str, Any] | None,
    structured_outputs: Mapping[str, Any] | None,
    guided: Mapping[str, Any],
) -> tuple[str, rollout_pb2.Grammar] | None:
    """The parameter that asks for a language, and the language; `guided` is by the names of `GUIDED`.

    Raises InvalidArgument.
    """
    found = []
    if response_format is not None and (grammar := _of_format(response_format)) is not None:
        found.append(("response_format", grammar))
    if structured_outputs is not None:
        found.append(("structured_outputs", _structured(structured_outputs)))
    for name, value in guided.items():
        if value not in (None, False):
            found.append((name, _of_kind(name.removeprefix("guided_"), value, name)))
    if len(found) > 1:
        raise InvalidArgument(f"{found[0][0]} and {found[1][0]} can't be set both", field=found[1][0])
    return found[0] if found else None


def calls_schema(tools: Sequence[Mapping[str, Any]], name: str | None, *, one_call: bool) -> dict[str, Any]:
    """The JSON schema of a call of the tool of this name, or of a list of calls of any.

    Raises InvalidArgument if tools define one name (`$defs`) in two ways.
    """
    definitions: dict[str, Any] = {}
    calls = [_call_schema(tool["function"], definitions) for tool in tools if name in (None, tool["function"]["name"])]
    schema = calls[0] if name is not None else {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if name is None and one_call:
        schema["maxItems"] = 1
    # As llguidance has it: else a model that is lost may write white space without end.
    schema["x-guidance"] = {"whitespace_flexible": False}
    return {**schema, "$defs": definitions} if definitions else schema


def _call_schema(function: Mapping[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    parameters = dict(function.get("parameters") or {"type": "object"})
    # What it refers to as `#/$defs/…` is then at the root.
    for key, value in parameters.pop("$defs", {}).items():
        if definitions.setdefault(key, value) != value:
            raise InvalidArgument(f"two tools define {key!r} in their $defs, each otherwise", field="tools")
    parameters.setdefault("type", "object")
    if "properties" in parameters:
        # No schema says so that is made from a function's signature, and none means that more may be made up.
        parameters.setdefault("additionalProperties", False)
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _of_format(asked: Mapping[str, Any]) -> rollout_pb2.Grammar | None:
    name = "response_format"
    match asked.get("type"):
        case "text":
            return None
        case "json_object":
            return _of_kind("json_object", True, name)
        case "json_schema":
            wrapped = asked.get("json_schema")
            if not isinstance(wrapped, Mapping) or not isinstance(wrapped.get("schema"), dict | bool):
                raise InvalidArgument("response_format.json_schema needs a `schema`", field=name)
            return _of_kind("json", wrapped["schema"], name)
    raise InvalidArgument(f"response_format.type must be one of {sorted(_TYPES)}", field=name)


def _structured(asked: Mapping[str, Any]) -> rollout_pb2.Grammar:
    name = "structured_outputs"
    given = {key: value for key, value in asked.items() if value not in (None, False)}
    if len(given) != 1 or not given.keys() <= set(_KINDS):
        raise InvalidArgument(f"structured_outputs needs one of {', '.join(_KINDS)}, and nothing besides", field=name)
    ((kind, value),) = given.items()
    return _of_kind(kind, value, name)


def _of_kind(kind: str, value: Any, name: str) -> rollout_pb2.Grammar:
    match kind, value:
        case "json_object", True:
            return rollout_pb2.Grammar(json_schema='{"type": "object"}')
        case "json", dict() | True:
            return rollout_pb2.Grammar(json_schema=json.dumps(value))
        case "json", str():
            return rollout_pb2.Grammar(json_schema=_text(value, name))
        case "regex", str():
            return rollout_pb2.Grammar(regex=_text(value, name))
        case "grammar", str():
            return rollout_pb2.Grammar(lark=_text(value, name))
        case "choice", list() if all(isinstance(each, str) for each in value):
            return rollout_pb2.Grammar(choice=rollout_pb2.Choice(texts=[_text(each, name) for each in value]))
    raise InvalidArgument(f"{name} has no {kind} of this type", field=name)


def _text(value: str, name: str) -> str:
    try:
        return check_text(value)
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{name} is no text: {error.reason}", field=name) from error
