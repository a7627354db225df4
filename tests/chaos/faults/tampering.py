"""What is done to the messages of a call between a real servicer and the wire."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

from foundry.v1 import rollout_pb2
from tests.chaos.faults.servers import Call, RolloutHost, Tamper

_DELAY_SECONDS = 0.02


def changed(change: Callable[[list[Any], random.Random], None]) -> Callable[[random.Random], Tamper]:
    """Change all responses, in place, before the first is sent."""

    def seeded(rng: random.Random) -> Tamper:
        async def tamper(call: Call) -> AsyncIterator[Any]:
            responses = [response async for response in call.answer(call.request)]
            change(responses, rng)
            for response in responses:
                yield response

        return tamper

    return seeded


def asked_otherwise(change: Callable[[Any, random.Random], None]) -> Callable[[random.Random], Tamper]:
    """Change the request, in place, before the server sees it."""

    def seeded(rng: random.Random) -> Tamper:
        async def tamper(call: Call) -> AsyncIterator[Any]:
            change(call.request, rng)
            async for response in call.answer(call.request):
                yield response

        return tamper

    return seeded


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


@changed
def reordered(responses: list[Any], rng: random.Random) -> None:
    rng.shuffle(responses)


async def killed(call: Call) -> AsyncIterator[Any]:
    """The server dies in the middle of its answer; another comes up in its place."""
    async for response in call.answer(call.request):
        call.server.restart_soon()
        # Does not live to see it done.
        await asyncio.Event().wait()
        yield response


# Of the rollout's answers


@changed
def swapped(responses: list[Any], rng: random.Random) -> None:
    """Two answers of a batch, each under the other's place; one alone under a place that nobody asked for."""
    _exchange("request_index", responses, rng)


@changed
def flipped_ids(responses: list[Any], rng: random.Random) -> None:
    ids = rng.choice(responses).completion.ids
    # The vocabulary has fewer than 2**9 ids: most stay within it.
    ids[rng.randrange(len(ids))] ^= 1 << rng.randrange(9)


@changed
def flipped_logprobs(responses: list[Any], rng: random.Random) -> None:
    completion = rng.choice(responses).completion
    _flip_floats(completion.logprobs, rng)


@changed
def flipped_digest(responses: list[Any], rng: random.Random) -> None:
    for named in rng.choice(responses).completion.identity.cartridges:
        named.digest = _other_hex(named.digest, rng)


@asked_otherwise
def flipped_prompt(request: Any, rng: random.Random) -> None:
    """The server is asked something else than what was sent."""
    ids = rng.choice(request.requests).token_ids.ids
    ids[rng.randrange(len(ids))] ^= 1 << rng.randrange(8)


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


@changed
def flipped_hidden(responses: list[Any], rng: random.Random) -> None:
    hidden = rng.choice(responses).hidden
    data = bytearray(hidden.data)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    hidden.data = bytes(data)


@changed
def flipped_shape(responses: list[Any], rng: random.Random) -> None:
    shape = rng.choice(responses).hidden.shape
    if rng.random() < 0.5:
        shape[rng.randrange(len(shape))] ^= 1 << rng.randrange(8)
    else:
        del shape[:]


@changed
def flipped_checksum(responses: list[Any], rng: random.Random) -> None:
    response = rng.choice(responses)
    response.ids_checksum = _other_hex(response.ids_checksum, rng)


@asked_otherwise
def flipped_scored_ids(request: Any, rng: random.Random) -> None:
    """The teacher scores something else than what was sent."""
    ids = rng.choice(request.items).token_ids.ids
    ids[rng.randrange(len(ids))] ^= 1 << rng.randrange(8)


@changed
def other_samples(responses: list[Any], rng: random.Random) -> None:
    """Scores of one item under another's place; of one alone under a place that nobody asked for."""
    _exchange("item", responses, rng)


@asked_otherwise
def shifted(request: Any, rng: random.Random) -> None:
    """Scores of other positions of the same item."""
    item = rng.choice(request.items)
    item.score_from += 1 if item.score_from + 1 < len(item.token_ids.ids) else -1


def other_context(rng: random.Random) -> Tamper:
    """An answer that belongs to another document's request."""

    async def tamper(call: Call) -> AsyncIterator[Any]:
        async for response in call.answer(call.request):
            response.context_digest = _other_hex(response.context_digest, rng)
            yield response

    return tamper


def _exchange(place: str, responses: list[Any], rng: random.Random) -> None:
    if len(responses) == 1:
        setattr(responses[0], place, getattr(responses[0], place) + 1)
    else:
        first, second = rng.sample(responses, 2)
        there, here = getattr(first, place), getattr(second, place)
        setattr(first, place, here)
        setattr(second, place, there)


def _flip_floats(values: Any, rng: random.Random) -> None:
    place = rng.randrange(len(values))
    (bits,) = struct.unpack("<I", struct.pack("<f", values[place]))
    (values[place],) = struct.unpack("<f", struct.pack("<I", bits ^ (1 << rng.randrange(32))))


def _other_hex(digest: str, rng: random.Random) -> str:
    place = rng.randrange(len("blake3:"), len(digest))
    other = format(int(digest[place], 16) ^ (1 << rng.randrange(4)), "x")
    return digest[:place] + other + digest[place + 1 :]
