"""What makes a cartridge that cartridge: its header, its bytes and the digest over both.

Nothing here needs torch, so that stores and gateways can verify what they carry.
BLAKE3 (https://github.com/BLAKE3-team/BLAKE3-specs) is imported at first use: the model side runs without it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from foundry.errors import DigestMismatch, InvalidArgument, ShapeMismatch
from foundry.untrusted import parse_json, parse_object

FORMAT = "foundry-cartridge/1"
# Of a model in memory.
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
# The losses of `foundry.model.objectives`, which needs torch.
ObjectiveKind = Literal["forward_kl", "reverse_kl", "jsd", "topk", "nll"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# Far above what any model has: damaged headers must not make us reserve the machine.
MAX_LAYERS = 4096
_MAX_DIMENSION = 2**31 - 1
MAX_PROLOGUE_BYTES = 2**22
_DIGEST = re.compile(r"blake3:[0-9a-f]{64}")

# Of what is written, or sent, at one time.
_PART_BYTES = 2**22

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class CartridgeHeader:
    """Everything besides the tensor bytes that decides what a cartridge does to a model.

    `num_tokens` is p: positions 0..p-1 are the cartridge's, the conversation starts at p. The first `num_frozen`
    of them are never trained. `rope` is the model's rotary configuration; keys are stored after RoPE.
    """

    model_fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    num_frozen: int
    dtype: str
    rope: Mapping[str, Any]
    position_offset: int = 0
    format: str = FORMAT

    def __post_init__(self) -> None:
        # Headers are read from files and records that may be damaged.
        for each in fields(self):
            kind = Mapping if each.name == "rope" else int if each.type == "int" else str
            if isinstance(value := getattr(self, each.name), bool) or not isinstance(value, kind):
                raise InvalidArgument(f"cartridge {each.name} is {value!r:.100}", field=each.name)
        if self.format != FORMAT:
            raise InvalidArgument(f"cartridge format {self.format!r} is not {FORMAT!r}", field="format")
        if self.dtype not in DTYPE_BYTES:
            raise InvalidArgument(f"cartridge dtype {self.dtype!r} is not one of {sorted(DTYPE_BYTES)}", field="dtype")
        for name in ("num_layers", "num_kv_heads", "head_dim", "num_tokens"):
            if not 1 <= getattr(self, name) <= _MAX_DIMENSION:
                raise InvalidArgument(
                    f"cartridge {name} is {getattr(self, name)}, must be within 1..{_MAX_DIMENSION}", field=name
                )
        if self.num_layers > MAX_LAYERS:
            raise InvalidArgument(
                f"cartridge num_layers is {self.num_layers}, at most {MAX_LAYERS}", field="num_layers"
            )
        if not 0 <= self.num_frozen <= self.num_tokens:
            raise InvalidArgument(
                f"cartridge num_frozen is {self.num_frozen}, must be within 0..{self.num_tokens}", field="num_frozen"
            )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[L, 2, G, P, D] of all its keys and values."""
        return (self.num_layers, 2, self.num_kv_heads, self.num_tokens, self.head_dim)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer's key and value."""
        return math.prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return self.num_layers * self.layer_bytes

    def canonical(self) -> bytes:
        """The header as the digest sees it: JSON, sorted keys, no spaces, UTF-8."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    def file_prologue(self) -> bytes:
        """What precedes the tensor bytes in the safetensors file (https://github.com/huggingface/safetensors#format).

        The library sorts tensors by name; ours stand in layer order: the file's data section is the hashed bytes.
        """
        half = self.layer_bytes // 2
        entries: dict[str, Any] = {"__metadata__": {"foundry": self.canonical().decode()}}
        for layer in range(self.num_layers):
            for part, name in enumerate(("key", "value")):
                begin = layer * self.layer_bytes + part * half
                entries[f"layers.{layer}.{name}"] = {
                    "dtype": _SAFETENSORS_DTYPES[self.dtype],
                    "shape": self.shape[2:],
                    "data_offsets": [begin, begin + half],
                }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @classmethod
    def from_dict(cls, values: Any) -> CartridgeHeader:
        """Raises InvalidArgument."""
        if not isinstance(values, Mapping):
            raise InvalidArgument(f"cartridge header is {values!r:.100}, must be an object")
        known = {field.name for field in fields(cls)}
        if unknown := set(values) - known:
            raise InvalidArgument(f"cartridge header has unknown fields {sorted(unknown)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise InvalidArgument(f"cartridge header is incomplete: {error}") from error


@dataclass(frozen=True, slots=True)
class CartridgeBytes:
    """A cartridge as it is stored and sent: header and raw tensor bytes in layer order, key before value."""

    header: CartridgeHeader
    data: Buffer

    def __post_init__(self) -> None:
        if len(self.data) != self.header.num_bytes:
            raise ShapeMismatch(f"cartridge has {len(self.data)} tensor bytes, its header says {self.header.num_bytes}")

    def digest(self) -> str:
        return digest_of(self.header, [self.data])

    def verify(self, digest: str) -> None:
        """Raises DigestMismatch unless these are the bytes that `digest` names."""
        digester = Digester(self.header)
        digester.update(self.data)
        digester.verify(digest)

    def file_parts(self) -> Iterator[Buffer]:
        """The safetensors file, in order, without copying the tensor bytes; parts are small, for who has to."""
        yield self.header.file_prologue()
        view = memoryview(self.data).cast("B")
        for begin in range(0, len(view), _PART_BYTES):
            yield view[begin : begin + _PART_BYTES]

    @classmethod
    def from_file(cls, content: Buffer) -> CartridgeBytes:
        """Read a file written by `file_parts`. Raises InvalidArgument or ShapeMismatch on anything else."""
        header, begin = read_prologue(content)
        return cls(header, memoryview(content)[begin:])


def prologue_bytes(content: Buffer) -> int:
    """Where a safetensors file's tensor bytes begin, by its first 8 bytes. Raises InvalidArgument if that can't be."""
    if len(content) < 8:
        raise InvalidArgument("the file is cut short: it has no safetensors header")
    length: int = 8 + struct.unpack("<Q", memoryview(content)[:8])[0]
    if length > MAX_PROLOGUE_BYTES:
        raise InvalidArgument(f"the file claims a header of {length} bytes, at most {MAX_PROLOGUE_BYTES} are read")
    return length


def read_safetensors_header(content: Buffer) -> dict[str, Any]:
    """A safetensors file's header: `__metadata__`, and dtype, shape and data_offsets of each tensor by its name.

    `content` may end after the header. Raises InvalidArgument.
    """
    length = prologue_bytes(content)
    if length > len(content):
        raise InvalidArgument("the file is cut short: its safetensors header is incomplete")
    try:
        return parse_object(bytes(memoryview(content)[8:length]))
    except InvalidArgument as error:
        raise InvalidArgument(f"the file's safetensors header: {error.message}") from error


def read_prologue(content: Buffer) -> tuple[CartridgeHeader, int]:
    """The header of a cartridge file, and where its tensor bytes begin. `content` may end after the prologue.

    Raises InvalidArgument.
    """
    entries = read_safetensors_header(content)
    try:
        written = entries["__metadata__"]["foundry"]
    except (KeyError, TypeError) as error:
        raise InvalidArgument(f"cartridge file has no foundry header: {error!r}") from error
    if not isinstance(written, str):
        raise InvalidArgument(f"cartridge file has no foundry header: {written!r:.100}")
    header = CartridgeHeader.from_dict(parse_json(written))
    length = prologue_bytes(content)
    if bytes(memoryview(content)[:length]) != header.file_prologue():
        raise InvalidArgument("cartridge file lists its tensors in another order or shape than its header says")
    return header, length


class Digester:
    """BLAKE3 over the canonical header and the tensor bytes, given in order in any cut; large cuts use all cores."""

    def __init__(self, header: CartridgeHeader) -> None:
        from blake3 import blake3

        self._hasher = blake3(header.canonical(), max_threads=blake3.AUTO)

    def update(self, part: Buffer) -> None:
        self._hasher.update(part)

    def digest(self) -> str:
        return f"blake3:{self._hasher.hexdigest()}"

    def verify(self, digest: str) -> None:
        """Raises DigestMismatch unless what it was given is what `digest` names."""
        if (found := self.digest()) != digest:
            raise DigestMismatch(f"cartridge bytes hash to {found}, expected {digest}")


def digest_of(header: CartridgeHeader, parts: Iterable[Buffer]) -> str:
    """The digest of a cartridge whose tensor bytes are `parts`, one after the other."""
    digester = Digester(header)
    for part in parts:
        digester.update(part)
    return digester.digest()


def check_digest(digest: str, *, field: str = "digest") -> str:
    """Raises InvalidArgument unless `digest` is spelt as a digest."""
    if not _DIGEST.fullmatch(digest):
        raise InvalidArgument(f"{digest[:100]!r} is not a digest: expected 'blake3:' and 64 hex digits", field=field)
    return digest


def content_digest(content: Buffer) -> str:
    """Digest of a document or any other plain bytes."""
    from blake3 import blake3

    return f"blake3:{blake3(content).hexdigest()}"


def ids_digest(ids: Sequence[int]) -> str:
    """Digest of token ids, as little-endian uint32: names a teacher's context."""
    return content_digest(struct.pack(f"<{len(ids)}I", *ids))


def ids_checksum(ids: Sequence[int], begin: int, end: int) -> str:
    """Binds a score to its item: BLAKE3 over the item's ids and the scored range [begin, end).

    The range is hashed too, so that scores moved by one position do not pass for the right ones.
    """
    return content_digest(struct.pack(f"<II{len(ids)}I", begin, end, *ids))


def answer_checksum(prompt_ids: Sequence[int], ids: Sequence[int], logprobs: Sequence[float]) -> str:
    """Binds an answer to its prompt and to every bit of itself, as little-endian uint32 and float32.

    The proof compares logprobs; alone it would let pass a last token for which another one as likely was put.
    """
    lengths = struct.pack("<III", len(prompt_ids), len(ids), len(logprobs))
    packed_ids = struct.pack(f"<{len(prompt_ids) + len(ids)}I", *prompt_ids, *ids)
    return content_digest(lengths + packed_ids + struct.pack(f"<{len(logprobs)}f", *logprobs))


def tensors_checksum(tensors: Sequence[tuple[str, Sequence[int], bytes]]) -> str:
    """Of dtype, shape and bytes of each tensor of a message: what TCP lets pass must not become a training signal."""
    from blake3 import blake3

    hasher = blake3()
    for dtype, shape, data in tensors:
        hasher.update(json.dumps([dtype, list(shape), len(data)]).encode())
        hasher.update(data)
    return f"blake3:{hasher.hexdigest()}"
