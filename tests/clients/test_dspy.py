"""dspy: a language model that is asked by its own programs. Fields are read from the answer's text, which a model of
random weights does not write: what is shown is that it gets the text, and what it makes of an error."""

from __future__ import annotations

import dspy
import pytest

from tests.clients.conftest import BASE, CARTRIDGE, Site


@pytest.mark.parametrize("model", [BASE, CARTRIDGE])
def test_a_model_answers(site: Site, model: str) -> None:
    lm = dspy.LM(f"openai/{model}", api_base=site.url, api_key="unused", max_tokens=8, temperature=0, cache=False)
    first, again = lm("What is open?"), lm("What is open?")
    assert len(first) == 1
    assert first == again
    assert lm.history[-1]["usage"]["completion_tokens"] <= 8


def test_what_does_not_fit_is_known_as_such(site: Site) -> None:
    lm = dspy.LM(f"openai/{BASE}", api_base=site.url, api_key="unused", max_tokens=8, cache=False, num_retries=0)
    with pytest.raises(dspy.ContextWindowExceededError):
        lm("harbour " * 2000)
