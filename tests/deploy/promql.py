"""What a PromQL expression names: metrics, labels, selectors. Prometheus 2 has no interface that says so."""

from __future__ import annotations

import re

_STRING = r'"(?:[^"\\]|\\.)*"'
_NAME = r"(?<![\w:.$])[a-zA-Z_:][\w:]*"
_SELECTOR = re.compile(rf"({_NAME})\s*(\{{(?:[^{{}}\"]|{_STRING})*\}})?")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^()]*)\)")
_DURATION = re.compile(r"\[[^\]]*\]|\boffset\s+\w+")
_MATCHED = re.compile(rf"(\w+)\s*(?:=~|!~|!=|=)\s*{_STRING}")
_WORDS = frozenset({"and", "or", "unless", "bool"})


def selectors(expression: str) -> list[str]:
    """Each `metric{…}` as it stands there."""
    bare = _GROUPING.sub(" ", _DURATION.sub(" ", expression))
    return [
        found[0].strip()
        for found in _SELECTOR.finditer(bare)
        # A name before a bracket is a function's, or an aggregation's.
        if found[1] not in _WORDS and not bare[found.end() :].lstrip().startswith("(")
    ]


def metrics(expression: str) -> set[str]:
    return {selector.partition("{")[0].strip() for selector in selectors(expression)}


def labels(expression: str) -> set[str]:
    """Labels that are matched, grouped by or joined on."""
    grouped = {label.strip() for clause in _GROUPING.findall(expression) for label in clause.split(",")}
    return (grouped | set(_MATCHED.findall(expression))) - {""}
