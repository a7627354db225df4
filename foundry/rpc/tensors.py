"""Tensors on the wire: raw little-endian bytes with dtype and shape."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foundry.errors import InvalidArgument
from foundry.v1 import common_pb2

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int32": torch.int32}


def to_message(tensor: Tensor) -> common_pb2.Tensor:
    """Copy a tensor into a message. float32, bfloat16, float16 and int32 only."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise InvalidArgument(f"a {dtype} tensor does not travel; use one of {sorted(_DTYPES)}")
    flat = tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1) if tensor.numel() else torch.empty(0)
    return common_pb2.Tensor(dtype=dtype, shape=tensor.shape, data=flat.numpy().tobytes())


def from_message(message: common_pb2.Tensor) -> Tensor:
    """The tensor in a message, on the CPU. Raises InvalidArgument if dtype, shape and bytes do not agree."""
    if message.dtype not in _DTYPES:
        raise InvalidArgument(f"tensor dtype {message.dtype!r} is not one of {sorted(_DTYPES)}", field="dtype")
    dtype, shape = _DTYPES[message.dtype], tuple(message.shape)
    if len(message.data) != math.prod(shape) * dtype.itemsize:
        raise InvalidArgument(
            f"tensor of {message.dtype} {shape} came with {len(message.data)} bytes, "
            f"needs {math.prod(shape) * dtype.itemsize}",
            field="data",
        )
    if not message.data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(message.data), dtype=dtype).view(shape)
