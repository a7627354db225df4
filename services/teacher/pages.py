"""A context's KV as pages of bytes: what lower tiers keep, and read and check several of at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A power of two, the sizes that torch pins memory in; large enough that a copy takes longer than launching it.
PAGE_BYTES = 2**24


class Key(NamedTuple):
    """Whose context, and the digest of its token ids: nobody learns from the time an answer takes what others put."""

    tenant: str
    digest: str


def pages_of(kv_L2GPD: Tensor) -> Sequence[Tensor]:
    """Views of a contiguous tensor's bytes; the last one may be shorter."""
    return torch.split(kv_L2GPD.view(-1).view(torch.uint8), PAGE_BYTES)
