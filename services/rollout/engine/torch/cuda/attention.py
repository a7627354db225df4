"""Attention of a step whose work is in tables: four launches a layer, whatever the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary

import torch
import triton
from torch import Tensor

from foundry.model.attention import LayerAttention, LayeredPlan
from services.rollout.engine.torch.cuda.kernels import COLUMNS, attend_tiles, merge_parts, write_kv
from services.rollout.engine.torch.cuda.tables import StepShape, StepTables
from services.rollout.engine.torch.kv import SlotKV

# Rows of a matrix product that the GPU's units take at least.
_LEAST_ROWS = 16
_KEYS_AT_ONCE = 64
# As many as the largest GPUs hold at once; each goes on to the next tile.
_MOST_PROGRAMS = 1024


# By number: what compiled code is given of a plan is a tensor, lest it be compiled for each plan and layer.
_PLANS: WeakValueDictionary[int, TableAttention] = WeakValueDictionary()
_NUMBERS = count()


@torch.library.custom_op("foundry::attend_by_tables", mutates_args=())
def attend_by_tables(q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, where_2: Tensor, scale: float) -> Tensor:
    """Attention outputs [T, H, D]; `where_2`, plan and layer, is on the CPU.

    It writes slots too, which nothing else in a layer reads.
    """
    number, layer = where_2.tolist()
    return _PLANS[number].attend(layer, q_HTD, k_GTD, v_GTD, scale)


@attend_by_tables.register_fake
def _(q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, where_2: Tensor, scale: float) -> Tensor:
    return q_HTD.new_empty(q_HTD.shape[1], q_HTD.shape[0], q_HTD.shape[2])


@dataclass(frozen=True)
class _Layer(LayerAttention):
    where_2: Tensor

    def attend(self, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        out_THD: Tensor = attend_by_tables(q_HTD, k_GTD, v_GTD, self.where_2, scale)
        return out_THD


class TableAttention(LayeredPlan):
    """The plan of the step that the tables say."""

    def __init__(self, kv: SlotKV, tables: StepTables, num_heads: int) -> None:
        self._kv, self._tables, self._num_heads = kv, tables, num_heads
        self._groups = num_heads // kv.num_kv_heads
        shape = tables.shape
        parts = (shape.num_parts, shape.num_tokens, num_heads)
        self._parts_NTHD = torch.empty(*parts, kv.head_dim, dtype=torch.float32, device=kv.device)
        self._lse_NTH = torch.empty(parts, dtype=torch.float32, device=kv.device)
        self._block_d = triton.next_power_of_2(kv.head_dim)
        # As exact as the dtype is.
        self._precision = "ieee" if kv.dtype == torch.float32 else "tf32"
        number = next(_NUMBERS)
        _PLANS[number] = self
        self._layers = [_Layer(torch.tensor([number, layer])) for layer in range(len(kv.layers))]

    def layer(self, index: int) -> LayerAttention:
        return self._layers[index]

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        """As of `AttentionPlan`."""
        kv, shape, at = self._kv, self._tables.shape, self._tables.at
        dims = {"D": kv.head_dim, "BLOCK_D": self._block_d}
        write_kv[shape.num_tokens, kv.num_kv_heads](
            k_GTD,
            v_GTD,
            *k_GTD.stride()[:2],
            *v_GTD.stride()[:2],
            kv.first,
            at["slots"],
            at["indices"],
            layer,
            kv.layer_stride,
            kv.value_stride,
            kv.slot_stride,
            kv.head_stride,
            **dims,
        )
        self._attend_tiles(layer, q_HTD, "own_tiles", shape.own_tile_tokens, shape.own_splits, scale)
        self._attend_tiles(layer, q_HTD, "cartridge_tiles", shape.cartridge_tile_tokens, shape.cartridge_splits, scale)
        out_THD = torch.empty(shape.num_tokens, self._num_heads, kv.head_dim, dtype=q_HTD.dtype, device=q_HTD.device)
        merge_parts[shape.num_tokens, self._num_heads](
            self._parts_NTHD,
            self._lse_NTH,
            at["num_parts"],
            out_THD,
            shape.num_tokens,
            H=self._num_heads,
            **dims,
            num_warps=1,
        )
        return out_THD

    def _attend_tiles(self, layer: int, q_HTD: Tensor, name: str, tile_tokens: int, splits: int, scale: float) -> None:
        tiles = self._tables.at[name]
        most = len(tiles) * self._kv.num_kv_heads * splits
        attend_tiles[(min(most, _MOST_PROGRAMS),)](
            q_HTD,
            *q_HTD.stride()[:2],
            tiles,
            self._tables.at[f"num_{name}"],
            self._parts_NTHD,
            self._lse_NTH,
            self._tables.shape.num_tokens,
            layer,
            # Of exponentials to base 2, which the GPU has.
            scale * math.log2(math.e),
            H=self._num_heads,
            R=self._groups,
            D=self._kv.head_dim,
            BLOCK_D=self._block_d,
            BLOCK_M=max(_LEAST_ROWS, triton.next_power_of_2(tile_tokens * self._groups)),
            BLOCK_N=_KEYS_AT_ONCE,
            SPLITS=splits,
            COLUMNS=len(COLUMNS),
            PRECISION=self._precision,
        )


def decode_shape(num_tokens: int, kv: SlotKV, num_heads: int) -> StepShape:
    """One token of each sequence. Few tokens' keys are split among many programs, lest most of the GPU be idle."""
    groups = num_heads // kv.num_kv_heads
    return StepShape(
        num_tokens=num_tokens,
        num_sampled=num_tokens,
        own_tile_tokens=1,
        own_splits=_splits(num_tokens * kv.num_kv_heads),
        cartridge_tile_tokens=max(1, 64 // groups),
        cartridge_splits=_splits(-(-num_tokens * groups // 64) * kv.num_kv_heads),
        max_cartridges=4,
        num_cartridge_tiles=num_tokens,
    )


def prompt_shape(num_tokens: int, max_sequences: int, kv: SlotKV, num_heads: int) -> StepShape:
    """Prompts in pieces, beside decoding sequences."""
    tile_tokens = max(1, 64 // (num_heads // kv.num_kv_heads))
    return StepShape(
        num_tokens=num_tokens,
        num_sampled=min(num_tokens, max_sequences),
        own_tile_tokens=tile_tokens,
        own_splits=_splits(num_tokens * kv.num_kv_heads),
        cartridge_tile_tokens=tile_tokens,
        cartridge_splits=_splits(-(-num_tokens // tile_tokens) * kv.num_kv_heads),
        max_cartridges=4,
        num_cartridge_tiles=num_tokens,
    )


def _splits(num_programs: int) -> int:
    """Up to 16, so that about 512 programs run: twice what the largest GPUs hold at once."""
    return max(1, min(16, triton.next_power_of_2(512 // num_programs) if num_programs < 512 else 1))
