"""python -m foundry.formats.pickled PATH OUT SECONDS: reads a checkpoint of the research library, whose archive was
looked at, and writes its keys and values as one safetensors file; why not, in one line, on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from foundry.confined import bound, failed

TENSOR, NUM_FROZEN = "kv_L2GPD", "num_frozen"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What torch takes before it reads anything.
_TORCH_BYTES = 4 * 2**30


def main() -> int:
    path, out, seconds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    num_bytes = path.stat().st_size
    bound(seconds, _TORCH_BYTES + 4 * num_bytes, num_bytes + 2**20)
    try:
        with torch.serialization.safe_globals([nn.ParameterList]):
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        kv_L2GPD, num_frozen = joined(checkpoint, max_bytes=num_bytes)
    except Exception as error:
        # Whatever torch raises of a file that is none.
        return failed(f"{type(error).__name__}: {error}")
    save_file({TENSOR: kv_L2GPD}, out, {NUM_FROZEN: str(num_frozen)})
    return 0


def joined(checkpoint: Any, *, max_bytes: int) -> tuple[Tensor, int]:
    """Keys and values [L, 2, G, P, D], and how many of the tokens are frozen ones, which come first. Raises ValueError.

    Tensors that claim more than `max_bytes` share memory that they do not have.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"it holds {type(checkpoint).__name__}, not a dict")
    spelling = "fixed" if "fixed_keys" in checkpoint else "frozen"
    trained = [_layers(checkpoint, f"trainable_{part}") for part in ("keys", "values")]
    frozen = [_layers(checkpoint, f"{spelling}_{part}") for part in ("keys", "values")]
    num_layers = len(trained[0])
    if num_layers == 0 or len(trained[1]) != num_layers or any(len(each) not in (0, num_layers) for each in frozen):
        counts = [len(each) for each in (*trained, *frozen)]
        raise ValueError(f"its keys and values are of {counts} layers, expected as many of each")
    if len(frozen[0]) != len(frozen[1]):
        raise ValueError("it has frozen keys without values, or values without keys")
    every = [layer for part in (*trained, *frozen) for layer in part]
    if sum(layer.numel() * layer.element_size() for layer in every) > max_bytes:
        raise ValueError("its tensors claim more bytes than the file has")
    first = trained[0][0]
    for layer in every:
        if (layer.shape[:2], layer.shape[3], layer.dtype) != (first.shape[:2], first.shape[3], first.dtype):
            raise ValueError(f"its layers differ: {list(first.shape)} {first.dtype}, {list(layer.shape)} {layer.dtype}")
    num_frozen = frozen[0][0].shape[2] if frozen[0] else 0
    num_tokens = num_frozen + first.shape[2]
    kv_L2GPD = torch.empty((num_layers, 2, first.shape[1], num_tokens, first.shape[3]), dtype=first.dtype)
    for part in (0, 1):
        for number in range(num_layers):
            if frozen[part]:
                kv_L2GPD[number, part, :, :num_frozen] = frozen[part][number][0]
            kv_L2GPD[number, part, :, num_frozen:] = trained[part][number][0]
    return kv_L2GPD, num_frozen


def _layers(checkpoint: Mapping[str, Any], name: str) -> list[Tensor]:
    layers = checkpoint.get(name)
    if not isinstance(layers, Sequence | nn.ParameterList):
        raise ValueError(f"it has no {name}" if layers is None else f"its {name} are {type(layers).__name__}")
    for layer in layers:
        if not isinstance(layer, Tensor) or layer.dtype not in _DTYPES or layer.ndim != 4 or layer.shape[0] != 1:
            found = f"{layer.dtype} {list(layer.shape)}" if isinstance(layer, Tensor) else type(layer).__name__
            raise ValueError(
                f"its {name} have {found}, expected [1, heads, tokens, size] of float32, bfloat16, float16"
            )
    return [layer.detach() for layer in layers]


if __name__ == "__main__":
    sys.exit(main())
