"""Writes docs/metrics.md from the metrics that services define; with --check says whether it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from prometheus_client import Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

import foundry.rpc.metrics
import foundry.store.metrics
import foundry.telemetry.gpu
import foundry.telemetry.metrics
import services.gateway.metrics
import services.gateway.usage
import services.rollout.engine_metrics
import services.rollout.metrics
import services.teacher.metrics
import services.trainer.metrics

PAGE = Path(__file__).with_name("metrics.md")
# Title, what is said of it, the services that serve it, where it is defined.
SECTIONS: tuple[tuple[str, str, Sequence[str], Sequence[ModuleType]], ...] = (
    (
        "Rollout, as vLLM has them",
        "vLLM's own names, labels and buckets (V1 engine), so that its dashboards and autoscalers work unchanged. "
        "`model_name` is the base model's, `engine` is always 0. Where vLLM decodes, its other metrics are served too.",
        ["rollout"],
        [services.rollout.engine_metrics],
    ),
    ("Rollout", "Cartridges and KV memory.", ["rollout"], [services.rollout.metrics]),
    ("Teacher", "", ["teacher"], [services.teacher.metrics]),
    (
        "Trainer",
        "One worker has one run at a time, so that nothing is labelled by run.",
        ["trainer"],
        [services.trainer.metrics],
    ),
    ("Gateway", "", ["gateway"], [services.gateway.metrics]),
    (
        "Store, as every process uses it",
        "Served by gateway, rollout and trainer.",
        ["gateway", "rollout", "trainer"],
        [foundry.store.metrics],
    ),
    (
        "Store, as a whole",
        "What a gateway finds at its regular look (`census_seconds`). All report the same: take `max`, not `sum`.",
        ["gateway"],
        [services.gateway.usage],
    ),
    (
        "gRPC servers",
        "Served by rollout, teacher and trainer.",
        ["rollout", "teacher", "trainer"],
        [foundry.rpc.metrics],
    ),
    (
        "GPU",
        "Served by rollout, teacher and trainer; without CUDA there are no series.",
        ["rollout", "teacher", "trainer"],
        [foundry.telemetry.gpu],
    ),
    (
        "Every process",
        "And what the client library brings: `process_resident_memory_bytes`, `process_cpu_seconds_total`, "
        "`process_open_fds`, `python_gc_…`, `python_info`.",
        ["gateway", "rollout", "teacher", "trainer"],
        [foundry.telemetry.metrics],
    ),
)
INTRODUCTION = """# Metrics

Made from the code by `make docs`. Every service serves them in Prometheus' text format at `/metrics` on its
`metrics_port`, from before it loads its model, and nowhere else: who may call the gateway reads nobody's counts. In the
local stack `FOUNDRY_METRICS_PORT=9090 foundry up` gives the gateway 9090, the rollout 9091, the teacher 9092 and the
trainer 9093; `foundry status` shows them. Where vLLM has a metric of the same meaning it has vLLM's name; all others
start with `foundry_`. Units are seconds, bytes, tokens and nats.

Labels take few values, all known beforehand: no run, cartridge, version, digest or address is ever a label. Those are
in the logs and traces. `reason` is a type of error (`foundry.errors`), such as `RESOURCE_EXHAUSTED`.
"""


def page() -> str:
    return "\n".join([INTRODUCTION, *(section(*each) for each in SECTIONS)])


def section(title: str, about: str, served_by: Sequence[str], modules: Sequence[ModuleType]) -> str:
    rows = [row(metric) for module in modules for metric in metrics_of(module)]
    lines = [f"## {title}", ""]
    if about:
        lines += [about, ""]
    return "\n".join([*lines, "| name | type | labels | meaning |", "|---|---|---|---|", *rows, ""])


def row(metric: MetricWrapperBase) -> str:
    meaning = metric._documentation.replace("|", "\\|")
    if isinstance(metric, Histogram):
        meaning += f" Buckets: {', '.join(f'{bound:.10g}' for bound in metric._kwargs['buckets'])}."
    labels = ", ".join(f"`{label}`" for label in metric._labelnames)
    return f"| `{scraped_name(metric)}` | {metric._type} | {labels} | {meaning} |"


def metrics_of(module: ModuleType) -> Iterator[MetricWrapperBase]:
    """The metrics that a module defines, in its order."""
    for value in vars(module).values():
        if isinstance(value, MetricWrapperBase):
            yield value


def scraped_name(metric: MetricWrapperBase) -> str:
    """The name that queries use; of a histogram the part before `_bucket`, `_sum` and `_count`."""
    return f"{metric._name}_total" if isinstance(metric, Counter) else str(metric._name)


def served_by(service: str) -> set[str]:
    """Names that the service serves, as `scraped_name` has them."""
    return {
        scraped_name(metric)
        for _, _, services_of, modules in SECTIONS
        if service in services_of
        for module in modules
        for metric in metrics_of(module)
    }


def main() -> int:
    if "--check" not in sys.argv:
        PAGE.write_text(page())
        return 0
    if not PAGE.exists() or PAGE.read_text() != page():
        print("docs/metrics.md is not what the code says: run 'make docs'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
