"""A cartridge as other formats have it: keys and values that do not say of which model they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foundry.errors import CartridgeUnreadable
from foundry.model.cartridge import Cartridge
from foundry.model.info import ModelSpec


@dataclass(frozen=True, slots=True)
class LooseCartridge:
    """Keys, after RoPE, and values [L, 2, G, P, D], of whose P tokens the first `num_frozen` are not trained."""

    kv_L2GPD: Tensor
    num_frozen: int

    def of_model(self, spec: ModelSpec) -> Cartridge:
        """With the model's header. Raises ShapeMismatch, CartridgeUnreadable."""
        num_tokens, dtype = self.kv_L2GPD.shape[3], self.kv_L2GPD.dtype
        if not 0 <= self.num_frozen <= num_tokens:
            raise CartridgeUnreadable(f"{self.num_frozen} of its {num_tokens} tokens are said to be frozen")
        return Cartridge(spec.header(num_tokens, self.num_frozen, dtype), self.kv_L2GPD)
