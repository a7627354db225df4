"""python -m tests.deploy.network.publish COUNT: cartridges hot-0, durable-0, hot-1, … with a trainer's settings.

Prints the digest of each, by name. A process of its own, so that all its connections are made where it runs.
"""

from __future__ import annotations

import asyncio
import json
import sys

import torch

from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.store import CartridgeStore, ManifestDraft
from services.trainer.settings import TrainerSettings

_NUM_TOKENS = 12


async def publish(settings: TrainerSettings, count: int) -> dict[str, str]:
    spec = FrozenLM.load(settings.model).spec
    shape = spec.kv_shape(_NUM_TOKENS)
    store = await CartridgeStore.open(settings.store)
    digests = {}
    for i in range(count):
        for kind in ("hot", "durable"):
            name = f"{kind}-{i}"
            cartridge = Cartridge(spec.header(_NUM_TOKENS, 1, torch.float32), torch.randn(shape))
            await store.acquire(name, name, 1)
            draft = ManifestDraft(name=name, run=name, attempt=1, step=1)
            manifest = await store.publish(cartridge.to_bytes(), draft, durable=kind == "durable")
            await store.release(name, name, 1)
            digests[name] = manifest.digest
    await store.close()
    return digests


if __name__ == "__main__":
    print(json.dumps(asyncio.run(publish(TrainerSettings.parse([]), int(sys.argv[1])))))
