"""Cartridges in the server: in use, in which tier, and counted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import torch
from prometheus_client import REGISTRY

from foundry.model.lm import FrozenLM
from foundry.v1 import rollout_pb2
from tests.contract.rollout.server import TIMEOUT_SECONDS, Gate, Rollout, joined, serving

VLLM = {"model_name": "tiny-llama", "engine": "0"}


def metric(name: str, **labels: str) -> float:
    value = REGISTRY.get_sample_value(name, labels)
    assert value is not None, name
    return value


def hits() -> list[float]:
    name, tiers = "foundry_cartridge_hits_total", ("device", "host", "store")
    return [REGISTRY.get_sample_value(name, {"tier": tier}) or 0.0 for tier in tiers]


async def test_references_while_decoding(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate) as rollout:
        cartridge = rollout.publish(0, version=4)
        request = rollout.request(cartridges=[cartridge], sampling={"n": 2})
        call = rollout.stub.Generate(request, timeout=TIMEOUT_SECONDS)
        submission = await rollout.submitted.get()
        resident = await rollout.resident()
        (found,) = resident.cartridges
        assert (found.cartridge, found.references) == (cartridge, 2)
        assert found.num_bytes == rollout.source.cartridges[cartridge.digest].header.num_bytes
        gate.allow(1)
        await call.read()
        # Of the memory, not of the places: two of four are taken, and filled with a short prompt.
        usage = metric("vllm:kv_cache_usage_perc", **VLLM)
        assert usage == metric("foundry_kv_used_bytes") / metric("foundry_kv_bytes")
        assert 0 < usage < 0.1
        gate.open()
        assert len([chunk async for chunk in call]) >= 2
        await submission.ended
        (found,) = (await rollout.resident()).cartridges
        assert found.references == 0


async def test_tiers_are_reported(lm: FrozenLM, directory: Path) -> None:
    num_bytes = lm.spec.header(16, 1, torch.float32).num_bytes
    budgets: dict[str, Any] = {"cartridge_budget_bytes": 2 * num_bytes, "host_cartridge_budget_bytes": 4 * num_bytes}
    async with serving(lm, directory, **budgets) as rollout:
        older, old, new = (rollout.publish(seed, version=seed) for seed in range(3))
        for cartridge in (older, old, new):
            await rollout.generate(rollout.request(cartridges=[cartridge]))
        answer = await rollout.resident()
        assert (answer.budget_bytes, answer.host_budget_bytes) == (2 * num_bytes, 4 * num_bytes)
        assert [(each.cartridge, each.tier) for each in answer.cartridges] == [
            (old, rollout_pb2.TIER_DEVICE),
            (new, rollout_pb2.TIER_DEVICE),
            (older, rollout_pb2.TIER_HOST),
        ]
        assert {each.num_bytes for each in answer.cartridges} == {num_bytes}
        assert metric("foundry_resident_cartridges", tier="host") == 3
        assert metric("foundry_resident_cartridge_bytes", tier="host") == 3 * num_bytes
        before = hits()
        # The store has lost it; host memory has not.
        rollout.source.cartridges.clear()
        for cartridge in (older, older, new):
            await rollout.generate(rollout.request(cartridges=[cartridge]))
        assert [now - old for now, old in zip(hits(), before, strict=True)] == [2, 1, 0]


async def test_a_new_version_is_loaded_while_the_old_one_decodes(lm: FrozenLM, directory: Path) -> None:
    gate = Gate()
    async with serving(lm, directory, gate) as rollout:
        old, new = rollout.publish(0, version=1), rollout.publish(1, version=2)
        call = rollout.stub.Generate(
            rollout.request(cartridges=[old], sampling={"max_new_tokens": 50}), timeout=TIMEOUT_SECONDS
        )
        submission = await rollout.submitted.get()
        gate.allow(2)
        chunks: list[Any] = [await call.read()]
        meanwhile = asyncio.create_task(rollout.generate(rollout.request(cartridges=[new])))
        await rollout.submitted.get()
        gate.allow(8)
        assert (await meanwhile)[0].identity.cartridges[0].digest == new.digest
        assert not submission.ended.done()
        gate.open()
        chunks += [chunk async for chunk in call]
        assert chunks[0].identity.cartridges[0].digest == old.digest
        alone = rollout.request(cartridges=[old], sampling={"max_new_tokens": 50}, skip_prefix_cache=True)
        assert joined(chunks)[0] == joined(await rollout.generate(alone))[0]


async def test_metrics(rollout: Rollout) -> None:
    names = [
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
        "vllm:time_to_first_token_seconds_count",
        "vllm:inter_token_latency_seconds_count",
        "vllm:e2e_request_latency_seconds_count",
        "vllm:request_queue_time_seconds_count",
        "vllm:request_prefill_time_seconds_count",
        "vllm:request_decode_time_seconds_count",
        "vllm:request_prompt_tokens_sum",
        "vllm:request_generation_tokens_sum",
        "vllm:iteration_tokens_total_sum",
    ]
    before = [metric(name, **VLLM) for name in names]
    fetches = metric("foundry_cartridge_fetch_seconds_count")
    ended = metric("vllm:request_success_total", finished_reason="length", **VLLM)
    request = rollout.request(cartridges=[rollout.publish(0)])
    await rollout.generate(request)
    await rollout.generate(request)
    changes = [metric(name, **VLLM) - old for name, old in zip(names, before, strict=True)]
    assert changes == [10, 12, 10, 4, 2, 10, 2, 2, 2, 2, 10, 12, 22]
    assert metric("foundry_cartridge_fetch_seconds_count") - fetches == 1
    assert metric("vllm:request_success_total", finished_reason="length", **VLLM) - ended == 2
    assert metric("foundry_resident_cartridges", tier="device") == 1
    num_bytes = (await rollout.resident()).cartridges[0].num_bytes
    assert metric("foundry_resident_cartridge_bytes", tier="device") == num_bytes
    assert metric("foundry_resident_cartridges", tier="host") == 0
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert metric(name, **VLLM) == 0
    assert metric("foundry_kv_used_bytes") == metric("foundry_kv_slots_used") == 0
    assert metric("foundry_kv_bytes") > metric("foundry_kv_slots") > 0
