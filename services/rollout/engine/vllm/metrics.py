"""vLLM's own metrics, beside ours of the same names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase
from vllm.v1.metrics import loggers

from services.rollout import engine_metrics

_OURS = {each._name: each for each in vars(engine_metrics).values() if isinstance(each, MetricWrapperBase)}

# Its lines every ten seconds say what the metrics do.
logging.getLogger(loggers.__name__).setLevel(logging.WARNING)


def _beside_ours(kind: type[MetricWrapperBase]) -> Callable[..., MetricWrapperBase]:
    """Makes a metric that is counted and not served where we serve one of its name: ours begin at the call's arrival
    and count what waits in our queue."""

    def make(name: str, *arguments: Any, **options: Any) -> MetricWrapperBase:
        options["registry"] = None if name in _OURS else REGISTRY
        return kind(name, *arguments, **options)

    return make


class Metrics(loggers.PrometheusStatLogger):  # type: ignore[misc]
    """Serves what vLLM reports and we don't, and remembers what the engine's stats need."""

    _gauge_cls = staticmethod(_beside_ours(Gauge))
    _counter_cls = staticmethod(_beside_ours(Counter))
    _histogram_cls = staticmethod(_beside_ours(Histogram))

    num_running = 0
    kv_usage = 0.0

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        # Takes everything named vllm: out of the registry.
        super().__init__(vllm_config, engine_indexes)
        for metric in _OURS.values():
            REGISTRY.register(metric)

    def record(self, scheduler_stats: Any, *arguments: Any, **options: Any) -> None:
        super().record(scheduler_stats, *arguments, **options)
        if scheduler_stats is not None:
            self.num_running = scheduler_stats.num_running_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage
