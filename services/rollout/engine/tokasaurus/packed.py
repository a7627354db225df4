"""Answers of Tokasaurus' servers: ids and, packed, logprobs as JSON within `system_fingerprint`.

n: tokens of the answer, K: alternatives per token.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# By which a logprob, computed in float32, may lie above 0.
_ROUNDING = 1e-3


@dataclass(frozen=True, slots=True)
class ExternalAnswer:
    """Tokens with their logprobs (natural), and for each token the alternatives that were asked for."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    top_logprobs: Sequence[tuple[tuple[int, float], ...]]
    # Of the prompt, whose KV was reused.
    cached_tokens: int


def read_answer(content: bytes, *, vocab_size: int, max_tokens: int, num_alternatives: int) -> ExternalAnswer:
    """Of one sequence. Raises ValueError, TypeError, LookupError or RecursionError if it is no answer to that."""
    answer = json.loads(content)
    packed = json.loads(answer["system_fingerprint"])
    (ids,) = packed["completion_ids"]
    if not isinstance(ids, list) or not 1 <= len(ids) <= max_tokens:
        raise ValueError(f"not 1 to {max_tokens} tokens")
    _check_ids(ids, vocab_size)
    logprobs_n = _logprobs(packed["packed_chosen_logprobs"], (len(ids),))
    top_logprobs: Sequence[tuple[tuple[int, float], ...]] = [()] * len(ids)
    if num_alternatives:
        shape = len(ids), num_alternatives
        top_ids_nK = _array(packed["packed_topk_indices"], "<i4", shape).tolist()
        for row in top_ids_nK:
            _check_ids(row, vocab_size)
        top_logprobs_nK = _logprobs(packed["packed_topk_logprobs"], shape).tolist()
        top_logprobs = [
            tuple(zip(row_ids, row, strict=True)) for row_ids, row in zip(top_ids_nK, top_logprobs_nK, strict=True)
        ]
    details = answer["usage"]["prompt_tokens_details"] or {}
    return ExternalAnswer(ids, logprobs_n.tolist(), top_logprobs, int(details.get("cached_tokens") or 0))


def _check_ids(ids: Sequence[Any], vocab_size: int) -> None:
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise ValueError(f"{token_id!r:.20} is no token of a vocabulary of {vocab_size}")


def _logprobs(packed: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    found = _array(packed, "<f4", shape)
    if not (found <= _ROUNDING).all():
        raise ValueError("logprobs above 0, or none")
    return np.where(found > 0, 0, found)


def _array(packed: Any, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Of the only sequence, in row-major order."""
    (text,) = packed
    found = np.frombuffer(base64.b64decode(text, validate=True), dtype=dtype)
    if found.size != np.prod(shape):
        raise ValueError(f"{found.size} numbers where {' x '.join(map(str, shape))} belong")
    return found.reshape(shape)
