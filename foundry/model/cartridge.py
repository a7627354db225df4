"""A cartridge's tensors, and the trainable master behind them.

Shape suffixes as in `foundry.model.lm`: KV is [L, 2, G, P, D], contiguous, so its bytes are the hashed bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.buffers import allocate
from foundry.errors import InvalidArgument, ShapeMismatch
from foundry.identity import CartridgeBytes, CartridgeHeader
from foundry.model.lm import FrozenLM
from foundry.model.transfer import to_host


@dataclass(frozen=True, slots=True)
class Cartridge:
    """Keys (after RoPE, positions 0..p-1) and raw values of p tokens for every layer."""

    header: CartridgeHeader
    kv_L2GPD: Tensor

    def __post_init__(self) -> None:
        header = self.header
        if tuple(self.kv_L2GPD.shape) != header.shape or self.kv_L2GPD.dtype != getattr(torch, header.dtype):
            raise ShapeMismatch(
                f"cartridge tensor is {self.kv_L2GPD.dtype} {tuple(self.kv_L2GPD.shape)}, "
                f"its header says {header.dtype} {header.shape}"
            )

    def to_bytes(self) -> CartridgeBytes:
        """The bytes that are hashed and stored; on the CPU they share the tensor's memory."""
        kv = to_host(self.kv_L2GPD.detach().contiguous())
        return CartridgeBytes(self.header, kv.view(torch.uint8).reshape(-1).numpy().data)

    @classmethod
    def from_bytes(cls, stored: CartridgeBytes, device: torch.device | str = "cpu") -> Cartridge:
        """On the CPU the tensor is the stored memory itself, where that can be written to (torch takes no other)."""
        header = stored.header
        data = memoryview(stored.data)
        flat = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=getattr(torch, header.dtype))
        kv = flat.view(header.shape)
        return cls(header, kv.to(device))


class TrainableCartridge:
    """The fp32 master: frozen tokens first, then the trained ones.

    What is published, and what the trainer's own forward uses, is the cast to `dtype`: trainer and rollout compute with
    the same numbers. At a learning rate of 0.02 a bf16 master would lose most updates.
    """

    def __init__(
        self, lm: FrozenLM, kv_L2GPD: Tensor, *, num_frozen: int = 1, dtype: torch.dtype | None = None
    ) -> None:
        """`kv_L2GPD` is the initial KV; `dtype` defaults to the model's. Raises InvalidArgument."""
        num_tokens = kv_L2GPD.shape[3]
        if not 0 <= num_frozen < num_tokens:
            raise InvalidArgument(
                f"num_frozen is {num_frozen}: a cartridge of {num_tokens} tokens must train at least one"
            )
        self.dtype = dtype or lm.dtype
        self.header = lm.spec.header(num_tokens, num_frozen, self.dtype)
        self.frozen_L2GFD = kv_L2GPD[:, :, :, :num_frozen].detach().float().clone()
        self.master_L2GRD = kv_L2GPD[:, :, :, num_frozen:].detach().float().clone().requires_grad_()

    def cast(self) -> Tensor:
        """KV [L, 2, G, P, D] in the published dtype; gradients reach the master's trainable tokens only."""
        return torch.cat([self.frozen_L2GFD, self.master_L2GRD], dim=3).to(self.dtype)

    @torch.no_grad()
    def snapshot(self) -> Cartridge:
        """A copy in the published dtype, made in one pass."""
        frozen, master = self.frozen_L2GFD, self.master_L2GRD
        shape = (*master.shape[:3], frozen.shape[3] + master.shape[3], master.shape[4])
        if master.device.type == "cpu":
            memory = allocate(math.prod(shape) * self.dtype.itemsize)
            kv_L2GPD = torch.frombuffer(memory, dtype=self.dtype).view(shape)
        else:
            kv_L2GPD = torch.empty(shape, dtype=self.dtype, device=master.device)
        kv_L2GPD[:, :, :, : frozen.shape[3]] = frozen
        kv_L2GPD[:, :, :, frozen.shape[3] :] = master
        return Cartridge(self.header, kv_L2GPD)
