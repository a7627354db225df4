"""Tool calls in an answer, in OpenAI's words."""

from __future__ import annotations

from uuid import uuid4

from foundry.tool_formats import reader_of
from services.gateway.openai.answers import AnsweredCall, FunctionCall


class Calling:
    """One choice whose model may call tools."""

    def __init__(self, tool_format: str, *, one_call: bool) -> None:
        """`tool_format` is one of `foundry.tool_formats.FORMATS`; of several calls the first is told if `one_call`."""
        self._reader = reader_of(tool_format)
        self._one_call = one_call
        self.num_calls = 0

    def read(self, text: str, *, last: bool) -> tuple[str, list[AnsweredCall]]:
        """What the next piece of the answer makes certain: text, and whole calls."""
        said, called = self._reader.feed(text)
        if last:
            rest, more = self._reader.close()
            said, called = said + rest, called + more
        calls = []
        for each in called:
            if self.num_calls and self._one_call:
                continue
            function = FunctionCall(name=each.name, arguments=each.arguments)
            calls.append(AnsweredCall(index=self.num_calls, id=f"call_{uuid4().hex[:24]}", function=function))
            self.num_calls += 1
        return said, calls
