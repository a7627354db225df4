"""What a step computes, as numbers on the device: filled in host memory, copied at once, read by a captured graph."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from services.rollout.engine.torch.cuda.kernels import COLUMNS
from services.rollout.engine.torch.kv import SlotKV
from services.rollout.engine.torch.scheduler import Scheduled

Ints = npt.NDArray[np.int64]
_COLUMN = {name: number for number, name in enumerate(COLUMNS)}


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
        sizes = {
            "ids": (num_tokens,),
            "positions": (num_tokens,),
            "slots": (num_tokens,),
            "indices": (num_tokens,),
            "num_parts": (num_tokens,),
            "own_tiles": (num_tokens, len(COLUMNS)),
            "cartridge_tiles": (shape.num_cartridge_tiles, len(COLUMNS)),
            "sampled_rows": (num_sampled,),
            # float64
            "temperatures": (num_sampled,),
            "uniforms": (num_sampled,),
        }
        total = sum(int(np.prod(size)) for size in sizes.values())
        on_cuda = kv.device.type == "cuda"
        self._host = torch.zeros(total, dtype=torch.int64, pin_memory=on_cuda)
        self._device = torch.zeros(total, dtype=torch.int64, device=kv.device)
        self._at_host: dict[str, Ints] = {}
        self.at: dict[str, Tensor] = {}
        begin = 0
        for name, size in sizes.items():
            end = begin + int(np.prod(size))
            host, device = self._host[begin:end].view(size), self._device[begin:end].view(size)
            if name in ("temperatures", "uniforms"):
                host, device = host.view(torch.float64), device.view(torch.float64)
            self._at_host[name], self.at[name] = host.numpy(), device
            begin = end

    def fill(self, batch: SequenceOf[Scheduled], uniforms: SequenceOf[float]) -> None:
        """Say what the next step computes, with a number to draw by for each sequence that gets a token. The last
        step must have ended."""
        self._host.zero_()
        here = self._at_host
        here["indices"].fill(-1)
        ids: list[int] = []
        slots: list[int] = []
        indices: list[int] = []
        positions: list[int] = []
        num_parts: list[int] = []
        sampled_rows: list[int] = []
        temperatures: list[float] = []
        for sequence, num_tokens in batch:
            begin = sequence.num_computed_tokens
            end = begin + num_tokens
            ids += sequence.token_ids[begin:end]
            indices += range(begin, end)
            positions += range(sequence.offset + begin, sequence.offset + end)
            slots += [sequence.slot] * num_tokens
            num_parts += [self.shape.own_splits + len(sequence.cartridges) * self.shape.cartridge_splits] * num_tokens
            if sequence.num_pending_tokens == num_tokens:
                sampled_rows.append(len(ids) - 1)
                temperatures.append(sequence.sampling.temperature)
        for name, values in {
            "ids": ids,
            "positions": positions,
            "slots": slots,
            "indices": indices,
            "num_parts": num_parts,
            "sampled_rows": sampled_rows,
            "temperatures": temperatures,
            "uniforms": uniforms,
        }.items():
            here[name][: len(values)] = values
        self._fill_tiles("own_tiles", _own_tiles(self._kv, batch, self.shape))
        self._fill_tiles("cartridge_tiles", _cartridge_tiles(batch, self.shape))
        self._device.copy_(self._host, non_blocking=True)

    def _fill_tiles(self, name: str, tiles: Iterator[tuple[int, ...]]) -> None:
        found = list(tiles)
        if found:
            self._at_host[name][: len(found)] = found


def fits(batch: SequenceOf[Scheduled], shape: StepShape) -> bool:
    """Whether a step of this shape, which has tokens enough, can compute the batch."""
    return (
        max(len(sequence.cartridges) for sequence, _ in batch) <= shape.max_cartridges
        and sum(1 for _ in _cartridge_tiles(batch, shape)) <= shape.num_cartridge_tiles
    )


def _own_tiles(kv: SlotKV, batch: SequenceOf[Scheduled], shape: StepShape) -> Iterator[tuple[int, ...]]:
    row = 0
    for sequence, num_tokens in batch:
        address = kv.address(sequence.slot)
        for begin in range(0, num_tokens, shape.own_tile_tokens):
            tile_tokens = min(shape.own_tile_tokens, num_tokens - begin)
            num_keys = sequence.num_computed_tokens + begin + 1
            yield address, kv.layer_stride, kv.value_stride, kv.head_stride, row + begin, tile_tokens, num_keys, 1, 0
        row += num_tokens


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
