"""All that a run needs to go on as if it had never stopped: one safetensors file.

The random state is not in it: every draw of a run is seeded by its place (`foundry.seeds`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import load, save

from foundry.errors import InvalidArgument
from foundry.store.names import CartridgeId
from services.trainer.curriculum import Curriculum
from services.trainer.update.step import TrainingStep


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands after `step` updates."""

    step: int
    policy: CartridgeId
    tokens_seen: int
    # Digest of the run's spec.
    config: str
    # Digest of the chat template that made the prompts.
    template: str
    heldout_kl_first: float
    heldout_kl_last: float


def write(progress: Progress, curriculum: Curriculum, training: TrainingStep) -> bytes:
    """Master, Adam moments, prompts and progress as the bytes of one file."""
    master = training.cartridge.master_L2GRD
    moments = training.optimiser.state.get(master, {})
    tensors = {
        "frozen": training.cartridge.frozen_L2GFD,
        "master": master.detach(),
        "exp_avg": moments.get("exp_avg", torch.zeros_like(master)),
        "exp_avg_sq": moments.get("exp_avg_sq", torch.zeros_like(master)),
        # Text as a tensor: the header, where metadata stands, is limited in size.
        "curriculum": torch.frombuffer(bytearray(curriculum.to_json().encode()), dtype=torch.uint8),
    }
    return save(
        {name: tensor.contiguous().cpu() for name, tensor in tensors.items()},
        metadata={"progress": json.dumps(asdict(progress))},
    )


def read(content: bytes, training: TrainingStep, *, config: str, template: str) -> tuple[Progress, Curriculum]:
    """Put a checkpoint's tensors into `training` and return where it stands and what it asks.

    Raises InvalidArgument if the checkpoint is of another configuration.
    """
    length = int.from_bytes(content[:8], "little")
    values = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["progress"])
    # Checkpoints of older releases don't name theirs.
    progress = Progress(**{"template": template, **values, "policy": CartridgeId(**values["policy"])})
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
    return progress, Curriculum.from_json(tensors["curriculum"].numpy().tobytes())
