"""How a cartridge starts: which KV it holds before the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foundry.errors import CartridgeTooLong, InvalidArgument
from foundry.model.attention.compacting import CompactingAttention, Compaction
from foundry.model.lm import FrozenLM
from foundry.model.rotation import KeyRotation


def cut_context(context: Sequence[int], closing: Sequence[int], num_tokens: int) -> list[int]:
    """The context's first tokens and its closing tokens, `num_tokens` in all.

    The beginning-of-sequence, the system header and the end of the system turn thus stand inside the cartridge.
    Raises CartridgeTooLong if the context is shorter than asked.
    """
    check_num_tokens(num_tokens, len(context), len(closing))
    return [*context[: num_tokens - len(closing)], *closing]


@torch.no_grad()
def compact(
    lm: FrozenLM, context: Sequence[int], references: Sequence[Sequence[int]], compaction: Compaction
) -> Tensor:
    """KV [L, 2, G, P, D] of the context's tokens that `references` attend to most, with their values refitted.

    A reference is a turn with its answer; those of all references together say what is worth keeping. Kept keys are
    turned by p - n, so that they are as far from the conversation, which now begins at p, as they were when it began at
    n. At p = n this is the context's KV itself. References for which the model has no room behind the context are left
    out. Raises CartridgeTooLong, InvalidArgument if none is left, and ModelUnsupported if keys can't be turned.
    """
    check_num_tokens(compaction.num_tokens, len(context), compaction.num_last)
    document_L2GND = lm.prefill(context)
    if compaction.num_tokens == len(context):
        return document_L2GND
    fitting = [sequence for sequence in references if len(context) + len(sequence) <= lm.spec.max_tokens]
    if not fitting:
        raise InvalidArgument(
            f"none of {len(references)} references fits behind the document's {len(context)} tokens: the model's "
            f"context is {lm.spec.max_tokens}; use init first_tokens, or a shorter document",
            field="init",
        )
    rotation = KeyRotation.of(lm)
    plan = CompactingAttention(fitting, document_L2GND, compaction)
    ids_T = torch.tensor([token for sequence in fitting for token in sequence], device=lm.device)
    lm.hidden(ids_T, plan.positions_T, plan)
    key_LGPD, value_LGPD = torch.stack(plan.kept).unbind(1)
    turned_LGPD = rotation.turn(key_LGPD, compaction.num_tokens - len(context))
    return torch.stack([turned_LGPD, value_LGPD], dim=1).to(lm.dtype)


def check_num_tokens(num_tokens: int, num_context: int, num_closing: int) -> None:
    """Raises CartridgeTooLong beyond the document's context, InvalidArgument if the closing would leave no room."""
    if num_tokens > num_context:
        raise CartridgeTooLong(
            f"a cartridge of {num_tokens} tokens was asked for, but the document's context has only {num_context}",
            field="num_tokens",
        )
    if num_tokens <= num_closing + 1:
        raise InvalidArgument(
            f"num_tokens is {num_tokens}: it must exceed the template's {num_closing} closing tokens by at least two",
            field="num_tokens",
        )
