"""A cartridge's bytes, digest and file."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from foundry.errors import CartridgeTooLong, DigestMismatch, InvalidArgument, ModelNotFound, ShapeMismatch
from foundry.identity import CartridgeBytes, CartridgeHeader, digest_of, read_safetensors_header
from foundry.model.cartridge import Cartridge, TrainableCartridge
from foundry.model.fingerprint import fingerprint_model
from foundry.model.initialise import cut_context
from foundry.model.lm import FrozenLM
from tests.tiny import build_tiny_model


def random_cartridge(num_tokens: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0) -> Cartridge:
    header = CartridgeHeader(
        model_fingerprint="blake3:" + "a" * 64,
        # More than ten, so that sorting tensors by name would not be layer order.
        num_layers=12,
        num_kv_heads=2,
        head_dim=4,
        num_tokens=num_tokens,
        num_frozen=1,
        dtype=str(dtype).removeprefix("torch."),
        rope={"rope_type": "default", "rope_theta": 10000.0},
    )
    kv = torch.randn(12, 2, 2, num_tokens, 4, generator=torch.Generator().manual_seed(seed))
    return Cartridge(header, kv.to(dtype))


def file_of(stored: CartridgeBytes) -> bytes:
    return b"".join(bytes(part) for part in stored.file_parts())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens", [1, 5, 37])
def test_file_round_trip_and_any_safetensors_reader(dtype: torch.dtype, num_tokens: int) -> None:
    cartridge = random_cartridge(num_tokens, dtype)
    stored = cartridge.to_bytes()
    content = file_of(stored)
    read = CartridgeBytes.from_file(content)
    assert read.digest() == stored.digest()
    assert torch.equal(Cartridge.from_bytes(read).kv_L2GPD, cartridge.kv_L2GPD)
    tensors = load(content)
    assert sorted(tensors) == sorted(f"layers.{layer}.{part}" for layer in range(12) for part in ("key", "value"))
    assert torch.equal(tensors["layers.11.value"], cartridge.kv_L2GPD[11, 1])
    assert torch.equal(tensors["layers.2.key"], cartridge.kv_L2GPD[2, 0])


def test_digest_is_the_same_in_any_cut_and_for_ever() -> None:
    stored = random_cartridge().to_bytes()
    view = memoryview(stored.data)
    for size in (1, 7, 512, len(view)):
        chunks = [view[start : start + size] for start in range(0, len(view), size)]
        assert digest_of(stored.header, chunks) == stored.digest()
    # Stored digests must stay valid: neither the header's spelling nor the order of bytes may change.
    zeros = CartridgeBytes(stored.header, bytes(stored.header.num_bytes))
    assert zeros.digest() == "blake3:7ccf0be1ff01d770500f91c0362083f070774b71ec9beb0fbf084ebcc9e1e5ea"


@given(position=st.integers(0, 12 * 2 * 2 * 5 * 4 * 4 - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_changes_the_digest(position: int, bit: int) -> None:
    stored = random_cartridge().to_bytes()
    flipped = bytearray(stored.data)
    flipped[position] ^= 1 << bit
    with pytest.raises(DigestMismatch):
        CartridgeBytes(stored.header, flipped).verify(stored.digest())


@pytest.mark.parametrize(
    "change",
    [
        {"num_frozen": 2},
        {"model_fingerprint": "blake3:" + "b" * 64},
        {"rope": {"rope_type": "default"}},
        {"position_offset": 1},
    ],
)
def test_any_changed_header_changes_the_digest(change: dict[str, object]) -> None:
    stored = random_cartridge().to_bytes()
    assert CartridgeBytes(replace(stored.header, **change), stored.data).digest() != stored.digest()  # type: ignore


def test_bytes_and_tensors_that_contradict_the_header_are_refused() -> None:
    cartridge = random_cartridge()
    stored = cartridge.to_bytes()
    with pytest.raises(ShapeMismatch, match="tensor bytes"):
        CartridgeBytes(stored.header, bytes(stored.data)[:-1])
    with pytest.raises(ShapeMismatch, match=r"\(12, 2, 2, 4, 4\)"):
        Cartridge(stored.header, cartridge.kv_L2GPD[:, :, :, :4])
    with pytest.raises(ShapeMismatch, match="float64"):
        Cartridge(stored.header, cartridge.kv_L2GPD.double())


def test_files_that_are_not_cartridges_are_refused() -> None:
    content = file_of(random_cartridge().to_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    with pytest.raises(InvalidArgument, match="cut short"):
        CartridgeBytes.from_file(content[:20])
    with pytest.raises(ShapeMismatch):
        CartridgeBytes.from_file(content[:-1])
    with pytest.raises(InvalidArgument, match="no foundry header"):
        CartridgeBytes.from_file(struct.pack("<Q", 2) + b"{}")
    # The same tensors under each other's names: the header's digest would not notice.
    header["layers.0.key"], header["layers.0.value"] = header["layers.0.value"], header["layers.0.key"]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (length - len(text))
    with pytest.raises(InvalidArgument, match="another order"):
        CartridgeBytes.from_file(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\2\0\0", "cut short"),
        (struct.pack("<Q", 9) + b"{}", "incomplete"),
        (struct.pack("<Q", 2**40) + b"{}", "at most"),
        (struct.pack("<Q", 2) + b"{]", "not JSON"),
        (struct.pack("<Q", 2) + b"\xff\xff", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
    ],
)
def test_senseless_safetensors_headers_are_refused(content: bytes, why: str) -> None:
    with pytest.raises(InvalidArgument, match=why):
        read_safetensors_header(content)


@pytest.mark.parametrize(
    "change", [{"dtype": "int8"}, {"num_tokens": 0}, {"num_frozen": 6}, {"format": "other/1"}, {"num_layers": -1}]
)
def test_senseless_headers_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument):
        replace(random_cartridge().header, **change)  # type: ignore[arg-type]


def test_fingerprint_follows_every_file_that_matters(tmp_path: Path) -> None:
    directory = build_tiny_model(tmp_path / "model")
    before = fingerprint_model(directory)
    assert fingerprint_model(build_tiny_model(tmp_path / "again")) == before
    for name in ("config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"):
        path = directory / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert fingerprint_model(directory) != before, name
        path.write_bytes(content)
    assert fingerprint_model(directory) == before
    with pytest.raises(ModelNotFound):
        fingerprint_model(tmp_path)


def test_cut_context() -> None:
    context, closing = list(range(100, 150)), [7, 8]
    assert cut_context([*context, *closing], closing, 10) == [*range(100, 108), 7, 8]
    assert cut_context([*context, *closing], closing, 52) == [*context, 7, 8]
    with pytest.raises(CartridgeTooLong, match=r"53 tokens .* only 52"):
        cut_context([*context, *closing], closing, 53)
    with pytest.raises(InvalidArgument, match="closing tokens"):
        cut_context([*context, *closing], closing, 3)


def test_the_master_is_float32_whatever_is_published(tmp_path: Path) -> None:
    lm = FrozenLM.load(build_tiny_model(tmp_path / "model"))
    cartridge = TrainableCartridge(lm, lm.prefill([5, 6, 7, 8]), dtype=torch.bfloat16)
    assert cartridge.master_L2GRD.dtype == torch.float32
    # Too small for bf16: a bf16 master would never move.
    before = cartridge.snapshot()
    for _ in range(400):
        with torch.no_grad():
            cartridge.master_L2GRD += 1e-4 * cartridge.master_L2GRD.sign()
    assert not torch.equal(cartridge.snapshot().kv_L2GPD, before.kv_L2GPD)
    assert cartridge.snapshot().header.dtype == "bfloat16"
    assert torch.equal(cartridge.snapshot().kv_L2GPD[:, :, :, :1], before.kv_L2GPD[:, :, :, :1])
