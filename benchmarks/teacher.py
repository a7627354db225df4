"""The teacher on a GPU, behind long documents: python -m benchmarks.teacher

Runs with torch and transformers alone (the disk's row too; nothing is asked of a service). First a small model's hidden
states and KV are compared with those of layers that are not compiled; wrong ones end the benchmark. Then a model of
Llama-3.2-3B's shape with random weights in bfloat16
- scores 32 samples of 128 turn and 1024 answer tokens behind one document, whose KV is kept and, for timing, random:
  seconds are those until all hidden states are in the host's memory;
- computes documents' KV;
- brings a document's KV back from the host's memory and from a disk, which must give the same bits.

The floor of scoring N tokens behind a document of P: 2 * parameters * N + 4 * H * D * L * N * P FLOP. For 32 x 1152
tokens that are 208 + 4 * 24 * 128 * 28 * 36,864 * P: behind 12k 0.37e15, behind 100k 1.48e15 in all. A GPU of 989 dense
TFLOP/s in bfloat16 can't do the latter in less than 1.50 s; in 4.0 s it does 371 TFLOP/s. All of
a document's KV is read once for each micro-batch: 11.5 GB * 8 at 4.8 TB/s are 0.02 s.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_swap import build
from benchmarks.shapes import LLAMA_3B
from benchmarks.update import ANSWER_TOKENS, SMALL, TURN_TOKENS, measure, samples_of
from foundry.model.attention.packed import PackedAttention
from foundry.model.attention.prefill import PrefillAttention
from foundry.model.lm import FrozenLM
from foundry.model.packing import CUDA_MICRO_BATCH_TOKENS, micro_batches
from foundry.sizing import MODELS
from services.teacher.contexts import Contexts
from services.teacher.disk import DiskContexts
from services.teacher.pages import PAGE_BYTES, Key
from services.teacher.scorer import Item, Want, score

NUM_SAMPLES = 32
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
MODEL = MODELS["llama-3.2-3b"]


def random_kv(lm: FrozenLM, num_tokens: int) -> Tensor:
    return torch.randn(lm.spec.kv_shape(num_tokens), device=lm.device, dtype=lm.dtype)


def items_of(lengths: list[tuple[int, int]]) -> list[Item]:
    return [Item("document", sample.ids, sample.score_from) for sample in samples_of(lengths)]


def ids_of(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, 50_000, (num_tokens,), generator=generator).tolist()


def hidden(lm: FrozenLM, items: list[Item], contexts: list[Tensor]) -> Tensor:
    scores = score(lm, items, contexts, Want(hidden=True)).result()
    return torch.cat([each.hidden_NE for each in scores if each.hidden_NE is not None])


def check(name: str, dtype: torch.dtype, found: Tensor, expected: Tensor) -> tuple[str, float]:
    """The relative L2 error. Raises if it is too large."""
    error = ((found - expected).float().norm() / expected.float().norm()).item()
    name = f"{name}, {str(dtype).removeprefix('torch.')}"
    print(f"relative error of {name}: {error:.2e} (at most {LARGEST_ERROR[dtype]:.0e})", flush=True)
    assert error < LARGEST_ERROR[dtype], f"{name}: wrong, so nothing is measured"
    return name, error


def gate() -> Iterator[tuple[str, float]]:
    """Errors of hidden states behind several documents in one micro-batch, and of KV in several chunks."""
    items = items_of([(17, 200), (128, 300), (5, 30), (100, 28), (1, 1)])
    document = ids_of(3001)
    for dtype in LARGEST_ERROR:
        lm = build("cuda", dtype, **SMALL)
        documents = [random_kv(lm, num_tokens) for num_tokens in (1000, 256)]
        contexts = [documents[index % 2] for index in range(len(items))]
        found, found_kv = hidden(lm, items, contexts), lm.prefill(document, chunk_tokens=1024)
        left = lm.unfilled(len(document))
        begin = next(lm.fill(left, document, chunk_tokens=1024))
        assert [*lm.fill(left, document, begin, chunk_tokens=1024)] == [2048, 3001]
        assert left.equal(found_kv), "who goes on with a document gets other bits"
        lm.packed_plan, lm.prefill_plan = PackedAttention, PrefillAttention
        yield check("hidden states", dtype, found, hidden(lm, items, contexts))
        yield check("KV", dtype, found_kv, lm.prefill(document, chunk_tokens=1024))


def scoring(lm: FrozenLM, quick: bool) -> Iterator[dict[str, Any]]:
    items = items_of([(TURN_TOKENS, ANSWER_TOKENS)] * NUM_SAMPLES)
    for num_tokens in [12_288] if quick else [2048, 12_288, 100_000]:
        kv_L2GPD = random_kv(lm, num_tokens)

        def work(kv_L2GPD: Tensor = kv_L2GPD) -> None:
            begun = [
                score(lm, items[some], [kv_L2GPD] * len(items[some]), Want(hidden=True))
                for some in micro_batches(items, CUDA_MICRO_BATCH_TOKENS)
            ]
            for each in begun:
                each.result()

        row = measure(work, 3)
        del kv_L2GPD, work
        flops = sum(MODEL.forward_flops(NUM_SAMPLES, TURN_TOKENS + ANSWER_TOKENS, num_tokens))
        yield {"document_tokens": num_tokens, "samples": NUM_SAMPLES, **row, "tflops": flops / row["seconds"] / 1e12}


def prefill(lm: FrozenLM, quick: bool) -> Iterator[dict[str, Any]]:
    for num_tokens in [12_288] if quick else [12_288, 100_000, 131_072]:
        ids = ids_of(num_tokens)
        row = measure(lambda ids=ids: lm.prefill(ids), 3)  # type: ignore[misc]
        flops = sum(MODEL.forward_flops(1, num_tokens, 0))
        yield {"document_tokens": num_tokens, **row, "tflops": flops / row["seconds"] / 1e12}


def reloads(lm: FrozenLM, num_tokens: int, directory: Path) -> Iterator[dict[str, Any]]:
    """Two documents by turns where the device has room for one: seconds until the other one is back on it."""
    kv_bytes = num_tokens * lm.spec.kv_bytes_per_token(lm.dtype)
    keys = [Key("", f"document {index}") for index in range(2)]
    expected = [lm.prefill(ids_of(num_tokens, index)) for index in range(2)]

    def by_turns(tier: str, contexts: Contexts, before: Callable[[], None] = lambda: None) -> dict[str, Any]:
        for index, key in enumerate(keys):
            contexts.put(key, ids_of(num_tokens, index), lambda: None)
        times = []
        for index in (0, 1, 0, 1, 0):
            before()
            torch.cuda.synchronize()
            began = time.perf_counter()
            (found,) = contexts.get([keys[index]])
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            assert found.equal(expected[index]), f"from {tier} other bits came back"
            del found
        contexts.close()
        # The first one pins the memory that the others use again.
        return {"tier": tier, "document_tokens": num_tokens, "first_seconds": times[0], "seconds": sorted(times[1:])[2]}

    def kept_on_disk() -> Contexts:
        files = DiskContexts(directory, 3 * kv_bytes, "model")
        return Contexts(lm, kv_bytes, 0, files)

    yield by_turns("host", Contexts(lm, kv_bytes, 2 * -(-kv_bytes // PAGE_BYTES) * PAGE_BYTES))
    yield by_turns("disk, in the page cache", kept_on_disk())
    yield by_turns("disk", kept_on_disk(), lambda: forget(directory))


def forget(directory: Path) -> None:
    """Files leave the page cache."""
    for path in directory.glob("*.kv"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the gate, and a document of 12,288 tokens")
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: where temporary files are")
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "teacher.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(result["device"])
    result["errors"] = dict(gate())
    # Code compiled for the small models would count towards how often one function may be compiled.
    torch.compiler.reset()
    lm = build("cuda", torch.bfloat16, max_position_embeddings=131072, **LLAMA_3B)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        tables = {
            "rows": scoring(lm, arguments.quick),
            "prefill": prefill(lm, arguments.quick),
            "reloads": reloads(lm, 12_288, Path(directory)),
        }
        for name, rows in tables.items():
            result[name] = []
            print(f"\n{name}")
            for row in rows:
                print("  ".join(f"{key} {_figure(value)}" for key, value in row.items()), flush=True)
                result[name].append(row)
                arguments.result.write_text(json.dumps(result, indent=2) + "\n")
                gc.collect()
                torch.cuda.empty_cache()


def _figure(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
