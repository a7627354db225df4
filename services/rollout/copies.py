"""Copies of cartridges whose keys stand further on, for several that stand one behind the other.

Such a copy is made of bytes that were verified, and has no digest of its own: the engine knows it by the digest and by
how far its keys were moved. Whatever is cached behind it is known by the same key, so it is never taken for what was
computed behind the cartridge itself, nor behind a copy elsewhere.
"""

from __future__ import annotations

from foundry.model.cartridge import Cartridge
from foundry.model.rotation import KeyRotation

# In no digest.
_SIGN = "+"


def key_of(digest: str, shift: int) -> str:
    """Under which the engine has it; the digest itself where nothing was moved."""
    return f"{digest}{_SIGN}{shift}" if shift else digest


def read_key(key: str) -> tuple[str, int]:
    """The digest, and by how many positions keys were moved."""
    digest, _, shift = key.partition(_SIGN)
    return digest, int(shift or 0)


def moved(cartridge: Cartridge, rotation: KeyRotation, shift: int) -> Cartridge:
    """As if its tokens had been `shift` positions further on, in memory of its own. Values know no positions."""
    return Cartridge(cartridge.header, rotation.move(cartridge.kv_L2GPD, shift))
