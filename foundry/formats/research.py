"""Checkpoints of the research library `cartridges` (https://github.com/HazyResearch/cartridges): one `.pt`.

A dict of `trainable_keys` and `trainable_values`, with `frozen_keys` and `frozen_values` or, in older ones,
`fixed_keys` and `fixed_values`: for each layer a tensor [1, G, tokens, D], keys after RoPE; no frozen ones where no
token is frozen.

A pickle can run anything. So its parts are looked at first, and what is left is read by torch's own restricted reader
in a process that may do little (`foundry.formats.pickled`).
"""

from __future__ import annotations

import pickletools
import subprocess
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from foundry import confined
from foundry.errors import CartridgeUnreadable
from foundry.formats.loose import LooseCartridge
from foundry.formats.pickled import NUM_FROZEN, TENSOR
from foundry.formats.reading import MAX_BYTES
from foundry.model.cartridge import Cartridge

Spelling = Literal["frozen", "fixed"]

_SECONDS = 120
_MAX_ENTRIES, _MAX_PICKLE_BYTES, _MAX_OPCODES = 2**14, 2**24, 2**20
_ALLOWED = frozenset(
    {
        "__builtin__ set",
        "collections OrderedDict",
        "torch BFloat16Storage",
        "torch FloatStorage",
        "torch HalfStorage",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
        "torch.nn.modules.container ParameterList",
    }
)


def write(cartridge: Cartridge, path: Path, *, spelling: Spelling = "frozen") -> None:
    """Write the checkpoint. Raises OSError."""
    kv_L2GPD, num_frozen = cartridge.kv_L2GPD, cartridge.header.num_frozen

    def layers(part: int, tokens: slice) -> nn.ParameterList:
        return nn.ParameterList(_parameter(layer) for layer in kv_L2GPD[:, part, :, tokens])

    frozen, trained = slice(0, num_frozen), slice(num_frozen, None)
    checkpoint = {"trainable_keys": layers(0, trained), "trainable_values": layers(1, trained)}
    for part, name in enumerate(("keys", "values")):
        # Where no token is frozen newer ones have no layers of them, older ones layers without tokens.
        empty = num_frozen == 0 and spelling == "frozen"
        checkpoint[f"{spelling}_{name}"] = nn.ParameterList() if empty else layers(part, frozen)
    torch.save(checkpoint, path)


def read(path: Path) -> LooseCartridge:
    """Raises CartridgeUnreadable."""
    try:
        _look(path)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CartridgeUnreadable(f"{path} is no checkpoint: {error}", field="path") from error
    with tempfile.TemporaryDirectory(prefix="foundry-import-") as directory:
        out = Path(directory) / "read.safetensors"
        command = confined.command("foundry.formats.pickled", path, out, _SECONDS)
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=confined.environment()
            )
        except subprocess.TimeoutExpired as error:
            raise CartridgeUnreadable(f"reading {path} takes more than {_SECONDS} s", field="path") from error
        if ended.returncode:
            said = ended.stderr.strip() if ended.returncode == confined.UNREADABLE else "the process that read it ended"
            raise CartridgeUnreadable(f"{path}: {said}", field="path")
        with safe_open(out, framework="pt") as file:
            return LooseCartridge(file.get_tensor(TENSOR), int(file.metadata()[NUM_FROZEN]))


def _parameter(layer_GPD: Tensor) -> nn.Parameter:
    return nn.Parameter(layer_GPD.unsqueeze(0).contiguous(), requires_grad=False)


def _look(path: Path) -> None:
    """Raises ValueError, BadZipFile or OSError unless the archive is as torch writes it, with nothing else in it."""
    num_bytes = path.stat().st_size
    if num_bytes > MAX_BYTES:
        raise ValueError(f"it has {num_bytes} bytes, at most {MAX_BYTES} are read")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > _MAX_ENTRIES:
            raise ValueError(f"it has {len(entries)} entries, at most {_MAX_ENTRIES} are read")
        for entry in entries:
            name = PurePosixPath(entry.filename)
            if name.is_absolute() or ".." in name.parts:
                raise ValueError(f"it has an entry {entry.filename[:100]!r}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError("it is compressed, which torch never does")
        if sum(entry.file_size for entry in entries) > num_bytes:
            raise ValueError("its entries claim more bytes than it has")
        pickles = [entry for entry in entries if PurePosixPath(entry.filename).name == "data.pkl"]
        if len(pickles) != 1 or pickles[0].file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"it has {len(pickles)} data.pkl, expected one of at most {_MAX_PICKLE_BYTES} bytes")
        _look_at_pickle(archive.read(pickles[0]))


def _look_at_pickle(content: bytes) -> None:
    for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if number > _MAX_OPCODES:
            raise ValueError(f"its pickle has more than {_MAX_OPCODES} operations")
        # All that can name something to be called.
        if opcode.name in ("STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise ValueError(f"its pickle has the operation {opcode.name}, which torch.save does not write")
        if opcode.name == "GLOBAL" and argument not in _ALLOWED:
            raise ValueError(f"its pickle names {argument!r:.100}, which no cartridge has")
