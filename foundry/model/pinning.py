"""What a chat template could take from elsewhere than its messages: the date is pinned, chance is refused."""

from __future__ import annotations

import json
from datetime import datetime

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from foundry.errors import TemplateUnsupported

_NOW = "strftime_now"


class _Generation(Extension):
    """Reads `{% generation %}` of transformers, which marks answers and changes nothing in them."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


# Only reads; transformers renders, in an environment of its own.
_READER = Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"])


def free_variables(template: str) -> frozenset[str]:
    """Names that a template takes from whoever renders it. It must be readable: see `clock_prefix`."""
    return frozenset(meta.find_undeclared_variables(_READER.parse(template)))


def clock_prefix(template: str, clock: datetime) -> str:
    """What, put before the template, makes `strftime_now` write `clock`; empty for a template that writes no date.

    A macro, because transformers passes only plain data to templates, no functions. The dates stand in it as text, one
    for each format that the template uses. Raises TemplateUnsupported if these can't be known, or for randomness.
    """
    try:
        tree = _READER.parse(template)
    except TemplateSyntaxError as error:
        raise TemplateUnsupported(f"the chat template can't be read: {error}") from error
    _refuse_randomness(tree)
    calls = [call for call in tree.find_all(nodes.Call) if _is_now(call.node)]
    formats = [text for call in calls if (text := _format(call)) is not None]
    num_tests = sum(_is_now(test.node) for test in tree.find_all(nodes.Test))
    num_uses = sum(_is_now(name) for name in tree.find_all(nodes.Name))
    if num_uses != len(formats) + num_tests:
        raise TemplateUnsupported(f"the chat template uses {_NOW} otherwise than with a format that stands in it")
    if not formats:
        return ""
    dates = json.dumps({each: clock.strftime(each) for each in formats}, sort_keys=True)
    # The line's end is not rendered: transformers trims the one after a block.
    return f"{{% macro {_NOW}(format) %}}{{{{ {dates}[format] }}}}{{% endmacro %}}\n"


def _is_now(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == _NOW and node.ctx == "load"


def _format(call: nodes.Call) -> str | None:
    match call.args:
        case [nodes.Const(value=str(text))]:
            return text
    return None


def _refuse_randomness(tree: nodes.Template) -> None:
    names = {name.name for name in tree.find_all(nodes.Name)}
    filters = list(tree.find_all(nodes.Filter))
    # Also map('random'); a filter whose name is computed could be any.
    mapped = [each.args[0] for each in filters if each.name == "map" and each.args]
    if (
        "lipsum" in names
        or any(each.name == "random" for each in filters)
        or any(not isinstance(each, nodes.Const) or each.value == "random" for each in mapped)
    ):
        raise TemplateUnsupported("the chat template draws at random (random, lipsum): it renders no context twice")
