"""What bodies within the limits cost a gateway: make bench-bodies

Each is made to take long to read or to grow in memory. Meanwhile another client asks for /healthz again and again: how
long it waits at most, beside what it waits for an ordinary request, says how much one request holds up another.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path

from foundry.store.settings import StoreSettings
from tests.hostile_bodies import MIN_BYTES, bodies, cost, warm_up
from tests.services import open_stack, wait_ready, wait_serving

RESULT = Path(__file__).parent / "results" / "bodies.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--result", type=Path, default=RESULT)
    arguments = parser.parse_args()
    document_bytes = StoreSettings.model_fields["max_document_bytes"].default
    hostile = bodies(document_bytes * 3 // 2)
    with tempfile.TemporaryDirectory() as directory, open_stack(Path(directory)) as stack:
        rollout = stack.rollout()
        wait_serving(rollout)
        found = {}
        for name, (path, body) in hostile.items():
            # Of its own, since memory is kept.
            gateway = stack.gateway([rollout], "--store.max-document-bytes", str(document_bytes))
            wait_ready(gateway)
            warm_up(gateway)
            found[name] = cost(gateway, path, body)
            gateway.stop()
    rows = {name: {"bytes": len(hostile[name][1]), **asdict(cost)} for name, cost in found.items()}
    result = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "min_bytes": MIN_BYTES, "bodies": rows}
    arguments.result.write_text(json.dumps(result, indent=1) + "\n")
    print("| body | MB | status | seconds | delay of others, ms | memory, times its size (of 1 MiB at least) |")
    print("|---|---|---|---|---|---|")
    for name, row in rows.items():
        times = row["peak_bytes"] / max(MIN_BYTES, row["bytes"])
        print(
            f"| {name} | {row['bytes'] / 1e6:.1f} | {row['status']} | {row['seconds']:.3f} | "
            f"{1e3 * row['delay_seconds']:.0f} | {times:.1f} |"
        )


if __name__ == "__main__":
    main()
