"""Checkpoints of the research library and directories of Tokasaurus, written here as their layout is documented."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from foundry.errors import CartridgeUnreadable
from foundry.formats import research, tokasaurus
from foundry.formats.pickled import joined
from foundry.identity import CartridgeHeader
from foundry.model.cartridge import Cartridge

LAYERS, HEADS, TOKENS, SIZE = 3, 2, 5, 4


def drawn(num_frozen: int, dtype: torch.dtype = torch.float32) -> Cartridge:
    kv = torch.randn(LAYERS, 2, HEADS, TOKENS, SIZE, generator=torch.Generator().manual_seed(7)).to(dtype)
    name = str(dtype).removeprefix("torch.")
    header = CartridgeHeader("blake3:" + "1" * 64, LAYERS, HEADS, SIZE, TOKENS, num_frozen, name, {})
    return Cartridge(header, kv)


def contents(kv: Tensor, num_frozen: int, spelling: str, kind: type = list) -> dict[str, Any]:
    """As the library has it."""

    def layers(part: int, tokens: slice) -> Any:
        return kind([nn.Parameter(kv[layer, part, :, tokens].clone()[None]) for layer in range(len(kv))])

    cut = num_frozen
    return {
        "trainable_keys": layers(0, slice(cut, None)),
        "trainable_values": layers(1, slice(cut, None)),
        f"{spelling}_keys": layers(0, slice(0, cut)) if cut else kind([]),
        f"{spelling}_values": layers(1, slice(0, cut)) if cut else kind([]),
    }


@pytest.mark.parametrize(
    ("kind", "spelling", "num_frozen"),
    [(list, "frozen", 1), (nn.ParameterList, "fixed", 2), (nn.ParameterList, "frozen", 0)],
)
def test_the_librarys_files_are_read(kind: type, spelling: str, num_frozen: int, tmp_path: Path) -> None:
    kv = drawn(1).kv_L2GPD
    torch.save(contents(kv, num_frozen, spelling, kind), tmp_path / "cache.pt")
    found = research.read(tmp_path / "cache.pt")
    assert found.num_frozen == num_frozen
    assert torch.equal(found.kv_L2GPD, kv)


@pytest.mark.parametrize(
    ("dtype", "spelling", "num_frozen"),
    [
        (torch.float32, "frozen", 1),
        (torch.bfloat16, "fixed", 1),
        (torch.float16, "frozen", 0),
        (torch.float32, "fixed", 0),
    ],
)
def test_what_we_write_comes_back_to_the_bit(
    dtype: torch.dtype, spelling: Literal["frozen", "fixed"], num_frozen: int, tmp_path: Path
) -> None:
    cartridge = drawn(num_frozen, dtype)
    research.write(cartridge, tmp_path / "cache.pt", spelling=spelling)
    # As the library reads it.
    checkpoint = torch.load(tmp_path / "cache.pt", weights_only=False)
    assert isinstance(checkpoint["trainable_keys"], nn.ParameterList)
    assert len(checkpoint["trainable_keys"]) == LAYERS
    assert len(checkpoint[f"{spelling}_keys"]) == (0 if (spelling, num_frozen) == ("frozen", 0) else LAYERS)
    found = research.read(tmp_path / "cache.pt")
    assert found.num_frozen == num_frozen
    assert found.kv_L2GPD.dtype == dtype
    assert torch.equal(found.kv_L2GPD, cartridge.kv_L2GPD)


def test_a_directory_of_tokasaurus_comes_back_to_the_bit(tmp_path: Path) -> None:
    cartridge = drawn(1, torch.bfloat16)
    tokasaurus.write(cartridge, tmp_path / "ours", base_model="a/model")
    assert torch.equal(tokasaurus.read(tmp_path / "ours").kv_L2GPD, cartridge.kv_L2GPD)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    torch.save(contents(cartridge.kv_L2GPD, 1, "fixed"), theirs / "cartridge.pt")
    (theirs / "config.yaml").write_text("kv_cache_initializer:\n  max_tokens: 5\nother: [1, 2]\n")
    assert torch.equal(tokasaurus.read(theirs).kv_L2GPD, cartridge.kv_L2GPD)


@pytest.mark.parametrize(
    "config",
    [
        "kv_cache_initializer: {max_tokens: 4}",
        "!!python/object/apply:os.system ['true']",
        "a: [",
        "a: &a [*a]\nb: !!binary x",
    ],
)
def test_a_wrong_configuration_is_refused(config: str, tmp_path: Path) -> None:
    research.write(drawn(1), tmp_path / "cartridge.pt")
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(CartridgeUnreadable):
        tokasaurus.read(tmp_path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (open, (str(self._path), "w"))


def archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, content in entries.items():
            made.writestr(name, content)
    return path


def claiming(path: Path, shape: tuple[int, ...]) -> Path:
    """One number of storage, and a tensor of it that claims to have this shape."""
    tensor = torch.zeros(1).as_strided(shape, (0,) * len(shape))
    layers = {name: [tensor] for name in ("trainable_keys", "trainable_values")}
    torch.save(layers | {"frozen_keys": [], "frozen_values": []}, path)
    return path


def hostile(kind: str, path: Path) -> Path:
    mark = path.with_suffix(".ran")
    whole = io.BytesIO()
    torch.save({"trainable_keys": [torch.zeros(1, 1, 1, 1)]}, whole)
    match kind:
        case "a bomb in an archive":
            return archive(path, {"a/data.pkl": pickle.dumps(Bomb(mark), protocol=2), "a/version": b"3"})
        case "a bomb of a newer protocol":
            return archive(path, {"a/data.pkl": pickle.dumps(Bomb(mark), protocol=4), "a/version": b"3"})
        case "a bomb alone":
            path.write_bytes(pickle.dumps(Bomb(mark)))
        case "nothing":
            path.write_bytes(b"")
        case "noise":
            path.write_bytes(bytes(range(256)) * 64)
        case "a truncated archive":
            path.write_bytes(whole.getvalue()[:-200])
        case "a compressed archive":
            return archive(path, {"a/data.pkl": bytes(10**8)}, zipfile.ZIP_DEFLATED)
        case "an entry elsewhere":
            return archive(path, {"../../data.pkl": b"."})
        case "two pickles":
            return archive(path, {"a/data.pkl": b".", "b/data.pkl": b"."})
        case "endless memo":
            return archive(path, {"a/data.pkl": b"\x80\x02" + b"]" * 2**21 + b"."})
        case "a length of 2^31":
            return archive(path, {"a/data.pkl": b"\x80\x02X" + struct.pack("<I", 2**31) + b"."})
        case "ten gigabytes":
            return claiming(path, (1, 8, 2_500_000, 128))
        case "2^60 numbers":
            return claiming(path, (1, 2**20, 2**20, 2**20))
    return path


HOSTILE = [
    "a bomb in an archive",
    "a bomb of a newer protocol",
    "a bomb alone",
    "nothing",
    "noise",
    "a truncated archive",
    "a compressed archive",
    "an entry elsewhere",
    "two pickles",
    "endless memo",
    "a length of 2^31",
    "ten gigabytes",
    "2^60 numbers",
]


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_and_leave_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    path = hostile(kind, tmp_path / "cache.pt")
    with pytest.raises(CartridgeUnreadable):
        research.read(path)
    assert not path.with_suffix(".ran").exists(), "it ran"
    assert list(scratch.iterdir()) == []


def changed(kind: str) -> dict[str, Any]:
    layer = torch.zeros(1, HEADS, TOKENS - 1, SIZE)
    changes: dict[str, dict[str, Any]] = {
        "a layer too few": {"trainable_values": [layer] * (LAYERS - 1)},
        "no layers": {"trainable_keys": [], "trainable_values": []},
        "frozen keys alone": {"frozen_values": []},
        "another width": {"trainable_keys": [torch.zeros(1, HEADS, TOKENS - 1, SIZE + 1)] * LAYERS},
        "another dtype": {"trainable_keys": [layer.double()] * LAYERS},
        "dtypes that differ": {"trainable_keys": [layer.half()] * LAYERS},
        "three axes": {"trainable_keys": [layer[0]] * LAYERS},
        "a batch": {"trainable_keys": [layer.repeat(2, 1, 1, 1)] * LAYERS},
        "no tensors": {"trainable_keys": [1] * LAYERS},
        "no list": {"trainable_keys": 1},
        "no values": {"trainable_values": None},
    }
    return changes[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "a layer too few",
        "no layers",
        "frozen keys alone",
        "another width",
        "another dtype",
        "dtypes that differ",
        "three axes",
        "a batch",
        "no tensors",
        "no list",
        "no values",
    ],
)
def test_wrong_counts_and_shapes_are_refused(kind: str) -> None:
    right = contents(drawn(1).kv_L2GPD, 1, "frozen")
    joined(right, max_bytes=10_000)
    with pytest.raises(ValueError, match=r"its |it has "):
        joined(right | changed(kind), max_bytes=10_000)


def test_more_than_the_file_has_is_refused() -> None:
    right = contents(drawn(1).kv_L2GPD, 1, "frozen")
    num_bytes = LAYERS * 2 * HEADS * TOKENS * SIZE * 4
    joined(right, max_bytes=num_bytes)
    with pytest.raises(ValueError, match="more bytes than the file has"):
        joined(right, max_bytes=num_bytes - 1)
    with pytest.raises(ValueError, match="not a dict"):
        joined([1], max_bytes=1)
