"""How long a checkpoint of the research library takes to be read: python -m benchmarks.formats

Of Llama-3.2-3B's shape with 2048 tokens in bf16, 235 MB, written as the library writes it; the time is that of all that
an import does before it looks at the model, the reading process included.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from examples.demo import processor
from foundry.formats import research
from foundry.identity import CartridgeHeader
from foundry.model.cartridge import Cartridge

RESULT = Path(__file__).parent / "results" / "formats.json"
LAYERS, HEADS, SIZE, TOKENS, REPEATS = 28, 8, 128, 2048, 5


def main() -> None:
    kv_L2GPD = torch.randn(LAYERS, 2, HEADS, TOKENS, SIZE).to(torch.bfloat16)
    header = CartridgeHeader("blake3:" + "0" * 64, LAYERS, HEADS, SIZE, TOKENS, 1, "bfloat16", {})
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "cache.pt"
        research.write(Cartridge(header, kv_L2GPD), path)
        num_bytes, seconds = path.stat().st_size, []
        for _ in range(REPEATS):
            began = time.perf_counter()
            found = research.read(path)
            seconds.append(time.perf_counter() - began)
    if not torch.equal(found.kv_L2GPD, kv_L2GPD):
        raise SystemExit("what was read is not what was written")
    result = {
        "processor": processor(),
        "megabytes": round(num_bytes / 1e6, 1),
        "seconds": {"median": round(statistics.median(seconds), 2), "most": round(max(seconds), 2)},
    }
    print(json.dumps(result))
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
