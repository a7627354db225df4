"""Triton kernels: attention of tiles of tokens to stretches of keys, the merge of what comes out, the writing of KV.

A tile is a few neighbouring tokens of the step with all query heads of one kv head, in one product with keys that all
of them see: of their own slot, causally, or of a cartridge, whole. Where the keys lie is an address in the tile's row
of a table, so that one launch serves slots and cartridges of any number and length, and a captured graph goes on
serving whatever a later step brings. What a token gets from its own slot and from each of its cartridges are parts,
merged by their log-sum-exp as in Hydragen (https://arxiv.org/abs/2402.05099); keys of one part may be split among
several programs (Flash-Decoding, https://pytorch.org/blog/flash-decoding/), whose results are parts too.

Shape suffixes as in `foundry.model.lm`, and N parts.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of a tile's row of int64, as the kernel numbers them. The address is that of the first layer's first key, strides are
# in elements.
COLUMNS = (
    "address",
    "layer_stride",
    "value_stride",
    "head_stride",
    "first_token",
    "num_tokens",
    "num_keys",
    "causal",
    "part",
)


@triton.jit(do_not_specialize=["layer"])
def attend_tiles(
    q_ptr,
    q_head_stride,
    q_token_stride,
    tiles_ptr,
    num_tiles_ptr,
    out_ptr,
    lse_ptr,
    num_tokens,
    layer,
    scale_log2,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes parts [N, T, H, D] and their log-sum-exp to base 2 [N, T, H], float32.

    Any number of programs share the tiles that there are, their kv heads and splits: a table has room for more.
    """
    num_items = tl.load(num_tiles_ptr) * (H // R * SPLITS)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        _attend_tile(
            q_ptr,
            q_head_stride,
            q_token_stride,
            tiles_ptr + item // (H // R * SPLITS) * COLUMNS,
            item // SPLITS % (H // R),
            item % SPLITS,
            out_ptr,
            lse_ptr,
            num_tokens,
            layer,
            scale_log2,
            H,
            R,
            D,
            BLOCK_D,
            BLOCK_M,
            BLOCK_N,
            SPLITS,
            PRECISION,
        )


@triton.jit
def _attend_tile(
    q_ptr,
    q_head_stride,
    q_token_stride,
    tile_ptr,
    kv_head,
    split,
    out_ptr,
    lse_ptr,
    num_tokens,
    layer,
    scale_log2,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One kv head's share of a tile's keys. Its first token sees `num_keys` keys; where `causal` is 1, each later one
    sees one more."""
    num_rows = tl.load(tile_ptr + 5)
    first_token = tl.load(tile_ptr + 4)
    num_seen = tl.load(tile_ptr + 6)
    causal = tl.load(tile_ptr + 7)
    part = tl.load(tile_ptr + 8) + split
    key_ptr = tl.load(tile_ptr).to(tl.pointer_type(q_ptr.dtype.element_ty))
    key_ptr += layer * tl.load(tile_ptr + 1) + kv_head * tl.load(tile_ptr + 3)
    value_ptr = key_ptr + tl.load(tile_ptr + 2)
    key_ptr = tl.multiple_of(key_ptr, 16)
    value_ptr = tl.multiple_of(value_ptr, 16)

    row = tl.arange(0, BLOCK_M)
    token = row // R
    head = kv_head * R + row % R
    valid = token < num_rows
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < D
    q_offsets = head * q_head_stride + (first_token + token) * q_token_stride
    q = tl.load(q_ptr + q_offsets[:, None] + dim[None, :], mask=valid[:, None] & in_head[None, :], other=0.0)

    num_keys = num_seen + (num_rows - 1) * causal
    limit = num_seen + token * causal
    share = tl.cdiv(tl.cdiv(num_keys, BLOCK_N), SPLITS) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, num_keys)
    greatest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        there = key < end
        offsets = key[:, None] * D + dim[None, :]
        mask = there[:, None] & in_head[None, :]
        k = tl.load(key_ptr + offsets, mask=mask, other=0.0)
        v = tl.load(value_ptr + offsets, mask=mask, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        score = tl.where(there[None, :] & (key[None, :] < limit[:, None]), score, float("-inf"))
        new_greatest = tl.maximum(greatest, tl.max(score, 1))
        # A row that has seen nothing yet stays at 0 x 2^0.
        base = tl.where(new_greatest == float("-inf"), 0.0, new_greatest)
        weight = tl.exp2(score - base[:, None])
        kept = tl.exp2(greatest - base)
        total = total * kept + tl.sum(weight, 1)
        out = out * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
        greatest = new_greatest
    seen_any = total > 0
    total = tl.where(seen_any, total, 1.0)
    out = out / total[:, None]
    lse = tl.where(seen_any, greatest + tl.log2(total), float("-inf"))
    at = (part * num_tokens + first_token + token) * H + head
    tl.store(out_ptr + at[:, None] * D + dim[None, :], out, mask=valid[:, None] & in_head[None, :])
    tl.store(lse_ptr + at, lse, mask=valid)


@triton.jit
def merge_parts(
    part_ptr,
    lse_ptr,
    num_parts_ptr,
    out_ptr,
    num_tokens,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: tokens, query heads. Attention outputs [T, H, D] over all parts of each token; zeros where it has none."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < D
    greatest = float("-inf")
    total = 0.0
    out = tl.zeros([BLOCK_D], tl.float32)
    for part in range(tl.load(num_parts_ptr + token)):
        at = (part * num_tokens + token) * H + head
        lse = tl.load(lse_ptr + at)
        if lse > float("-inf"):
            new_greatest = tl.maximum(greatest, lse)
            kept = tl.exp2(greatest - new_greatest)
            weight = tl.exp2(lse - new_greatest)
            out = out * kept + tl.load(part_ptr + at * D + dim, mask=in_head, other=0.0) * weight
            total = total * kept + weight
            greatest = new_greatest
    out = out / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + (token * H + head) * D + dim, out.to(out_ptr.dtype.element_ty), mask=in_head)


@triton.jit(do_not_specialize=["layer"])
def write_kv(
    k_ptr,
    v_ptr,
    k_head_stride,
    k_token_stride,
    v_head_stride,
    v_token_stride,
    kv_ptr,
    slots_ptr,
    indices_ptr,
    layer,
    layer_stride,
    value_stride,
    slot_stride,
    head_stride,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: tokens, kv heads. Puts each token's key and value into its slot; an index below 0 belongs to no token."""
    token = tl.program_id(0)
    kv_head = tl.program_id(1)
    index = tl.load(indices_ptr + token)
    if index < 0:
        return
    dim = tl.arange(0, BLOCK_D)
    in_head = dim < D
    # The slots of all layers have more elements than 32 bits count.
    layer = layer.to(tl.int64)
    at = layer * layer_stride + tl.load(slots_ptr + token) * slot_stride + kv_head * head_stride + index * D
    k = tl.load(k_ptr + kv_head * k_head_stride + token * k_token_stride + dim, mask=in_head)
    v = tl.load(v_ptr + kv_head * v_head_stride + token * v_token_stride + dim, mask=in_head)
    tl.store(kv_ptr + at + dim, k, mask=in_head)
    tl.store(kv_ptr + at + value_stride + dim, v, mask=in_head)
