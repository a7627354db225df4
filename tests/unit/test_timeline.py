"""The phases of a sequence, as vLLM tells them apart."""

from __future__ import annotations

from prometheus_client import REGISTRY

from services.rollout.engine import SamplingParams, SequenceRequest, TokenOutput
from services.rollout.engine_metrics import EngineMetrics
from services.rollout.timeline import Timeline


def request(*, skip_prefix_cache: bool = False) -> SequenceRequest:
    return SequenceRequest((5, 6, 7), (), SamplingParams(max_new_tokens=4), skip_prefix_cache)


def output(cached_tokens: int = 2) -> TokenOutput:
    return TokenOutput(
        sequence_id=0,
        token_id=1,
        logprob=-1.0,
        top_logprobs=(),
        text_offset=0,
        text="",
        finish_reason=None,
        digests=(),
        cartridge_tokens=0,
        cached_tokens=cached_tokens,
        scheduled_at=112.0,
    )


def value(model_name: str, name: str, **labels: str) -> float:
    found = REGISTRY.get_sample_value(f"vllm:{name}", {"model_name": model_name, "engine": "0", **labels})
    assert found is not None, name
    return found


def test_phases_of_a_sequence_that_ended() -> None:
    timeline = Timeline(EngineMetrics("ended"), request(), arrived_at=100.0, submitted_at=110.0)
    assert [timeline.token(output(), now) for now in (115.0, 116.0, 118.0)] == [3, 0, 0]
    timeline.end("length")
    expected = {
        "time_to_first_token_seconds": 15.0,
        "inter_token_latency_seconds": 3.0,
        "e2e_request_latency_seconds": 18.0,
        "request_queue_time_seconds": 2.0,
        "request_prefill_time_seconds": 3.0,
        "request_decode_time_seconds": 3.0,
        "request_prompt_tokens": 3.0,
        "request_generation_tokens": 3.0,
    }
    assert {name: value("ended", f"{name}_sum") for name in expected} == expected
    assert value("ended", "inter_token_latency_seconds_count") == 2
    assert value("ended", "prefix_cache_queries_total") == 3
    assert value("ended", "prefix_cache_hits_total") == 2
    assert value("ended", "request_success_total", finished_reason="length") == 1


def test_a_sequence_that_was_given_up_has_no_latency() -> None:
    timeline = Timeline(EngineMetrics("aborted"), request(), arrived_at=100.0, submitted_at=110.0)
    timeline.token(output(), 115.0)
    timeline.end("abort")
    assert value("aborted", "request_success_total", finished_reason="abort") == 1
    assert value("aborted", "e2e_request_latency_seconds_count") == 0


def test_what_does_not_ask_the_prefix_cache_is_no_query() -> None:
    timeline = Timeline(EngineMetrics("skipped"), request(skip_prefix_cache=True), arrived_at=0.0, submitted_at=0.0)
    assert timeline.token(output(cached_tokens=0), 1.0) == 3
    assert value("skipped", "prefix_cache_queries_total") == 0
