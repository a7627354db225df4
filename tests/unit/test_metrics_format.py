"""/metrics has one spelling of each name, whatever a scraper prefers."""

from __future__ import annotations

from http.server import ThreadingHTTPServer
from threading import Thread

import httpx
import pytest

from foundry.telemetry.metrics import TextHandler
from services.rollout.engine_metrics import EngineMetrics

PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
PROMETHEUS_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=1.0.0;q=0.4"


@pytest.mark.parametrize("accepted", [PROMETHEUS_2, PROMETHEUS_3, "*/*"])
def test_names_keep_their_colon(accepted: str) -> None:
    EngineMetrics("tiny")
    with ThreadingHTTPServer(("127.0.0.1", 0), TextHandler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/metrics"
            answer = httpx.get(url, headers={"Accept": accepted}, trust_env=False)
        finally:
            server.shutdown()
            thread.join()
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert '\nvllm:num_requests_running{engine="0",model_name="tiny"} ' in answer.text
