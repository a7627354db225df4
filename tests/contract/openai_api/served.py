"""What the official client meets, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openai import OpenAI
from openai.types.chat import ChatCompletion

from foundry.model.cartridge import Cartridge
from foundry.model.template import ChatTemplate
from foundry.store import Manifest
from tests.services import Stack

MESSAGES: list[Any] = [{"role": "user", "content": "What does the document say about the treaty?"}]
BASE = "tiny"


@dataclass
class Served:
    stack: Stack
    client: OpenAI
    cartridges: list[Cartridge]
    manifests: list[Manifest]
    tenant: Manifest
    template: ChatTemplate

    @property
    def spelling(self) -> Any:
        return self.stack.lm.tokenizer

    def text(self, ids: list[int]) -> str:
        decoded = self.spelling.decode(ids, skip_special_tokens=True)
        assert isinstance(decoded, str)
        return decoded


def chat(served: Served, model: str = BASE, **options: Any) -> ChatCompletion:
    answer = served.client.chat.completions.create(
        **{"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 0, **options}
    )
    assert isinstance(answer, ChatCompletion)
    return answer


def extension(answer: Any) -> dict[str, Any]:
    found = answer.model_extra["foundry"]
    assert isinstance(found, dict)
    return found
