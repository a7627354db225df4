"""Tool calls in answers: the same however the answer is cut, and nothing that a model wrote is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundry.tool_formats import FORMATS, CalledTool, reader_of

TIDE, WIND = CalledTool("tide", '{"harbour": "Ålesund"}'), CalledTool("wind", "{}")
HERMES_TIDE = '<tool_call>\n{"name": "tide", "arguments": {"harbour": "Ålesund"}}\n</tool_call>'
LLAMA_TIDE = '{"name": "tide", "parameters": {"harbour": "\\u00c5lesund"}}'
MARKED = CalledTool("say", '{"text": "</tool_call>"}')
CASES = [
    ("hermes", "The tide is high.", "The tide is high.", []),
    ("hermes", " a <b> <tool_ca", " a <b> <tool_ca", []),
    ("hermes", "  \n", "  \n", []),
    ("hermes", HERMES_TIDE, "", [TIDE]),
    ("hermes", f"I look.\n\n{HERMES_TIDE}\n", "I look.", [TIDE]),
    ("hermes", f'{HERMES_TIDE}\n<tool_call>{{"name": "wind", "arguments": {{}}}}</tool_call>', "", [TIDE, WIND]),
    ("hermes", f"{HERMES_TIDE} So it is. ", "So it is.", [TIDE]),
    ("hermes", HERMES_TIDE.removesuffix("\n</tool_call>"), "", [TIDE]),
    ("hermes", '<tool_call>{"name": "say", "arguments": {"text": "</tool_call>"}}</tool_call>', "", [MARKED]),
    *(
        ("hermes", broken, broken, [])
        for broken in (
            "<tool_call>tide()</tool_call>",
            '<tool_call>{"name": "tide", "arguments": {"harb',
            '<tool_call>{"name": "tide", "arguments": [1]}</tool_call>',
            '<tool_call>{"name": 1, "arguments": {}}</tool_call> and more',
            f"<tool_call>{'[' * 5000}</tool_call>",
        )
    ),
    ("json", '{"name": "wind", "arguments": {}}', "", [WIND]),
    ("json", ' [{"name": "wind", "arguments": {}}, {"name": "wind", "arguments": {}}]', "", [WIND, WIND]),
    *(("json", other, other, []) for other in ("", "x", "[]", '[{"name": "wind", "arguments": {}}', '["a"]', "{}")),
    ("llama3_json", "The tide is high.", "The tide is high.", []),
    ("llama3_json", " \n", " \n", []),
    ("llama3_json", LLAMA_TIDE, "", [TIDE]),
    ("llama3_json", f'\n{LLAMA_TIDE}; {{"name": "wind", "arguments": {{}}}} ', "", [TIDE, WIND]),
    *(
        ("llama3_json", other, other, [])
        for other in (f"{LLAMA_TIDE} is what I call", f"Call {LLAMA_TIDE}", '{"a": 1}', LLAMA_TIDE[:-1], "{" * 5000)
    ),
]


@pytest.mark.parametrize(("tool_format", "answer", "text", "calls"), CASES)
@given(data=st.data())
def test_text_and_calls(data: st.DataObject, tool_format: str, answer: str, text: str, calls: list[CalledTool]) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    reader = reader_of(tool_format)
    pieces = [answer[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    read = [*map(reader.feed, pieces), reader.close()]
    assert "".join(said for said, _ in read) == text
    assert [call for _, called in read for call in called] == calls


@pytest.mark.parametrize("tool_format", FORMATS)
@given(answer=st.lists(st.sampled_from([*HERMES_TIDE, HERMES_TIDE, LLAMA_TIDE, "<tool_call>", " ", ";"])).map("".join))
def test_nothing_but_white_space_and_calls_goes(tool_format: str, answer: str) -> None:
    reader = reader_of(tool_format)
    (said, called), (rest, more) = reader.feed(answer), reader.close()
    if not called + more:
        assert said + rest == answer
    assert set(called + more) <= {TIDE}
