"""/metrics: what a process counts, in Prometheus' text format."""

from __future__ import annotations

from http.server import ThreadingHTTPServer
from importlib.metadata import version
from threading import Thread

from prometheus_client import Gauge, MetricsHandler, disable_created_metrics

from foundry.errors import PortTaken

BUILD_INFO = Gauge("foundry_build_info", "Always 1: which service this is, in which version.", ["service", "version"])


def serve_metrics(service: str, port: int) -> None:
    """Serve /metrics on `port` of all addresses from a thread; 0 serves none. Raises PortTaken.

    To be called before the model is loaded, so that a service that is starting can be scraped.
    """
    BUILD_INFO.labels(service, version("cartridge-foundry")).set(1)
    # A second series for every counter and histogram, which nobody asks for.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    if not port:
        return
    try:
        server = ThreadingHTTPServer(("0.0.0.0", port), TextHandler)
    except OSError as error:
        raise PortTaken(f"cannot serve metrics on port {port}: {error}") from error
    Thread(target=server.serve_forever, name="metrics", daemon=True).start()


class TextHandler(MetricsHandler):
    """Answers in the text format whatever else is accepted.

    In OpenMetrics, which Prometheus 2 prefers, the library spells `vllm:…` as `vllm_…` (prometheus/client_python#1177).
    """

    def do_GET(self) -> None:
        del self.headers["Accept"]
        super().do_GET()
