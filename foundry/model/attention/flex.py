"""Many sequences in one forward, none of which sees another, in one kernel that visits only blocks somebody sees.

FlexAttention (https://arxiv.org/abs/2412.05496), compiled with the layers. The keys of a layer are those of the
distinct prefixes, each once however many sequences stand behind it, and then the packed tokens' own. Prefixes begin at
a block's border, and the packed tokens are filled up to one, so that few shapes exist. One prefix that all see, whose
gradient nobody wants, is read by a kernel without a mask (`whole`). Shape suffixes: `foundry.model.lm`, and K all keys,
Q blocks of queries, C blocks of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from foundry.model.attention import LayerAttention, LayeredPlan, check_lengths
from foundry.model.attention.whole import attend_whole, reads_whole
from foundry.model.transfer import to_device

BLOCK = 128
# In blocks, how long the packed tokens may be where few lengths are wanted: a full micro-batch of training, halves of
# it and three quarters of these. So of a full one nothing is filling, of any other at most a third.
_FILLED_BLOCKS = sorted({max(2, math.ceil(36 * part * 2.0**power)) for part in (1, 0.75) for power in range(-4, 6)})
# Where code is compiled for every length, which takes 10 s: what is left over at the end of a step is filled up to half
# a micro-batch rather than compiled for.
_COMPILED_BLOCKS = [blocks for blocks in _FILLED_BLOCKS if blocks >= 18]


@dataclass(frozen=True)
class Spans:
    """What each packed token sees: keys from `prefix_begin` to before `prefix_end`, and from `own_begin` to before
    `own_end`, its own included. int32 on the CPU or a device."""

    prefix_begin_T: Tensor
    prefix_end_T: Tensor
    own_begin_T: Tensor
    own_end_T: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], prefixes: Sequence[tuple[int, int]], num_prefix_keys: int) -> Spans:
        """Of sequences laid end to end, each behind keys (begin, end) among the `num_prefix_keys` that come first."""
        lengths_S = torch.tensor(lengths)
        begins_S = lengths_S.cumsum(0) - lengths_S
        rows_4S = torch.stack([*torch.tensor(prefixes).T, num_prefix_keys + begins_S, torch.zeros_like(begins_S)])
        rows_4T = rows_4S.repeat_interleave(lengths_S, dim=1).int()
        rows_4T[3] = num_prefix_keys + 1 + torch.arange(rows_4T.shape[1])
        return cls(*rows_4T)

    def to(self, device: torch.device) -> Spans:
        rows_4T = torch.stack([self.prefix_begin_T, self.prefix_end_T, self.own_begin_T, self.own_end_T])
        return Spans(*to_device(rows_4T, device))


def block_mask(spans: Spans, num_keys: int) -> BlockMask:
    """Which blocks are seen in part and which by all their queries, of T queries and `num_keys` keys in whole blocks.

    By counting how much of every block each query sees; no [T, K] is made, and no device is waited for.
    """
    begin_C = torch.arange(0, num_keys, BLOCK, dtype=torch.int32, device=spans.own_end_T.device)
    seen_TC = _overlap(spans.prefix_begin_T, spans.prefix_end_T, begin_C)
    seen_TC += _overlap(spans.own_begin_T, spans.own_end_T, begin_C)
    seen_QC = seen_TC.view(-1, BLOCK, len(begin_C)).sum(1)
    full_QC = seen_QC == BLOCK * BLOCK
    partial_QC = (seen_QC > 0) & ~full_QC
    return BlockMask.from_kv_blocks(
        *_ordered(partial_QC),
        *_ordered(full_QC),
        BLOCK_SIZE=BLOCK,
        mask_mod=_visible(spans),
        seq_lengths=(len(spans.own_end_T), num_keys),
    )


def _overlap(begin_T: Tensor, end_T: Tensor, block_C: Tensor) -> Tensor:
    """How many keys [T, C] of the blocks that begin at `block_C` lie in each token's span."""
    first_TC = torch.maximum(begin_T[:, None], block_C)
    return (torch.minimum(end_T[:, None], block_C + BLOCK) - first_TC).clamp_(min=0)


def _ordered(blocks_QC: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row how many blocks are set [1, 1, Q], and which: these come first in [1, 1, Q, C]."""
    order_QC = blocks_QC.byte().argsort(dim=-1, descending=True, stable=True)
    return blocks_QC.sum(-1, dtype=torch.int32)[None, None], order_QC.int()[None, None]


def _visible(spans: Spans) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    # Tensors in the function's closure become inputs of compiled code; numbers would have it compiled anew.
    prefix_begin_T, prefix_end_T = spans.prefix_begin_T, spans.prefix_end_T
    own_begin_T, own_end_T = spans.own_begin_T, spans.own_end_T

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prefix = (key >= prefix_begin_T[query]) & (key < prefix_end_T[query])
        return in_prefix | ((key >= own_begin_T[query]) & (key < own_end_T[query]))

    return visible


@dataclass(frozen=True)
class FlexLayer(LayerAttention):
    """Prefix keys and values [G, P, D] of one layer, and what all layers share.

    The mask is over the prefix's keys and the packed tokens' own or, `apart`, over the latter alone.
    """

    k_GPD: Tensor | None
    v_GPD: Tensor | None
    mask: BlockMask
    apart: bool

    def attend(self, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        if self.k_GPD is None or self.v_GPD is None:
            out_HTD: Tensor = self._flex(q_HTD, k_GTD, v_GTD, scale=scale)[0]
        elif not self.apart:
            k_GTD = torch.cat([self.k_GPD, k_GTD], dim=1)
            v_GTD = torch.cat([self.v_GPD, v_GTD], dim=1)
            out_HTD = self._flex(q_HTD, k_GTD, v_GTD, scale=scale)[0]
        else:
            own, aux = self._flex(q_HTD, k_GTD, v_GTD, scale=scale, return_aux=AuxRequest(lse=True))
            prefix_HTD, lse_HT = attend_whole(q_HTD, self.k_GPD, self.v_GPD, scale)
            own_share_HT1 = torch.sigmoid(aux.lse[0] - lse_HT)[..., None].to(own.dtype)
            out_HTD = torch.lerp(prefix_HTD, own[0], own_share_HT1)
        return out_HTD.transpose(0, 1)

    def _flex(self, q_HTD: Tensor, k_GKD: Tensor, v_GKD: Tensor, **options: Any) -> Any:
        # Said to compiled code, which then reads whole blocks without asking where they end.
        torch._check(q_HTD.shape[1] % BLOCK == 0)  # type: ignore[no-untyped-call]
        torch._check(k_GKD.shape[1] % BLOCK == 0)  # type: ignore[no-untyped-call]
        return flex_attention(q_HTD[None], k_GKD[None], v_GKD[None], block_mask=self.mask, enable_gqa=True, **options)


class FlexAttention(LayeredPlan):
    """Sequences laid end to end; each sees the whole of its prefix and, causally, itself.

    For a model whose layers `compile_layers` has seen. `positions_T` has a whole number of blocks, at least two (a
    dimension of one is compiled for by itself); what stands behind the sequences sees only itself.
    """

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        prefixes: Sequence[Tensor | None],
        max_tokens: int,
        device: torch.device,
    ) -> None:
        """Prefixes are KV [L, 2, G, P, D]. Raises InvalidArgument for an empty or too long sequence."""
        prefix_lengths = check_lengths(sequences, prefixes, max_tokens)
        lengths = [len(sequence) for sequence in sequences]
        distinct = {id(prefix): prefix for prefix in prefixes if prefix is not None}
        # In training, where the prefix is the same again and again.
        self.fixed_lengths = any(prefix.requires_grad for prefix in distinct.values())
        self._apart = not self.fixed_lengths and len({*map(id, prefixes)}) == 1 and reads_whole(prefixes[0])
        num_filled = max(2 * BLOCK, _whole(sum(lengths)))
        if self.fixed_lengths or self._apart:
            lengths_in_blocks = _COMPILED_BLOCKS if self.fixed_lengths else _FILLED_BLOCKS
            num_filled = next((BLOCK * each for each in lengths_in_blocks if BLOCK * each >= num_filled), num_filled)
        num_fill = num_filled - sum(lengths)
        # Taken apart once: the gradient of indexing is a whole prefix of zeros for every layer.
        self._prefixes = [prefix.unbind(0) for prefix in distinct.values()]
        spans: dict[int, tuple[int, int]] = {}
        num_prefix_keys = 0
        for key, prefix in distinct.items():
            if not self._apart:
                spans[key] = (num_prefix_keys, num_prefix_keys + prefix.shape[3])
                num_prefix_keys += _whole(prefix.shape[3])
        behind = [spans.get(id(prefix), (0, 0)) for prefix in prefixes]
        if num_fill:
            lengths, prefix_lengths, behind = [*lengths, num_fill], [*prefix_lengths, 0], [*behind, (0, 0)]
        positions_T = [
            torch.arange(begin, begin + length) for begin, length in zip(prefix_lengths, lengths, strict=True)
        ]
        self.positions_T = to_device(torch.cat(positions_T), device)
        num_keys = num_prefix_keys + sum(lengths)
        self._mask = block_mask(Spans.of(lengths, behind, num_prefix_keys).to(device), num_keys)

    def layer(self, index: int) -> FlexLayer:
        if not self._prefixes:
            return FlexLayer(None, None, self._mask, apart=False)
        if self._apart:
            k_GPD, v_GPD = self._prefixes[0][index].unbind(0)
            # A length of its own, else code is compiled for prefixes that happen to be as long as something else.
            for prefix_GPD in (k_GPD, v_GPD):
                torch._dynamo.maybe_mark_dynamic(prefix_GPD, 1)
            return FlexLayer(k_GPD, v_GPD, self._mask, apart=True)
        parts = [_filled(layers[index]) for layers in self._prefixes]
        k_GPD, v_GPD = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).unbind(0)
        return FlexLayer(k_GPD, v_GPD, self._mask, apart=False)

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        return self.layer(layer).attend(q_HTD, k_GTD, v_GTD, scale)


def _whole(num_tokens: int) -> int:
    """In whole blocks."""
    return -(-num_tokens // BLOCK) * BLOCK


def _filled(kv_2GPD: Tensor) -> Tensor:
    """In whole blocks, behind a prefix's end with zeros: nobody sees them, but they are multiplied by 0."""
    num_fill = _whole(kv_2GPD.shape[2]) - kv_2GPD.shape[2]
    return F.pad(kv_2GPD, (0, 0, 0, num_fill)) if num_fill else kv_2GPD
