"""What the KV of a document takes on a GPU: python -m benchmarks.gpu_rates

Runs with torch and transformers alone, on a model of Llama-3.2-3B's shape with random weights in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.gpu_swap import build
from benchmarks.shapes import LLAMA_3B

DOCUMENT_TOKENS = 6144


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, default=Path(__file__).parent / "results" / "gpu_rates.json")
    arguments = parser.parse_args()
    lm = build("cuda", torch.bfloat16, **LLAMA_3B)
    document = list(range(DOCUMENT_TOKENS))
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        began = time.perf_counter()
        lm.prefill(document)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        # The first one warms up.
        "document_seconds": statistics.median(times[1:]),
        "document_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
    }
    print(json.dumps(result, indent=2))
    arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
