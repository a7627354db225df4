"""The split of a chat template: what student and teacher see after their prefix is the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundry.errors import DocumentTooLong, DocumentUnreadable, InvalidArgument, TemplateUnsupported
from foundry.model.template import ChatTemplate
from tests.tiny import CHATML, build_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
# Refuses two system messages in a row, as several published templates do.
STRICT = (
    "{% for m in messages %}"
    "{% if not loop.first and m.role == 'system' %}{{ raise_exception('one system') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)
QUESTION = [{"role": "user", "content": "What is open?"}]


def template(text: str = CHATML) -> ChatTemplate:
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize("text", [CHATML, LLAMA3])
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
        ChatTemplate(tokenizer)


def test_messages_that_the_template_refuses_are_the_callers_fault() -> None:
    with pytest.raises(InvalidArgument, match="one system") as caught:
        template(STRICT).turn([{"role": "system", "content": "Be brief."}, *QUESTION])
    assert caught.value.field == "messages"
    with pytest.raises(InvalidArgument, match="messages is empty"):
        template().turn([])


def test_documents_that_can_be_no_context() -> None:
    split = template()
    with pytest.raises(DocumentUnreadable, match="empty"):
        split.context(" \n\t")
    with pytest.raises(DocumentUnreadable, match="binary"):
        split.context("PK\x00\x03")
    with pytest.raises(DocumentTooLong, match=r"takes \d+ tokens .* has 20"):
        split.context("The harbour is open again. " * 10, max_tokens=20)


def test_digest_names_the_template() -> None:
    assert template(CHATML).digest == template(CHATML).digest != template(LLAMA3).digest
