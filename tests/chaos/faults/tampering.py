"""What is done to the messages of a call between a real servicer and the wire."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator
from typing import Any

from foundry.v1 import rollout_pb2
from tests.chaos.faults.servers import Call, RolloutHost, Tamper

_DELAY_SECONDS = 0.02


# Of any streamed call


async def delayed(call: Call) -> AsyncIterator[Any]:
    async for response in call.answer(call.request):
        await asyncio.sleep(_DELAY_SECONDS)
        yield response


async def dropped(call: Call) -> AsyncIterator[Any]:
    """The call is carried out and never answered: only the caller's deadline ends it."""
    responses = [response async for response in call.answer(call.request)]
    await asyncio.Event().wait()
    for response in responses:
        yield response


async def truncated(call: Call) -> AsyncIterator[Any]:
    """The stream ends early, and well."""
    responses = [response async for response in call.answer(call.request)]
    for response in responses[:-1]:
        yield response


async def doubled(call: Call) -> AsyncIterator[Any]:
    async for response in call.answer(call.request):
        yield response
        yield response


async def asked_twice(call: Call) -> AsyncIterator[Any]:
    """The request arrived twice; the answer is the second one's."""
    async for _ in call.answer(call.request):
        pass
    async for response in call.answer(call.request):
        yield response


def reordered(rng: random.Random) -> Tamper:
    async def tamper(call: Call) -> AsyncIterator[Any]:
        responses = [response async for response in call.answer(call.request)]
        rng.shuffle(responses)
        for response in responses:
            yield response

    return tamper


async def killed(call: Call) -> AsyncIterator[Any]:
    """The server dies in the middle of its answer; another comes up in its place."""
    async for response in call.answer(call.request):
        call.server.restart_soon()
        # Does not live to see it done.
        await asyncio.Event().wait()
        yield response


# Of the rollout's answers


def swapped(rng: random.Random) -> Tamper:
    """Two answers of a batch, each under the other's place; one alone under a place that nobody asked for."""

    async def tamper(call: Call) -> AsyncIterator[Any]:
        responses = [response async for response in call.answer(call.request)]
        if len(responses) == 1:
            responses[0].request_index += 1
        else:
            first, second = rng.sample(responses, 2)
            first.request_index, second.request_index = second.request_index, first.request_index
        for response in responses:
            yield response

    return tamper


def flipped_ids(rng: random.Random) -> Tamper:
    async def tamper(call: Call) -> AsyncIterator[Any]:
        responses = [response async for response in call.answer(call.request)]
        ids = rng.choice(responses).completion.ids
        # The vocabulary has fewer than 2**9 ids: most stay within it.
        ids[rng.randrange(len(ids))] ^= 1 << rng.randrange(9)
        for response in responses:
            yield response

    return tamper


def flipped_logprobs(rng: random.Random) -> Tamper:
    async def tamper(call: Call) -> AsyncIterator[Any]:
        responses = [response async for response in call.answer(call.request)]
        completion = rng.choice(responses).completion
        _flip_floats(completion.logprobs, rng)
        for response in responses:
            yield response

    return tamper


def flipped_digest(rng: random.Random) -> Tamper:
    async def tamper(call: Call) -> AsyncIterator[Any]:
        responses = [response async for response in call.answer(call.request)]
        for named in rng.choice(responses).completion.identity.cartridges:
            named.digest = _other_hex(named.digest, rng)
        for response in responses:
            yield response

    return tamper


def flipped_prompt(rng: random.Random) -> Tamper:
    """The server is asked something else than what was sent."""

    async def tamper(call: Call) -> AsyncIterator[Any]:
        ids = rng.choice(call.request.requests).token_ids.ids
        ids[rng.randrange(len(ids))] ^= 1 << rng.randrange(8)
        async for response in call.answer(call.request):
            yield response

    return tamper


def other_version(rng: random.Random) -> Tamper:
    """An honest answer behind other bytes than those asked for: it says which."""
    return _decoded_with_others(rng, honest=True)


def lying(rng: random.Random) -> Tamper:
    """An answer behind other bytes, under the digest that was asked for: only the proof can tell."""
    return _decoded_with_others(rng, honest=False)


def _decoded_with_others(rng: random.Random, *, honest: bool) -> Tamper:
    async def tamper(call: Call) -> AsyncIterator[Any]:
        assert isinstance(call.server, RolloutHost)
        claimed = {named.digest for request in call.request.requests for named in request.cartridges}
        residents = call.server.parts.residency.device.residents()
        others = [resident.named for resident in residents if resident.digest not in claimed]
        asked = rollout_pb2.GenerateBatchRequest()
        asked.CopyFrom(call.request)
        for request in asked.requests:
            del request.cartridges[:]
            if others:
                # Of old versions the newest, the least different; with none, the bare model.
                request.cartridges.append(others[-1])
        async for response in call.answer(asked):
            if not honest:
                identity = response.completion.identity
                del identity.cartridges[:]
                identity.cartridges.extend(call.request.requests[response.request_index].cartridges)
            yield response

    return tamper


# Of the teacher's answers


def flipped_hidden(rng: random.Random) -> Tamper:
    async def tamper(call: Call) -> AsyncIterator[Any]:
        responses = [response async for response in call.answer(call.request)]
        hidden = rng.choice(responses).hidden
        data = bytearray(hidden.data)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        hidden.data = bytes(data)
        for response in responses:
            yield response

    return tamper


def flipped_shape(rng: random.Random) -> Tamper:
    async def tamper(call: Call) -> AsyncIterator[Any]:
        responses = [response async for response in call.answer(call.request)]
        shape = rng.choice(responses).hidden.shape
        if rng.random() < 0.5:
            shape[rng.randrange(len(shape))] ^= 1 << rng.randrange(8)
        else:
            del shape[:]
        for response in responses:
            yield response

    return tamper


def flipped_checksum(rng: random.Random) -> Tamper:
    async def tamper(call: Call) -> AsyncIterator[Any]:
        responses = [response async for response in call.answer(call.request)]
        response = rng.choice(responses)
        response.ids_checksum = _other_hex(response.ids_checksum, rng)
        for response in responses:
            yield response

    return tamper


def flipped_scored_ids(rng: random.Random) -> Tamper:
    """The teacher scores something else than what was sent."""

    async def tamper(call: Call) -> AsyncIterator[Any]:
        ids = rng.choice(call.request.items).token_ids.ids
        ids[rng.randrange(len(ids))] ^= 1 << rng.randrange(8)
        async for response in call.answer(call.request):
            yield response

    return tamper


def other_samples(rng: random.Random) -> Tamper:
    """Scores of one item under another's place; of one alone under a place that nobody asked for."""

    async def tamper(call: Call) -> AsyncIterator[Any]:
        responses = [response async for response in call.answer(call.request)]
        if len(responses) == 1:
            responses[0].item += 1
        else:
            first, second = rng.sample(responses, 2)
            first.item, second.item = second.item, first.item
        for response in responses:
            yield response

    return tamper


def shifted(rng: random.Random) -> Tamper:
    """Scores of other positions of the same item."""

    async def tamper(call: Call) -> AsyncIterator[Any]:
        item = rng.choice(call.request.items)
        item.score_from += 1 if item.score_from + 1 < len(item.token_ids.ids) else -1
        async for response in call.answer(call.request):
            yield response

    return tamper


def other_context(rng: random.Random) -> Tamper:
    """An answer that belongs to another document's request."""

    async def tamper(call: Call) -> AsyncIterator[Any]:
        async for response in call.answer(call.request):
            response.context_digest = _other_hex(response.context_digest, rng)
            yield response

    return tamper


def _flip_floats(values: Any, rng: random.Random) -> None:
    place = rng.randrange(len(values))
    (bits,) = struct.unpack("<I", struct.pack("<f", values[place]))
    (values[place],) = struct.unpack("<f", struct.pack("<I", bits ^ (1 << rng.randrange(32))))


def _other_hex(digest: str, rng: random.Random) -> str:
    place = rng.randrange(len("blake3:"), len(digest))
    other = format(int(digest[place], 16) ^ (1 << rng.randrange(4)), "x")
    return digest[:place] + other + digest[place + 1 :]
