"""Many sequences in one forward on a CPU: those behind one prefix attend to it in one call, and to themselves apart.

Both parts are merged by their log-sum-exp, as in Hydragen (https://arxiv.org/abs/2402.05099), so there is no mask, and
no score that is thrown away. Nor is a prefix copied for its sequences: backward is one step for all of them, in which
torch's kernel gets the merged outputs and log-sum-exps, under which either part has its share of the whole gradient.

Shape suffixes as in `foundry.model.lm`, and R query heads per kv head.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from foundry.model.attention import check_lengths
from foundry.model.attention.packed import layers_of, packed_positions

# The public function keeps the log-sum-exp to itself.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class SharedPrefixAttention:
    """Sequences laid end to end; each sees the whole of its prefix and, causally, itself. Does what `PackedAttention`
    does."""

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        prefixes: Sequence[Tensor | None],
        max_tokens: int,
        device: torch.device,
    ) -> None:
        lengths = [len(sequence) for sequence in sequences]
        prefix_lengths = check_lengths(sequences, prefixes, max_tokens)
        self.positions_T = packed_positions(lengths, prefix_lengths, device)
        begins = [0, *accumulate(lengths)]
        self._sequences = [slice(begin, end) for begin, end in pairwise(begins)]
        # Consecutive tokens behind one prefix, and the prefix.
        self._runs: list[slice] = []
        self._prefixes: list[list[tuple[Tensor, ...]]] = []
        for _, some in groupby(range(len(prefixes)), lambda index: id(prefixes[index])):
            first, *_ = indices = list(some)
            # A bare context may have no tokens; torch's kernel would divide by their number.
            if (prefix := prefixes[first]) is not None and prefix_lengths[first]:
                self._runs.append(slice(begins[first], begins[indices[-1] + 1]))
                self._prefixes.append(layers_of(prefix))

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        prefixes = [each for prefix in self._prefixes for each in prefix[layer]]
        out_THD: Tensor = _Attend.apply(self._sequences, self._runs, scale, q_HTD, k_GTD, v_GTD, *prefixes)  # type: ignore[no-untyped-call]
        return out_THD


class _Attend(torch.autograd.Function):
    """One layer's attention. `prefixes` are keys and values [G, P, D], in turn, of each of the runs."""

    @staticmethod
    def forward(
        ctx: Any,
        sequences: Sequence[slice],
        runs: Sequence[slice],
        scale: float,
        q_HTD: Tensor,
        k_GTD: Tensor,
        v_GTD: Tensor,
        *prefixes: Tensor,
    ) -> Tensor:
        q_RGTD = _by_group(q_HTD.transpose(0, 1), len(k_GTD))
        out_THD = q_HTD.new_empty(q_HTD.transpose(0, 1).shape)
        out_RGTD = _by_group(out_THD, len(k_GTD))
        lse_RGT = q_HTD.new_empty(q_RGTD.shape[:3], dtype=torch.float32)
        for own in sequences:
            kv = _for_all(q_RGTD, k_GTD[:, own], v_GTD[:, own])
            out_RGTD[:, :, own], lse_RGT[:, :, own] = _flash(q_RGTD[:, :, own], *kv, is_causal=True, scale=scale)
        for run, k_GPD, v_GPD in zip(runs, prefixes[::2], prefixes[1::2], strict=True):
            part, part_lse = _flash(q_RGTD[:, :, run], *_for_all(q_RGTD, k_GPD, v_GPD), scale=scale)
            out, lse = out_RGTD[:, :, run], lse_RGT[:, :, run]
            out.lerp_(part, torch.sigmoid(part_lse - lse)[..., None].to(part.dtype))
            torch.logaddexp(lse, part_lse, out=lse)
        ctx.save_for_backward(q_HTD, k_GTD, v_GTD, out_THD, lse_RGT, *prefixes)
        ctx.sequences, ctx.runs, ctx.scale = sequences, runs, scale
        return out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_HTD, k_GTD, v_GTD, out_THD, lse_RGT, *prefixes = ctx.saved_tensors
        grad_RGTD, q_RGTD, out_RGTD = (
            _by_group(each_THD, len(k_GTD)) for each_THD in (grads[0], q_HTD.transpose(0, 1), out_THD)
        )
        dq_THD = torch.zeros_like(out_THD)
        dq_RGTD = _by_group(dq_THD, len(k_GTD))

        def part(rows: slice, k_GKD: Tensor, v_GKD: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
            of_rows = (each[:, :, rows] for each in (out_RGTD, lse_RGT))
            dq, *dkv_RGKD = _flash_backward(
                grad_RGTD[:, :, rows],
                q_RGTD[:, :, rows],
                *_for_all(q_RGTD, k_GKD, v_GKD),
                *of_rows,
                0.0,
                is_causal,
                scale=ctx.scale,
            )
            dq_RGTD[:, :, rows] += dq
            dk_GKD, dv_GKD = (each.sum(0) for each in dkv_RGKD)
            return dk_GKD, dv_GKD

        dk_GTD, dv_GTD = torch.empty_like(k_GTD), torch.empty_like(v_GTD)
        for own in ctx.sequences:
            dk_GTD[:, own], dv_GTD[:, own] = part(own, k_GTD[:, own], v_GTD[:, own], is_causal=True)
        of_prefixes = [
            each
            for run, k_GPD, v_GPD in zip(ctx.runs, prefixes[::2], prefixes[1::2], strict=True)
            for each in part(run, k_GPD, v_GPD, is_causal=False)
        ]
        return None, None, None, dq_THD.transpose(0, 1), dk_GTD, dv_GTD, *of_prefixes


def _by_group(each_THD: Tensor, num_kv_heads: int) -> Tensor:
    """[R, G, T, D] of the same memory."""
    num_tokens, num_heads, head_dim = each_THD.shape
    return each_THD.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim).permute(2, 1, 0, 3)


def _for_all(q_RGTD: Tensor, k_GKD: Tensor, v_GKD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values for each of the R heads of their group, not copied."""
    return k_GKD.expand(len(q_RGTD), -1, -1, -1), v_GKD.expand(len(q_RGTD), -1, -1, -1)
