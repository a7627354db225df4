"""Text in which the spelling of a control token is text, beside control tokens that a template writes.

A tokenizer takes the spelling of a control token for the token wherever it stands: in a message or a document, and in
the template around them. To encode these apart would give other ids, since tokenizers merge and prefix where they
meet. So the whole is encoded, by a copy of the tokenizer that knows control tokens by aliases alone.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from foundry.errors import TemplateUnsupported


class LiteralTokenizer:
    """A tokenizer's copy for texts that spell control tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Mapping[str, int]) -> None:
        """`control` are the tokens' ids by spelling. Raises TemplateUnsupported if the tokenizer can't be copied."""
        if not tokenizer.is_fast:
            raise TemplateUnsupported(
                "a text spells a control token: without a tokenizer.json it can't be read as text"
            )
        # Templates leave digits as they are, and nobody can have written these. No id depends on them.
        self._nonce = nonce = str(secrets.randbits(128))
        self._aliases = {spelling: f"[{nonce}:{number}:0]" for number, spelling in enumerate(control)}
        self._stand_ins = {spelling: f"[{nonce}:{number}:1]" for number, spelling in enumerate(control)}
        self._spellings = {stand_in: spelling for spelling, stand_in in self._stand_ins.items()}
        # What is in no vocabulary becomes the unknown token, which steers nothing.
        self._control = frozenset(control.values()) - {tokenizer.unk_token_id}
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        for token in described["added_tokens"]:
            token["content"] = self._aliases.get(token["content"], token["content"])
        self._tokenizer = Tokenizer.from_str(json.dumps(described))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The copy numbers aliases anew, since no vocabulary has them.
        self._ids = {self._tokenizer.token_to_id(token["content"]): token["id"] for token in described["added_tokens"]}

    def ids(self, texts: Sequence[str], render: Callable[[Sequence[str]], str]) -> list[int]:
        """Token ids of what `render` makes of the texts; it gets them with stand-ins for what they spell.

        It may leave texts out. Raises TemplateUnsupported if it changes a stand-in, and if a control token's spelling
        has no other tokens.
        """
        hidden = [_replaced(text, self._stand_ins) for text in texts]
        rendered = render(hidden)
        if rendered.count(self._nonce) > sum(map(rendered.count, self._spellings)):
            raise TemplateUnsupported("the chat template changes a text that spells a control token")
        written = _replaced(_replaced(rendered, self._aliases), self._spellings)
        # A batch of one: other threads go on meanwhile, which `encode` does not let them.
        (encoded,) = self._tokenizer.encode_batch([written], add_special_tokens=False)
        ids = encoded.ids
        if any(each in self._control and each not in self._ids for each in ids):
            raise TemplateUnsupported("a text spells a control token, for which the tokenizer has no other tokens")
        return [self._ids.get(each, each) for each in ids]


def spelled(control: Iterable[str]) -> re.Pattern[str]:
    """Finds the spellings of control tokens, of several at one place the longest, as tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")


def _replaced(text: str, replacements: Mapping[str, str]) -> str:
    return spelled(replacements).sub(lambda found: replacements[found[0]], text)
