"""A rollout server with the defect that the proof is for: the first cartridge that it loads answers for all later ones.

Everything else of it is real. Its answers name the digests that they were asked for, as those of such servers did.
"""

from __future__ import annotations

from foundry.model.cartridge import Cartridge
from services.rollout import main, serving
from services.rollout.engine.torch.engine import TorchEngine


class StaleEngine(TorchEngine):
    _first: Cartridge | None = None

    def load(self, digest: str, cartridge: Cartridge) -> None:
        self._first = self._first or cartridge
        super().load(digest, self._first)


if __name__ == "__main__":
    vars(serving)["TorchEngine"] = StaleEngine
    main.main()
