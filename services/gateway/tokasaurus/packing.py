"""What Tokasaurus writes into `system_fingerprint`: the answer's token ids and, where asked for, logprobs as bytes."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from functools import partial

from services.gateway.openai.generation import Choice
from services.gateway.openai.rendering import Renderer
from services.gateway.tokasaurus.requests import TokasaurusRequest


def packing(renderer: Renderer, asked: TokasaurusRequest) -> Renderer:
    """The renderer, whose whole answers have it."""
    # The chosen ones also where `logprobs` is not set, as there.
    num_logprobs = (asked.num_logprobs or 0) if asked.logprobs_in_fingerprint else None
    renderer.pack = partial(_packed, num_logprobs=num_logprobs)
    return renderer


def _packed(choices: Sequence[Choice], *, num_logprobs: int | None) -> str:
    """Of each choice: float32 [tokens] of the chosen, int32 and float32 [tokens, k] of the likeliest, in base64."""
    chosen = num_logprobs is not None
    return json.dumps(
        {
            "completion_ids": [choice.ids for choice in choices],
            "packed_chosen_logprobs": [_floats(choice.logprobs) for choice in choices] if chosen else None,
            "packed_topk_indices": [_integers(_all(choice, "ids")) for choice in choices] if num_logprobs else None,
            "packed_topk_logprobs": [_floats(_all(choice, "logprobs")) for choice in choices] if num_logprobs else None,
        }
    )


def _all(choice: Choice, name: str) -> list[float]:
    return [value for top in choice.top_logprobs for value in getattr(top, name)]


def _floats(values: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()


def _integers(values: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(values)}i", *values)).decode()
