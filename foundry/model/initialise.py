"""How a cartridge starts: which KV it holds before the first step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from foundry.errors import CartridgeTooLong, FingerprintMismatch, InvalidArgument, ShapeMismatch
from foundry.identity import CartridgeBytes
from foundry.model.attention.compacting import CompactingAttention, Compaction
from foundry.model.cartridge import Cartridge
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
    return rotation.move(torch.stack(plan.kept), compaction.num_tokens - len(context)).to(lm.dtype)


@torch.no_grad()
def random_tokens(lm: FrozenLM, context: Sequence[int], num_closing: int, num_tokens: int, seed: int) -> Tensor:
    """KV [L, 2, G, P, D] of tokens of the context that are drawn at random, as they stand in it, keys turned by p - n.

    The first token and the closing ones are always among them. Raises CartridgeTooLong and ModelUnsupported.
    """
    check_num_tokens(num_tokens, len(context), num_closing)
    middle = range(1, len(context) - num_closing)
    drawn = random.Random(seed).sample(middle, num_tokens - 1 - num_closing)
    places = torch.tensor([0, *sorted(drawn), *range(len(context) - num_closing, len(context))], device=lm.device)
    return KeyRotation.of(lm).move(lm.prefill(context)[:, :, :, places], num_tokens - len(context))


def from_version(lm: FrozenLM, stored: CartridgeBytes, num_tokens: int) -> Tensor:
    """The KV [L, 2, G, P, D] of a version. Raises FingerprintMismatch and ShapeMismatch if it is not for this run."""
    header = stored.header
    if header.model_fingerprint != lm.spec.fingerprint:
        raise FingerprintMismatch(
            f"the initial version is of model {header.model_fingerprint}, this one is {lm.spec.fingerprint}",
            field="init_version",
        )
    if header.num_tokens != num_tokens:
        raise ShapeMismatch(
            f"the initial version has {header.num_tokens} tokens, the run asks for {num_tokens}: ask for as many",
            field="init_version",
        )
    return Cartridge.from_bytes(stored, lm.device).kv_L2GPD.to(lm.dtype)


@torch.no_grad()
def side_by_side(lm: FrozenLM, parts: Sequence[Tensor]) -> Tensor:
    """One KV [L, 2, G, P, D] of several, of which each then stands right before the conversation, as it did alone.

    Keys are turned by what the others are longer; tokens do not see the order of what is before them, only distances.
    Raises ModelUnsupported if keys can't be turned.
    """
    if len(parts) == 1:
        return parts[0]
    rotation, num_tokens = KeyRotation.of(lm), sum(part.shape[3] for part in parts)
    moved = [rotation.move(part, num_tokens - part.shape[3]) for part in parts]
    return torch.cat(moved, dim=3)


def share_tokens(num_tokens: int, lengths: Sequence[int]) -> list[int]:
    """`num_tokens` dealt out in proportion to `lengths`, and none left over."""
    ends = [num_tokens * end // sum(lengths) for end in accumulate(lengths)]
    return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


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
