"""All that a run needs to go on as if it had never stopped: one safetensors file, and the data set that it names.

The random state is not in it: every draw of a run is seeded by its place (`foundry.seeds`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from safetensors.torch import load, save

from foundry.errors import InvalidArgument
from foundry.identity import CartridgeBytes, read_safetensors_header
from foundry.model.cartridge import Cartridge
from foundry.store import ManifestDraft
from foundry.store.names import CartridgeId
from services.trainer.update.step import TrainingStep

# A version from before the checkpoint that steps after it claim, and what was said of it.
Older = tuple[ManifestDraft, CartridgeBytes]


@dataclass(frozen=True, slots=True)
class Best:
    """The version that was closest to the document on held-out prompts."""

    policy: CartridgeId
    step: int
    # As `Distance` has them.
    kl: float
    nll: float


@dataclass(slots=True)
class Progress:
    """Where a run stands after `step` updates. The run moves it on; its publisher sets the policy."""

    step: int
    policy: CartridgeId
    tokens_seen: int
    # Digest of the run's spec.
    config: str
    # Digest of the chat template that made the prompts.
    template: str
    # Digest of the data set's content, and `step` is how far it is in it.
    dataset: str
    heldout_kl_first: float = 0.0
    heldout_kl_last: float = 0.0
    best: Best | None = None
    # Measurements since then.
    num_no_better: int = 0


def write(progress: Progress, training: TrainingStep, older: Sequence[Older] = ()) -> bytes:
    """Master, Adam moments, progress and older versions as the bytes of one file."""
    master = training.cartridge.master_L2GRD
    moments = training.optimiser.state.get(master, {})
    tensors = {
        "frozen": training.cartridge.frozen_L2GFD,
        "master": master.detach(),
        "exp_avg": moments.get("exp_avg", torch.zeros_like(master)),
        "exp_avg_sq": moments.get("exp_avg_sq", torch.zeros_like(master)),
    }
    tensors |= {_older_name(draft): Cartridge.from_bytes(stored).kv_L2GPD for draft, stored in older}
    return save(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
        metadata={
            "progress": json.dumps(asdict(progress)),
            "older": json.dumps([draft.model_dump(mode="json") for draft, _ in older]),
        },
    )


def read(content: bytes, training: TrainingStep, *, config: str, template: str) -> Progress:
    """Put a checkpoint's tensors into `training` and return where it stands.

    Raises InvalidArgument if the checkpoint is of another configuration or another release.
    """
    values = json.loads(read_safetensors_header(content)["__metadata__"]["progress"])
    best = values.get("best")
    if not (_is(Progress, values) and (best is None or _is(Best, best))):
        raise InvalidArgument(
            f"the checkpoint was written by another release (it says {', '.join(sorted(values))}): let that one end "
            "the run, or cancel it and start it anew"
        )
    values["policy"] = CartridgeId(**values["policy"])
    if best is not None:
        values["best"] = Best(**{**best, "policy": CartridgeId(**best["policy"])})
    progress = Progress(**values)
    if progress.config != config:
        raise InvalidArgument(
            f"the checkpoint at step {progress.step} is of configuration {progress.config}, the run's is {config}"
        )
    if progress.template != template:
        raise InvalidArgument(
            f"the checkpoint at step {progress.step} is of another configuration: its chat template is "
            f"{progress.template}, this trainer's {template}; is template_clock another one?"
        )
    tensors = load(content)
    master = training.cartridge.master_L2GRD
    with torch.no_grad():
        training.cartridge.frozen_L2GFD.copy_(tensors["frozen"])
        master.copy_(tensors["master"])
    if progress.step:
        training.optimiser.state[master] = {
            "step": torch.tensor(float(progress.step)),
            "exp_avg": tensors["exp_avg"].to(master.device),
            "exp_avg_sq": tensors["exp_avg_sq"].to(master.device),
        }
    return progress


def read_older(content: bytes, training: TrainingStep) -> list[Older]:
    """The older versions, oldest first."""
    drafts = json.loads(read_safetensors_header(content)["__metadata__"].get("older", "[]"))
    tensors, header = load(content) if drafts else {}, training.cartridge.header
    return [
        (draft, Cartridge(header, tensors[_older_name(draft)]).to_bytes())
        for draft in (ManifestDraft(**values) for values in drafts)
    ]


def _older_name(draft: ManifestDraft) -> str:
    return f"older.{draft.step}"


def _is(kind: type[Progress] | type[Best], values: Mapping[str, Any]) -> bool:
    return values.keys() == {field.name for field in fields(kind)}
