"""/metrics: what a process counts, in Prometheus' text format."""

from __future__ import annotations

from importlib.metadata import version

from prometheus_client import Gauge, disable_created_metrics, start_http_server

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
        start_http_server(port)
    except OSError as error:
        raise PortTaken(f"cannot serve metrics on port {port}: {error}") from error
