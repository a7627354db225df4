"""What a step computes, as numbers on the device: filled in host memory, copied at once, read by a captured graph."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from services.rollout.engine.torch.cuda.kernels import COLUMNS
from services.rollout.engine.torch.kv import SlotKV
from services.rollout.engine.torch.scheduler import Scheduled

Numbers = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class StepShape:
    """What is fixed when a step is captured, of everything that differs from step to step the most there may be."""

    num_tokens: int
    # Sequences that get their next token.
    num_sampled: int
    # Tokens of a tile behind its own slot, and behind a cartridge; programs that share the keys of each.
    own_tile_tokens: int
    own_splits: int
    cartridge_tile_tokens: int
    cartridge_splits: int
    # Cartridges of one sequence, and tiles behind any.
    max_cartridges: int
    num_cartridge_tiles: int

    @property
    def num_parts(self) -> int:
        return self.own_splits + self.max_cartridges * self.cartridge_splits


class StepTables:
    """Tensors int64 by name: of T tokens or B sampled ones, and tiles [.., columns]; two are float64."""

    def __init__(self, shape: StepShape, kv: SlotKV) -> None:
        self.shape, self._kv = shape, kv
        num_tokens, num_sampled = shape.num_tokens, shape.num_sampled
        sizes: dict[str, tuple[int, ...]] = {
            "ids": (num_tokens,),
            # Row of the step before's results which holds the id, or -1.
            "sources": (num_tokens,),
            "positions": (num_tokens,),
            "slots": (num_tokens,),
            "indices": (num_tokens,),
            "num_parts": (num_tokens,),
            "num_own_tiles": (1,),
            "own_tiles": (num_tokens, len(COLUMNS)),
            "num_cartridge_tiles": (1,),
            "cartridge_tiles": (shape.num_cartridge_tiles, len(COLUMNS)),
            "sampled_rows": (num_sampled,),
            "temperatures": (num_sampled,),
            "uniforms": (num_sampled,),
        }
        total = sum(math.prod(size) for size in sizes.values())
        on_cuda = kv.device.type == "cuda"
        # Two, in turn: one may still be on its way to the device when the next is filled.
        self._hosts = [torch.zeros(total, dtype=torch.int64, pin_memory=on_cuda) for _ in range(2)]
        self._device = torch.zeros(total, dtype=torch.int64, device=kv.device)
        self._at_hosts = [{name: each.numpy() for name, each in _named(host, sizes)} for host in self._hosts]
        self.at = dict(_named(self._device, sizes))

    def fill(self, batch: SequenceOf[Scheduled], uniforms: SequenceOf[float]) -> None:
        """Say what the next step computes, with a number to draw by for each sequence that gets a token. The step
        before the last must have ended."""
        self._hosts.reverse()
        self._at_hosts.reverse()
        host, here = self._hosts[0], self._at_hosts[0]
        host.zero_()
        here["sources"].fill(-1)
        here["indices"].fill(-1)
        ids: list[int] = []
        indices: list[int] = []
        offsets: list[int] = []
        slots: list[int] = []
        num_cartridges: list[int] = []
        sampled_rows: list[int] = []
        temperatures: list[float] = []
        row = 0
        for sequence, num_tokens in batch:
            begin = sequence.num_computed_tokens
            end = begin + num_tokens
            if begin < len(sequence.token_ids):
                ids += sequence.token_ids[begin:end]
            else:
                ids.append(0)
                here["sources"][row] = sequence.row
            if num_tokens == 1:
                indices.append(begin)
                offsets.append(sequence.offset)
                slots.append(sequence.slot)
                num_cartridges.append(len(sequence.cartridges))
            else:
                indices += range(begin, end)
                offsets += [sequence.offset] * num_tokens
                slots += [sequence.slot] * num_tokens
                num_cartridges += [len(sequence.cartridges)] * num_tokens
            row += num_tokens
            if sequence.num_pending_tokens == num_tokens:
                sampled_rows.append(row - 1)
                temperatures.append(sequence.sampling.temperature)
        here["ids"][:row] = ids
        here["indices"][:row] = indices
        here["positions"][:row] = offsets
        here["positions"][:row] += here["indices"][:row]
        here["slots"][:row] = slots
        here["num_parts"][:row] = num_cartridges
        here["num_parts"][:row] *= self.shape.cartridge_splits
        here["num_parts"][:row] += self.shape.own_splits
        here["sampled_rows"][: len(sampled_rows)] = sampled_rows
        here["temperatures"][: len(temperatures)] = temperatures
        here["uniforms"][: len(uniforms)] = uniforms
        self._fill_own_tiles(here, batch)
        tiles = list(_cartridge_tiles(batch, self.shape))
        here["num_cartridge_tiles"][0] = len(tiles)
        if tiles:
            here["cartridge_tiles"][: len(tiles)] = tiles
        self._device.copy_(host, non_blocking=True)

    def _fill_own_tiles(self, here: Mapping[str, Numbers], batch: SequenceOf[Scheduled]) -> None:
        kv, most = self._kv, self.shape.own_tile_tokens
        firsts: list[int] = []
        sizes: list[int] = []
        row = 0
        for _, num_tokens in batch:
            for begin in range(0, num_tokens, most):
                firsts.append(row + begin)
                sizes.append(min(most, num_tokens - begin))
            row += num_tokens
        here["num_own_tiles"][0] = len(firsts)
        tiles = here["own_tiles"][: len(firsts)]
        tiles[:, 0] = kv.first.data_ptr() + here["slots"][firsts] * (kv.slot_stride * kv.dtype.itemsize)
        tiles[:, 1:4] = kv.layer_stride, kv.value_stride, kv.head_stride
        tiles[:, 4] = firsts
        tiles[:, 5] = sizes
        tiles[:, 6] = here["indices"][firsts] + 1
        tiles[:, 7] = 1


def _named(tensor: Tensor, sizes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    begin = 0
    for name, size in sizes.items():
        end = begin + math.prod(size)
        part = tensor[begin:end].view(size)
        yield name, part.view(torch.float64) if name in ("temperatures", "uniforms") else part
        begin = end


def fits(batch: SequenceOf[Scheduled], shape: StepShape) -> bool:
    """Whether a step of this shape, which has tokens enough, can compute the batch."""
    num_cartridges = max(len(sequence.cartridges) for sequence, _ in batch)
    # With one each there are no more tiles than tokens.
    return num_cartridges <= 1 or (
        num_cartridges <= shape.max_cartridges
        and sum(1 for _ in _cartridge_tiles(batch, shape)) <= shape.num_cartridge_tiles
    )


def _cartridge_tiles(batch: SequenceOf[Scheduled], shape: StepShape) -> Iterator[tuple[int, ...]]:
    """Neighbours behind one cartridge share its tiles."""
    for number in range(max(len(sequence.cartridges) for sequence, _ in batch)):
        part = shape.own_splits + number * shape.cartridge_splits
        row = 0
        for digest, run in groupby(batch, key=lambda each: each.sequence.digests[number : number + 1]):
            sequences = list(run)
            end = row + sum(num_tokens for _, num_tokens in sequences)
            if digest:
                kv_L2GPD = sequences[0].sequence.cartridges[number].kv_L2GPD
                for begin in range(row, end, shape.cartridge_tile_tokens):
                    tile_tokens = min(shape.cartridge_tile_tokens, end - begin)
                    yield kv_L2GPD.data_ptr(), *kv_L2GPD.stride()[:3], begin, tile_tokens, kv_L2GPD.shape[3], 0, part
            row = end
