"""PEFT's adapter directories, against PEFT itself."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CartridgeConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from foundry.errors import CartridgeUnreadable, ShapeMismatch
from foundry.formats import peft
from foundry.formats.loose import LooseCartridge
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from tests.tiny import Family, build_tiny_model

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NUM_TOKENS, IDS = 7, [5, 17, 300, 2, 44]
FAMILIES: list[Family] = ["llama", "qwen2", "qwen3"]


@pytest.fixture(params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return build_tiny_model(tmp_path / "model", request.param)


def drawn(lm: FrozenLM, dtype: torch.dtype = torch.float32) -> Cartridge:
    kv = torch.randn(lm.spec.kv_shape(NUM_TOKENS), generator=torch.Generator().manual_seed(3)).to(dtype)
    return Cartridge(lm.spec.header(NUM_TOKENS, 2, dtype), kv)


def test_peft_gives_our_logits(directory: Path, tmp_path: Path) -> None:
    lm = FrozenLM.load(directory)
    cartridge = drawn(lm)
    ours = lm.logits(lm.packed_hidden([IDS], [cartridge.kv_L2GPD]))
    peft.write(cartridge, tmp_path / "adapter", base_model=str(directory))
    loaded: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter")
    with torch.no_grad():
        theirs = loaded(input_ids=torch.tensor([IDS])).logits[0]
    assert torch.allclose(ours, theirs[-len(IDS) :], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours, lm.logits(lm.packed_hidden([IDS], [None])), atol=0.1), "it changes nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_we_write_comes_back_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    cartridge = drawn(FrozenLM.load(build_tiny_model(tmp_path / "model")), dtype)
    peft.write(cartridge, tmp_path / "adapter")
    found = peft.read(tmp_path / "adapter")
    assert isinstance(found, Cartridge)
    assert found.header == cartridge.header
    assert found.to_bytes().digest() == cartridge.to_bytes().digest()


def test_what_peft_writes_is_read_and_comes_back_to_the_bit(directory: Path, tmp_path: Path) -> None:
    lm = FrozenLM.load(directory)
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_TOKENS, num_frozen_tokens=2)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config)
    model.save_pretrained(str(tmp_path / "theirs"))
    found = peft.read(tmp_path / "theirs")
    assert isinstance(found, LooseCartridge)
    cartridge = found.of_model(lm.spec)
    assert (cartridge.header.num_tokens, cartridge.header.num_frozen) == (NUM_TOKENS, 2)
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([IDS])).logits[0, -len(IDS) :]
    ours = lm.logits(lm.packed_hidden([IDS], [cartridge.kv_L2GPD]))
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    peft.write(cartridge, tmp_path / "ours")
    (tensor,) = load_file(tmp_path / "ours" / peft.WEIGHTS).values()
    assert torch.equal(tensor, load_file(tmp_path / "theirs" / peft.WEIGHTS)["prompt_embeddings"])


def test_one_for_another_model_is_refused(tmp_path: Path) -> None:
    spec = FrozenLM.load(build_tiny_model(tmp_path)).spec
    other = torch.zeros(spec.num_layers + 1, 2, spec.num_kv_heads, NUM_TOKENS, spec.head_dim)
    with pytest.raises(ShapeMismatch):
        LooseCartridge(other, 1).of_model(spec)
    with pytest.raises(CartridgeUnreadable, match="frozen"):
        LooseCartridge(other[1:], NUM_TOKENS + 1).of_model(spec)


def header_only(header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


HUGE = {"prompt_embeddings": {"dtype": "F32", "shape": [2**30, 2**30], "data_offsets": [0, 2**62]}}
OVERLAPPING = {
    "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
}


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"\xff" * 64,
        struct.pack("<Q", 2**60),
        header_only(HUGE),
        header_only(OVERLAPPING) + bytes(24),
        header_only({}) + b"x",
    ],
)
def test_hostile_weights_are_refused(weights: bytes, tmp_path: Path) -> None:
    (tmp_path / peft.CONFIG).write_text('{"peft_type": "CARTRIDGE"}')
    (tmp_path / peft.WEIGHTS).write_bytes(weights)
    with pytest.raises(CartridgeUnreadable):
        peft.read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "LORA"},
        {"num_layers": 3},
        {"num_layers": True},
        {"num_layers": 2**60},
        {"token_dim": 33},
        {"num_attention_heads": 0},
        {"num_virtual_tokens": "7"},
        {"num_frozen_tokens": -1},
        {"num_frozen_tokens": None},
    ],
)
def test_a_configuration_that_says_otherwise_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    config = {"peft_type": "CARTRIDGE", "num_layers": 2, "num_attention_heads": 2, "token_dim": 32}
    config |= {"num_virtual_tokens": NUM_TOKENS, "num_frozen_tokens": 1}
    save_file({"prompt_embeddings": torch.zeros(NUM_TOKENS, 2 * 2 * 32)}, tmp_path / peft.WEIGHTS)
    (tmp_path / peft.CONFIG).write_text(json.dumps(config))
    peft.read(tmp_path)
    (tmp_path / peft.CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(CartridgeUnreadable):
        peft.read(tmp_path)


def test_an_adapter_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / peft.CONFIG).write_text('{"peft_type": "CARTRIDGE"}')
    save_file({"lora_A": torch.zeros(2, 2)}, tmp_path / peft.WEIGHTS)
    with pytest.raises(CartridgeUnreadable, match="prompt_embeddings alone"):
        peft.read(tmp_path)
    with pytest.raises(CartridgeUnreadable, match="can't be read"):
        peft.read(tmp_path / "nowhere")
