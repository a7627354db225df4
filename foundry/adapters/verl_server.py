"""What veRL calls a server: token ids in, token ids out, decoded by one of our rollout servers behind one version.

Nothing of veRL or Ray is needed here; `foundry.adapters.verl` puts it where veRL looks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from blake3 import blake3

from foundry.errors import FingerprintMismatch, InvalidArgument
from foundry.identity import check_digest
from foundry.rpc.answers import Answer, Prompt
from foundry.rpc.channel import decoded
from foundry.rpc.pods import Pods
from foundry.rpc.retry import Retry
from foundry.rpc.rollout import RolloutClient
from foundry.store.names import CartridgeId
from foundry.v1 import rollout_pb2, rollout_pb2_grpc

_RESIDENT_TIMEOUT_SECONDS = 10.0
# Sampling that changes nothing, as veRL spells it. What a batch is sampled from is the policy as it is.
_NEUTRAL: Mapping[str, Sequence[Any]] = {"top_p": (1, None), "top_k": (-1, 0, None), "repetition_penalty": (1, None)}
_KNOWN = frozenset({*_NEUTRAL, "temperature", "logprobs", "max_tokens", "max_new_tokens", "seed"})


@dataclass(frozen=True, slots=True)
class Generated:
    """The fields of veRL's TokenOutput: ids [n] and, where asked for, logprobs [n] (natural, untempered)."""

    token_ids: list[int]
    log_probs: list[float] | None
    # "completed" or "aborted".
    stop_reason: str
    extra_fields: dict[str, Any]


@dataclass(slots=True)
class _Connection:
    """With what the server said of itself."""

    client: RolloutClient
    model_fingerprint: str
    # As many calls at a time as the server takes.
    places: asyncio.Semaphore


class VerlServer:
    """One rollout server. Every call has a deadline; every answer was proved to be of the version asked for."""

    def __init__(
        self,
        address: str,
        cartridge: Mapping[str, Any] | None = None,
        *,
        max_context_tokens: int,
        response_tokens: int,
        model_fingerprint: str = "",
        timeout_seconds: float = 600.0,
        retry_seconds: float = 60.0,
    ) -> None:
        """`cartridge` is {"name", "version", "digest"}; without one the plain model answers. `max_context_tokens` is of
        prompt and answer, `response_tokens` the most of an answer where a call does not say. What passes is asked again
        for `retry_seconds`. Raises InvalidArgument."""
        self._address, self._timeout_seconds = address, timeout_seconds
        self._max_context_tokens, self._response_tokens = max_context_tokens, response_tokens
        self._model_fingerprint = model_fingerprint
        self._retry_seconds = retry_seconds
        self._policy = _policy(cartridge)
        self._global_steps: int | None = None
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()
        self._calls: set[asyncio.Task[Any]] = set()

    async def set_policy(self, cartridge: Mapping[str, Any], global_steps: int | None = None) -> None:
        """Calls that come from now on are answered by this version. Raises InvalidArgument."""
        self._policy, self._global_steps = _policy(cartridge), global_steps

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling_params: Mapping[str, Any],
        request_id: str,
        image_data: Sequence[Any] | None = None,
        video_data: Sequence[Any] | None = None,
        **other: Any,
    ) -> Generated:
        """Raises InvalidArgument for what is not text or would sample from another distribution than the policy's,
        FingerprintMismatch, and what `RolloutClient.sample` raises."""
        for name, value in {"image_data": image_data, "video_data": video_data, **other}.items():
            if value:
                raise InvalidArgument(f"{name} can't be used: the foundry decodes text", field=name)
        ids = [int(each) for each in prompt_ids]
        max_new_tokens = self._max_new_tokens(sampling_params, len(ids))
        temperature = _temperature(sampling_params)
        seed = sampling_params.get("seed")
        prompt = Prompt(ids, _seed(request_id) if seed is None else int(seed), request_id)
        # What is sampled is of the version at the call's beginning, whichever comes meanwhile.
        policy, global_steps = self._policy, self._global_steps
        # Seeded, so that what is asked again is the same answer.
        retry = Retry(self._retry_seconds)
        asking = retry.call("sample", partial(self._sample, prompt, policy, temperature, max_new_tokens))
        call = asyncio.create_task(asking)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        extra = {"global_steps": global_steps, **_echo(policy)}
        try:
            answer, fingerprint = await call
        except asyncio.CancelledError:
            # Whoever gave up this call is not the one who aborts all.
            if (mine := asyncio.current_task()) is None or mine.cancelling():
                raise
            return Generated([], None, "aborted", {**extra, "model_fingerprint": self._model_fingerprint})
        log_probs = list(answer.logprobs) if sampling_params.get("logprobs") not in (None, False) else None
        return Generated(list(answer.ids), log_probs, "completed", {**extra, "model_fingerprint": fingerprint})

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        """Calls in flight end as aborted, without the tokens that they had."""
        for call in list(self._calls):
            call.cancel()

    async def nothing(self) -> None:
        """What veRL tells its own servers of memory and profiles is the rollout server's own business here."""

    wake_up = sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = resume_generation = stop_profile = nothing

    async def start_profile(self, **_: Any) -> None:
        """As `nothing`."""

    async def close(self) -> None:
        await self.abort_all_requests()
        if self._connection is not None:
            await self._connection.client.close()

    async def _sample(
        self, prompt: Prompt, policy: CartridgeId | None, temperature: float, max_new_tokens: int
    ) -> tuple[Answer, str]:
        connection = await self._connected()
        async with connection.places:
            if policy is None:
                asked = connection.client.ask_base([prompt], temperature=temperature, max_new_tokens=max_new_tokens)
            else:
                asked = connection.client.sample(
                    [prompt], policy, temperature=temperature, max_new_tokens=max_new_tokens
                )
            (answer,) = await asked
        return answer, connection.model_fingerprint

    async def _connected(self) -> _Connection:
        async with self._connecting:
            if self._connection is None:
                self._connection = await self._connect()
            return self._connection

    async def _connect(self) -> _Connection:
        pods = Pods("rollout", [self._address])
        try:
            (pod, *_) = await pods.reachable()
            with pod.calling() as channel:
                stub: rollout_pb2_grpc.RolloutAsyncStub = rollout_pb2_grpc.RolloutStub(channel)
                request = rollout_pb2.ResidentRequest()
                resident = decoded(await stub.Resident(request, timeout=_RESIDENT_TIMEOUT_SECONDS), pod.name)
            found = resident.model_fingerprint
            if self._model_fingerprint and self._model_fingerprint != found:
                raise FingerprintMismatch(
                    f"{pod.name} serves model {found}, {self._model_fingerprint} was configured",
                    field="model_fingerprint",
                )
        except BaseException:
            await pods.close()
            raise
        client = RolloutClient(pods, found, resident.template_digest, self._timeout_seconds)
        return _Connection(client, found, asyncio.Semaphore(max(1, resident.max_sequences)))

    def _max_new_tokens(self, sampling: Mapping[str, Any], num_prompt: int) -> int:
        room = self._max_context_tokens - num_prompt
        if room < 1:
            raise InvalidArgument(
                f"a prompt of {num_prompt} tokens leaves no room in a context of {self._max_context_tokens}",
                field="prompt_ids",
            )
        asked = sampling.get("max_tokens") or sampling.get("max_new_tokens") or self._response_tokens
        return max(1, min(int(asked), room))


def _temperature(sampling: Mapping[str, Any]) -> float:
    for name, value in sampling.items():
        if name not in _KNOWN or value not in _NEUTRAL.get(name, (value,)):
            raise InvalidArgument(
                f"{name} is {value!r}: answers are sampled from the policy as it is, which {name} would change or is "
                "not known to leave alone",
                field=f"sampling_params.{name}",
            )
    return float(sampling.get("temperature", 1.0))


def _policy(cartridge: Mapping[str, Any] | None) -> CartridgeId | None:
    if cartridge is None:
        return None
    try:
        name, version, digest = str(cartridge["name"]), int(cartridge["version"]), str(cartridge["digest"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument("a cartridge has name, version and digest", field="cartridge") from error
    return CartridgeId(name, version, check_digest(digest, field="cartridge.digest"))


def _echo(policy: CartridgeId | None) -> dict[str, Any]:
    """The same keys with and without a cartridge: veRL makes columns of them."""
    return {
        "cartridge_name": policy.name if policy else "",
        "cartridge_version": policy.version if policy else 0,
        "cartridge_digest": policy.digest if policy else "",
    }


def _seed(request_id: str) -> int:
    """The same for the same request: what is asked again is answered alike."""
    return int.from_bytes(blake3(request_id.encode()).digest()[:8], "little")
