"""Answers through the SDK, and over a connection that the client leaves."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from foundry.errors import CartridgeNotFound, InvalidArgument
from tests.contract.gateway_routes.site import Site
from tests.services import metric, wait_until


def test_the_sdk_answers_with_identity_usage_and_times(site: Site) -> None:
    (manifest,) = site.stack.publish("sdk", site.stack.cartridge(5))
    options: dict[str, Any] = {"temperature": 1.0, "seed": 9, "max_tokens": 20, "ignore_eos": True}
    answer = site.client.chat("sdk@latest", "What is it?", **options)
    assert [(str(used), used.digest) for used in answer.cartridges] == [("sdk@1", manifest.digest)]
    assert answer.model_fingerprint == site.stack.lm.spec.fingerprint
    assert (answer.completion_tokens, answer.cartridge_tokens, answer.finish_reason) == (20, 12, "length")
    assert 0 < answer.seconds_to_first_token <= answer.seconds
    stream = site.client.stream_chat("sdk@1", [{"role": "user", "content": "What is it?"}], **options)
    assert "".join(stream) == answer.text
    assert stream.answer is not None
    assert stream.answer.cartridges == answer.cartridges
    with pytest.raises(CartridgeNotFound):
        site.client.chat("sdk@9", "What is it?")
    with pytest.raises(InvalidArgument) as raised:
        site.client.chat("sdk", "What is it?", temperature=9)
    assert raised.value.field == "temperature"


def test_a_client_that_leaves_ends_the_generation(site: Site) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Go on."}], "ignore_eos": True}
    num_tokens, num_choices = 400, 8

    def generated() -> float:
        return metric(site.rollout.metrics, "vllm:generation_tokens_total")

    def idle() -> bool:
        running = metric(site.rollout.metrics, "vllm:num_requests_running")
        return running == metric(site.gateway.metrics, "foundry_gateway_completions_in_flight") == 0

    for stream in (True, False):
        wait_until(idle, site.gateway)
        before = generated()
        asked = body | {"stream": stream, "n": num_choices, "max_tokens": num_tokens}
        request = json.dumps(asked).encode()

        async def leave(request: bytes = request, before: float = before) -> None:
            host, _, port = site.gateway.address.rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
            writer.write(f"{head}content-length: {len(request)}\r\n\r\n".encode() + request)
            await writer.drain()
            while await asyncio.to_thread(generated) == before:
                pass
            writer.close()
            await writer.wait_closed()

        asyncio.run(leave())
        wait_until(idle, site.gateway)
        assert 0 < generated() - before < num_tokens * num_choices
