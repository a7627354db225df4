"""One file or directory, in whichever format it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from foundry.errors import CartridgeUnreadable, InvalidArgument
from foundry.formats import peft, research, tokasaurus
from foundry.formats.loose import LooseCartridge
from foundry.formats.reading import read_file
from foundry.identity import CartridgeBytes
from foundry.model.cartridge import Cartridge
from foundry.model.info import ModelInfo
from foundry.model.lm import FrozenLM

Format = Literal["safetensors", "peft", "research", "research-fixed", "tokasaurus"]


def format_of(path: Path) -> Format:
    """By what is there. Raises CartridgeUnreadable."""
    if (path / peft.CONFIG).exists():
        return "peft"
    if (path / tokasaurus.WEIGHTS).exists():
        return "tokasaurus"
    if path.suffix in (".pt", ".pth"):
        return "research"
    if path.suffix == ".safetensors":
        return "safetensors"
    raise CartridgeUnreadable(
        f"{path} is neither a .safetensors or .pt file nor a directory with {peft.CONFIG} or {tokasaurus.WEIGHTS}: "
        "name its format",
        field="path",
    )


def read(path: Path, kind: Format, model: Callable[[], Path]) -> Cartridge:
    """The cartridge. One that does not say of which model it is is of the model in the directory that `model` names,
    and tried there. Raises CartridgeUnreadable, ShapeMismatch, ModelNotFound, ModelUnsupported, and what `model` does.
    """
    found: Cartridge | LooseCartridge
    if kind == "safetensors":
        try:
            found = Cartridge.from_bytes(CartridgeBytes.from_file(bytearray(read_file(path))))
        except InvalidArgument as error:
            raise CartridgeUnreadable(f"{path}: {error.message}", field="path") from error
    elif kind == "peft":
        found = peft.read(path)
    elif kind == "tokasaurus":
        found = tokasaurus.read(path)
    else:
        found = research.read(path)
    if isinstance(found, Cartridge):
        return found
    directory = model()
    # By its files alone, before its weights are loaded.
    cartridge = found.of_model(ModelInfo.read(directory).spec)
    _try(FrozenLM.load(directory), cartridge)
    return cartridge


def write(cartridge: Cartridge, path: Path, kind: Format, *, base_model: str = "") -> None:
    """`base_model` is named in formats that name one. Raises OSError."""
    if kind == "safetensors":
        with path.open("wb") as file:
            for part in cartridge.to_bytes().file_parts():
                file.write(part)
    elif kind == "peft":
        peft.write(cartridge, path, base_model=base_model)
    elif kind == "tokasaurus":
        tokasaurus.write(cartridge, path, base_model=base_model)
    else:
        research.write(cartridge, path, spelling="fixed" if kind == "research-fixed" else "frozen")


@torch.no_grad()
def _try(lm: FrozenLM, cartridge: Cartridge) -> None:
    """Raises CartridgeUnreadable if the model behind it says what is no number."""
    hidden_TE = lm.packed_hidden([[0]], [cartridge.kv_L2GPD.to(lm.device, lm.dtype)])
    if not lm.logits(hidden_TE).isfinite().all():
        raise CartridgeUnreadable("the model's logits behind the cartridge are not finite: it is damaged", field="path")
