"""Attention to keys that every query sees, with its log-sum-exp, so that other parts can be merged with it.

By cuDNN's kernel, which reads a long prefix faster than FlexAttention's does. Shape suffixes: `foundry.model.lm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST_HEAD_DIM = 128


def reads_whole(kv_L2GPD: Tensor | None) -> bool:
    """Whether there is such a kernel for a prefix of this kind."""
    return (
        kv_L2GPD is not None
        and kv_L2GPD.is_cuda
        and torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
        and kv_L2GPD.dtype in (torch.bfloat16, torch.float16)
        and kv_L2GPD.shape[-1] % 8 == 0
        and kv_L2GPD.shape[-1] <= _LARGEST_HEAD_DIM
    )


@torch.library.custom_op("foundry::attend_whole", mutates_args=())
def attend_whole(q_HTD: Tensor, k_GPD: Tensor, v_GPD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Outputs [H, T, D] and natural log-sum-exps [H, T], float32. Without a gradient."""
    if reads_whole(k_GPD):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q_HTD[None], k_GPD[None], v_GPD[None], None, True, 0.0, False, False, scale=scale
        )
        return out[0].contiguous(), lse.reshape(q_HTD.shape[:2]).float()
    # Every score in memory: for what is small and to be exact.
    groups = q_HTD.shape[0] // k_GPD.shape[0]
    k_HPD, v_HPD = (each.repeat_interleave(groups, dim=0) for each in (k_GPD, v_GPD))
    scores_HTP = (q_HTD @ k_HPD.transpose(1, 2)).float() * scale
    return (scores_HTP.softmax(-1).to(v_HPD.dtype) @ v_HPD).contiguous(), scores_HTP.logsumexp(-1)


@attend_whole.register_fake
def _(q_HTD: Tensor, k_GPD: Tensor, v_GPD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out_HTD = torch.empty(q_HTD.shape, dtype=q_HTD.dtype, device=q_HTD.device)
    return out_HTD, q_HTD.new_empty(q_HTD.shape[:2], dtype=torch.float32)
