"""Whether the processes of the stack serve. Each function returns when its process does, and not before."""

from __future__ import annotations

import asyncio

import httpx
from redis.asyncio import Redis
from redis.exceptions import RedisError

from foundry.errors import FoundryError
from foundry.local.home import StackState
from foundry.rpc.channel import open_channel, wait_until_serving

# A service that is not ready after this long never will be: the caller gives up on it.
START_SECONDS = 300.0
_POLL_SECONDS = 0.05


async def serves_grpc(address: str, name: str) -> None:
    channel = open_channel(address)
    try:
        await wait_until_serving(channel, name, timeout_seconds=START_SECONDS)
    finally:
        await channel.close()


async def answers_ping(redis_url: str) -> None:
    async with Redis.from_url(redis_url) as client:
        while True:
            try:
                await client.ping()
            except (RedisError, OSError):
                # Not listening yet, or still reading its file.
                await asyncio.sleep(_POLL_SECONDS)
            else:
                return


async def answers_http(url: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            try:
                if (await client.get(url, timeout=5.0)).status_code == httpx.codes.OK:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(_POLL_SECONDS)


def warnings_of(gateway_url: str) -> list[str]:
    """What a gateway that is ready has to tell people."""
    try:
        answer = httpx.get(f"{gateway_url}/readyz", timeout=5.0, trust_env=False)
    except httpx.TransportError:
        return []
    warnings: list[str] = answer.json()["warnings"]
    return warnings


async def look(state: StackState, *, timeout_seconds: float = 2.0) -> dict[str, bool]:
    """For each service whether it serves now."""

    async def serves(name: str, address: str) -> bool:
        try:
            async with asyncio.timeout(timeout_seconds):
                if name == "valkey":
                    await answers_ping(state.redis_url)
                elif name == "gateway":
                    await answers_http(f"{state.gateway_url}/readyz")
                else:
                    await serves_grpc(address, name)
        except (TimeoutError, FoundryError):
            return False
        return True

    answers = await asyncio.gather(*(serves(name, service.address) for name, service in state.services.items()))
    return dict(zip(state.services, answers, strict=True))
