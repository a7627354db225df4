"""Small cartridges, drafts and runs for tests of the store."""

from __future__ import annotations

from typing import Any

from foundry.identity import CartridgeBytes, CartridgeHeader
from foundry.store import ClaimedRun, ManifestDraft, RunSpec, RunStore, SelfStudyPrompts

FINGERPRINT = "blake3:" + "ab" * 32
DOCUMENT = "blake3:" + "cd" * 32


def cartridge(content: int, *, num_bytes: int = 1024) -> CartridgeBytes:
    """A cartridge of one layer; `content` decides its digest."""
    header = CartridgeHeader(
        model_fingerprint=FINGERPRINT,
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        num_tokens=num_bytes // 64,
        num_frozen=1,
        dtype="float32",
        rope={"type": "default", "theta": 10000.0},
    )
    return CartridgeBytes(header, content.to_bytes(8, "little") * (num_bytes // 8))


def draft(name: str = "report", *, run: str = "run-a", attempt: int = 1, step: int = 0, **values: Any) -> ManifestDraft:
    return ManifestDraft(name=name, run=run, attempt=attempt, step=step, **values)


def run_spec(name: str = "report", **values: Any) -> RunSpec:
    settings: dict[str, Any] = {
        "document": DOCUMENT,
        "num_tokens": 8,
        "num_steps": 3,
        "prompts": SelfStudyPrompts(num_prompts=4),
    }
    return RunSpec(name=name, **(settings | values))


async def claim(runs: RunStore, worker: str = "worker-0", *, lease_seconds: float = 60) -> ClaimedRun:
    """The next run, also if its lease has yet to end."""
    claimed = await runs.claim(worker, lease_seconds, timeout_seconds=10)
    assert claimed is not None
    return claimed
