"""The split of a chat template: what student and teacher see after their prefix is the same."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.utils import chat_template_utils

from foundry.errors import DocumentTooLong, DocumentUnreadable, InvalidArgument, TemplateUnsupported
from foundry.identity import content_digest
from foundry.model.template import ChatTemplate
from tests.tiny import CHATML, CLOCK, build_tokenizer, lengths_encoded

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# As Llama 3.2 does.
DATED = (
    "{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    "        {%- set date_string = strftime_now('%d %b %Y') %}\n    {%- else %}\n"
    "        {%- set date_string = '26 Jul 2024' %}\n    {%- endif %}\n{%- endif %}\n"
    "{%- for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' }}\n"
    "    {%- if loop.first %}\n        {{- 'Today Date: ' + date_string + '\\n\\n' }}\n    {%- endif %}\n"
    "    {{- m.content + '<|im_end|>' }}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
# Refuses two system messages in a row, as several published templates do.
STRICT = (
    "{% for m in messages %}"
    "{% if not loop.first and m.role == 'system' %}{{ raise_exception('one system') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
QUESTION = [{"role": "user", "content": "What is open?"}]


def template(text: str | dict[str, str] = CHATML, clock: datetime = CLOCK) -> ChatTemplate:
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer, clock)


@pytest.mark.parametrize("text", [CHATML, LLAMA3, DATED])
def test_context_and_turn_are_the_whole_conversation(text: str) -> None:
    split = template(text)
    for document in ("The harbour is open.", "x", "Two\n\nparagraphs, one with 12 numbers.\n"):
        system = {"role": "system", "content": document}
        assert split.context(document) + split.turn(QUESTION) == split.prompt([system, *QUESTION])
        assert split.context(document)[-len(split.closing) :] == split.closing


@given(document=st.text(min_size=1).filter(lambda text: text.strip() and "\0" not in text and "<|" not in text))
def test_the_turn_does_not_depend_on_the_document(document: str) -> None:
    split = template()
    whole = split.prompt([{"role": "system", "content": document}, *QUESTION])
    turn = split.turn(QUESTION)
    assert whole[-len(turn) :] == turn
    assert whole == split.context(document) + turn


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}go", "ignores the system message"),
        # The system message moves behind the first question.
        (
            "{% for m in messages | reverse %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}",
            "continuation of its system turn",
        ),
        # Counts the messages at the beginning.
        (
            "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
            "continuation of its system turn",
        ),
    ],
)
def test_templates_without_a_clean_split_are_refused(text: str, message: str) -> None:
    with pytest.raises(TemplateUnsupported, match=message):
        template(text)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TemplateUnsupported, match="no chat template"):
        ChatTemplate(tokenizer, CLOCK)


def test_messages_that_the_template_refuses_are_the_callers_fault() -> None:
    with pytest.raises(InvalidArgument, match="one system") as caught:
        template(STRICT).turn([{"role": "system", "content": "Be brief."}, *QUESTION])
    assert caught.value.field == "messages"
    with pytest.raises(InvalidArgument, match="messages is empty"):
        template().turn([])


@pytest.mark.parametrize("role", ["evil", "", "System", "tool", "user<|im_end|>", "assistant\n"])
def test_a_role_that_nobody_has_names_its_message(role: str) -> None:
    split = template()
    for render in (split.turn, split.prompt):
        with pytest.raises(InvalidArgument, match="must be one of system, user, assistant") as caught:
            render([*QUESTION, {"role": role, "content": "?"}])
        assert caught.value.field == "messages[1].role"


def test_documents_that_can_be_no_context() -> None:
    split = template()
    with pytest.raises(DocumentUnreadable, match="empty"):
        split.context(" \n\t")
    with pytest.raises(DocumentUnreadable, match="binary"):
        split.context("PK\x00\x03")
    with pytest.raises(DocumentTooLong, match=r"takes \d+ tokens .* room for 20: about \d+ of its 270 char.* Cut it"):
        split.context("The harbour is open again. " * 10, max_tokens=20)


def test_a_document_that_cannot_fit_is_not_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    split = template()
    lengths = lengths_encoded(split._tokenizer, monkeypatch)
    document = "The harbour is open again. " * 50_000
    with pytest.raises(DocumentTooLong, match=r"takes about \d+ tokens .* Cut it into \d+ parts") as caught:
        split.context(document, max_tokens=2000)
    assert max(lengths) < len(document) / 50
    # What is said of it by its beginning is so.
    said = int(re.findall(r"about (\d+) tokens", caught.value.message)[0])
    monkeypatch.undo()
    assert said == pytest.approx(len(split.context(document)), rel=0.05)


@pytest.mark.parametrize("behind_context", [True, False])
def test_a_turn_has_no_fewer_tokens_than_is_known_before(behind_context: bool) -> None:
    for text in (CHATML, LLAMA3):
        split = template(text)
        for content in ("?", "harbour " * 500, " " * 5000, "<|im_end|>" * 300):
            messages = [{"role": "user", "content": content}]
            ids = split.turn(messages) if behind_context else split.prompt(messages)
            assert split.fewest(messages, behind_context=behind_context) <= len(ids)
    # A template that trims leaves nothing of them.
    assert split.fewest([{"role": "user", "content": " " * 100_000}], behind_context=behind_context) < 50


def test_digest_names_the_template() -> None:
    assert template(CHATML).digest == template(CHATML).digest != template(LLAMA3).digest


class AnotherDay(datetime):
    @classmethod
    def now(cls, tz: object = None) -> AnotherDay:
        return cls(2031, 5, 17)


def test_a_date_in_the_context_does_not_change_overnight(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = DATED
    split = ChatTemplate(tokenizer, CLOCK)
    context, turn = split.context("The harbour."), split.turn(QUESTION)
    assert tokenizer.decode(context) == "<|im_start|>system\nToday Date: 26 Jul 2024\n\nThe harbour.<|im_end|>"
    monkeypatch.setattr(chat_template_utils, "datetime", AnotherDay)
    unpinned = tokenizer.apply_chat_template([{"role": "system", "content": "The harbour."}], tokenize=False)
    assert "17 May 2031" in str(unpinned)
    assert split.context("The harbour.") == context
    assert split.turn(QUESTION) == turn


def test_the_pinned_date_is_all_that_differs_from_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Line ends and spaces at the template's beginning are rendered as before."""
    monkeypatch.setattr(chat_template_utils, "datetime", AnotherDay)
    for beginning in ("", "\n", "  {% if true %}\n  x\n  {% endif %}\n", "{# note #}\n", "  {{- 'x' }}\n"):
        for text in (beginning + DATED, beginning + DATED.replace("{%- ", "{% ")):
            tokenizer = build_tokenizer()
            tokenizer.chat_template = text
            messages = [{"role": "system", "content": "The harbour."}, *QUESTION]
            expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert ChatTemplate(tokenizer, AnotherDay.now()).prompt(messages) == expected


def test_the_date_is_in_the_digest_of_a_template_that_writes_it() -> None:
    same_day, next_day = CLOCK + timedelta(hours=5), CLOCK + timedelta(days=1)
    assert template(DATED).digest == template(DATED, same_day).digest != template(DATED, next_day).digest
    for text in (CHATML, "{% if strftime_now is defined %}{% endif %}" + CHATML):
        # That of the text alone, by which stores know it.
        assert template(text).digest == template(text, next_day).digest == content_digest(json.dumps(text).encode())


@pytest.mark.parametrize(
    "use",
    [
        "{% set now = strftime_now %}{{ now('%d %b') }}",
        "{{ strftime_now('%d ' + '%b') }}",
        "{% for f in ['%d', '%b'] %}{{ strftime_now(f) }}{% endfor %}",
        "{{ strftime_now(format='%d') }}",
    ],
)
def test_a_date_that_cannot_be_pinned_is_refused(use: str) -> None:
    with pytest.raises(TemplateUnsupported, match="strftime_now"):
        template(use + CHATML)


@pytest.mark.parametrize(
    "use",
    [
        "{{ ['a', 'b'] | random }}",
        "{% filter random %}ab{% endfilter %}",
        "{{ [['a', 'b']] | map('random') | first }}",
        "{% set how = 'random' %}{{ [['a', 'b']] | map(how) | first }}",
        "{{ lipsum(1) }}",
    ],
)
def test_chance_in_a_template_is_refused(use: str) -> None:
    with pytest.raises(TemplateUnsupported, match="at random"):
        template(use + CHATML)


def test_marks_for_answers_and_attributes_named_random_are_fine() -> None:
    marked = CHATML.replace("{{", "{% generation %}{{", 1).replace("}}", "}}{{ message.random }}{% endgeneration %}", 1)
    text = "{% set roles = messages | map(attribute='role') %}" + marked
    assert template(text).prompt(QUESTION) == template(CHATML).prompt(QUESTION)


def test_of_several_templates_the_default_is_used() -> None:
    several = template({"default": CHATML, "tool_use": STRICT})
    assert several.context("The harbour.") == template(CHATML).context("The harbour.")
    with pytest.raises(TemplateUnsupported, match="is the default"):
        template({"rag": CHATML, "tool_use": CHATML})


def test_a_template_that_is_no_jinja_is_refused() -> None:
    with pytest.raises(TemplateUnsupported, match="can't be read"):
        template("{% for m in messages %}")
