"""A version of the cartridge in training, with its bytes: it is asked for answers, and they are proved against it."""

from __future__ import annotations

from dataclasses import dataclass

from foundry.identity import CartridgeBytes
from foundry.store import CartridgeId, ManifestDraft


@dataclass(frozen=True, slots=True)
class Policy:
    id: CartridgeId
    draft: ManifestDraft
    stored: CartridgeBytes

    @property
    def step(self) -> int:
        """After how many updates it stands."""
        return self.draft.step
