"""Rates of callers, counted in a real Valkey by as many gateways as there are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress

import pytest
from structlog.testing import capture_logs

from foundry.errors import ResourceExhausted
from foundry.store import CartridgeStore
from foundry.store.api_keys import KeyLimits
from services.gateway.access.counters import Counters
from services.gateway.access.principal import Principal
from services.gateway.access.quotas import Quotas
from services.gateway.access.rates import Rates
from services.gateway.access.stored import StoredBytes
from tests.store_data import cartridge, draft
from tests.valkey import Valkey

# The shortest that the library counts in.
SECONDS = 1
Open = Callable[..., Rates]


@pytest.fixture
async def gateway(store: CartridgeStore) -> AsyncIterator[Open]:
    """Makes the rates of one gateway more."""
    opened = []

    def open_one(seconds: int = 60, **defaults: int) -> Rates:
        opened.append(Rates(Counters(store.redis, seconds=seconds), KeyLimits(**defaults)))
        return opened[-1]

    yield open_one
    for each in opened:
        await each.close()


def caller(client: str = "key-a", /, **limits: int) -> Principal:
    return Principal(client=client, tenant="acme", limits=KeyLimits(**limits))


async def ask(rates: Rates, principal: Principal, *, completion: bool = True) -> dict[str, str]:
    headers: dict[str, str] = {}
    async with rates.admitted(principal, headers, completion=completion):
        return headers


async def refusal(rates: Rates, principal: Principal) -> ResourceExhausted:
    with pytest.raises(ResourceExhausted) as refused:
        await ask(rates, principal)
    return refused.value


async def test_gateways_of_one_redis_share_a_window(gateway: Open) -> None:
    gateways = [gateway(), gateway()]
    principal = caller(requests_per_minute=6)
    for number in range(6):
        headers = await ask(gateways[number % 2], principal)
        assert headers["x-ratelimit-limit-requests"] == "6"
        assert headers["x-ratelimit-remaining-requests"] == str(5 - number)
    for rates in gateways:
        assert "limit is 6 requests in 1m0s" in (await refusal(rates, principal)).message
    # Another key's is its own, also where its limit is the default.
    assert await ask(gateway(requests_per_minute=1), caller("key-b"))


async def test_of_many_at_once_as_many_are_taken_as_the_limit_says(gateway: Open) -> None:
    gateways = [gateway(), gateway()]
    asked = [ask(gateways[number % 2], caller(requests_per_minute=5)) for number in range(40)]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(answer, dict) for answer in answers) == 5


@pytest.mark.parametrize("kind", ["requests", "tokens"])
async def test_a_request_is_taken_after_the_time_that_was_said_and_not_before(gateway: Open, kind: str) -> None:
    rates, principal = gateway(SECONDS), caller(**{f"{kind}_per_minute": 10})
    if kind == "tokens":
        # Of one answer, which no limit cut short.
        await rates.spent(principal, 15)
    with suppress(ResourceExhausted):
        while True:
            await ask(rates, principal)
    refused = await refusal(rates, principal)
    assert refused.retry_after_seconds is not None
    assert 0 < refused.retry_after_seconds < 2 * SECONDS
    await asyncio.sleep(max(0.0, refused.retry_after_seconds - 0.1))
    again = await refusal(rates, principal)
    assert again.retry_after_seconds is not None
    await asyncio.sleep(again.retry_after_seconds)
    assert await ask(rates, principal)


async def test_used_up_tokens_refuse_completions_alone_and_cost_no_request(gateway: Open) -> None:
    rates, principal = gateway(), caller(tokens_per_minute=100, requests_per_minute=5)
    await rates.spent(principal, 99)
    headers = await ask(rates, principal)
    assert (headers["x-ratelimit-remaining-tokens"], headers["x-ratelimit-remaining-requests"]) == ("1", "4")
    await rates.spent(principal, 1)
    await refusal(rates, principal)
    headers = await ask(rates, principal, completion=False)
    assert headers["x-ratelimit-remaining-requests"] == "3"


async def test_tokens_count_though_whoever_says_so_is_cancelled(gateway: Open) -> None:
    rates, principal = gateway(), caller(tokens_per_minute=100)
    counting = asyncio.create_task(rates.spent(principal, 100))
    # Into the shield.
    await asyncio.sleep(0)
    counting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await counting
    await asyncio.gather(*rates._counting)
    await refusal(rates, principal)


async def test_a_key_has_so_many_completions_at_one_time(gateway: Open) -> None:
    rates, principal = gateway(), caller(concurrent_requests=2, requests_per_minute=3)
    async with AsyncExitStack() as answering:
        for _ in range(2):
            await answering.enter_async_context(rates.admitted(principal, {}, completion=True))
        assert "2 completions at one time" in (await refusal(rates, principal)).message
        assert await ask(rates, caller("key-b", concurrent_requests=1)) == {}
        assert (await ask(rates, principal, completion=False))["x-ratelimit-remaining-requests"] == "0"
    # Those that were refused, as the one that is refused here for its number, hold no place.
    assert "3 requests" in (await refusal(rates, principal)).message
    assert not rates._num_in_flight


async def test_what_a_tenant_has_is_its_documents_and_what_is_durable_of_its_cartridges(store: CartridgeStore) -> None:
    for name, contents in {"acme/a": (0, 1, 2), "acme/b": (1,), "handbook": (1,)}.items():
        await store.acquire(name, "run-a", 1)
        for step, content in enumerate(contents):
            await store.publish(cartridge(content), draft(name, step=step), durable=content != 2)
    digest = await store.documents.put("The treaty.")
    hexdigits = digest.removeprefix("blake3:")
    await store.objects.put(f"documents/acme/{hexdigits}.txt", [b"The treaty. "])
    stored = StoredBytes()
    usage = await stored.look(store)
    blob = usage.durable_bytes // 2
    assert usage.tenant_bytes == {"acme": 2 * blob + 12, "": blob + 11}
    assert (stored.of("acme"), stored.of(""), stored.of("nobody")) == (2 * blob + 12, blob + 11, 0)
    assert stored.of(None) == 3 * blob + 23
    quotas = Quotas(store.runs, stored, KeyLimits(stored_bytes=stored.of("acme") + 8))
    with quotas.storing(caller(), 8):
        # Counted from the beginning.
        for_others = Principal(client="key-c", tenant="")
        quotas.check_stored(for_others)
        with pytest.raises(ResourceExhausted, match="and 1 more would be beyond"):
            quotas.check_stored(caller())
    await store.documents.delete(digest)
    with suppress(ResourceExhausted), quotas.storing(for_others, 5):
        raise ResourceExhausted("the storage")
    await stored.look(store)
    # What was put and is not there is not counted any more, and what failed never was.
    assert (stored.of("acme"), stored.of("")) == (2 * blob + 12, blob)


async def test_without_limits_nothing_is_asked_of_redis(gateway: Open, valkey: Valkey) -> None:
    valkey.kill()
    with capture_logs() as logs:
        assert await ask(gateway(), caller()) == {}
        await gateway().spent(caller(), 10)
    assert logs == []


async def test_while_redis_is_away_each_gateway_counts_for_itself(gateway: Open, valkey: Valkey) -> None:
    gateways = [gateway(), gateway()]
    principal = caller(requests_per_minute=2)
    await ask(gateways[0], principal)
    valkey.kill()
    for rates in gateways:
        with capture_logs() as logs:
            for number in range(2):
                assert (await ask(rates, principal))["x-ratelimit-remaining-requests"] == str(1 - number)
            await refusal(rates, principal)
        # Redis is not asked each time.
        assert [log["event"] for log in logs] == ["limits are counted by this gateway alone"]
