"""Conversations for tests that don't care where they are from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.trainer.data.conversation import Conversation


def conversation(turn_ids: Sequence[int], answer_ids: Sequence[int] = (), **more: Any) -> Conversation:
    values: dict[str, Any] = {"family": "prompts", "kind": "", "prompt": "", "passage": 0, "passage_tokens": 0}
    return Conversation(**values | {"context": "", "turn_ids": turn_ids, "answer_ids": answer_ids} | more)
