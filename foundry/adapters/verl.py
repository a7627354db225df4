"""Our rollout servers as a replica of veRL (https://github.com/volcengine/verl): `rollout.name: foundry`.

Imported by `VERL_USE_EXTERNAL_MODULES=foundry.adapters.verl`, it registers itself. docs/verl.md has the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from foundry import extras
from foundry.adapters.verl_server import VerlServer
from foundry.errors import ExtraMissing, InvalidArgument

if absent := extras.missing(extras.VERL):
    raise ExtraMissing(f"{', '.join(absent)} not installed: foundry.adapters.verl is a part of veRL, pip install verl")

import ray
from verl.workers.rollout.replica import RolloutMode, RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "foundry"


class VerlActor(VerlServer):
    """In a process of Ray's; answers as veRL's own servers do."""

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `VerlServer.generate`, as a TokenOutput."""
        answer = await super().generate(*args, **kwargs)
        return TokenOutput(
            token_ids=answer.token_ids,
            log_probs=answer.log_probs,
            stop_reason=answer.stop_reason,
            extra_fields=answer.extra_fields,
        )


class FoundryReplica(RolloutReplica):  # type: ignore[misc]
    """The rollout server of this rank. It runs elsewhere, on GPUs of its own: none of veRL's are taken for it."""

    async def init_standalone(self) -> None:
        """Without a pool of GPUs."""
        self.rollout_mode = RolloutMode.STANDALONE
        await self.launch_servers()

    async def init_colocated(self, resource_pool: Any) -> None:
        """Beside what runs in the pool, and not in it."""
        self.rollout_mode, self.resource_pool = RolloutMode.COLOCATED, resource_pool
        await self.launch_servers()

    async def launch_servers(self) -> None:
        """Start the actor that asks the server. Raises InvalidArgument if this rank has none in the configuration."""
        settings = _settings(self.config.custom)
        addresses = list(settings.pop("addresses", []))
        if self.replica_rank >= len(addresses):
            raise InvalidArgument(
                f"replica {self.replica_rank} has no rollout server: rollout.custom.foundry.addresses names "
                f"{len(addresses)}, one is needed for each replica",
                field="rollout.custom.foundry.addresses",
            )
        address = addresses[self.replica_rank]
        actor = ray.remote(VerlActor).options(num_cpus=0, max_concurrency=self.max_concurrency)
        self._server_handle = actor.remote(
            address,
            settings.pop("cartridge", None),
            max_context_tokens=self.config.max_model_len or self.config.prompt_length + self.config.response_length,
            response_tokens=self.config.response_length,
            **settings,
        )
        self._server_address = address
        self.servers = [self._server_handle]

    async def set_policy(self, cartridge: Mapping[str, Any], global_steps: int | None = None) -> None:
        """What is asked from now on is answered by this version."""
        await self._server_handle.set_policy.remote(dict(cartridge), global_steps)


def register() -> None:
    """Under `NAME` in veRL's registry; importing this module does it."""
    RolloutReplicaRegistry.register(NAME, lambda: FoundryReplica)


def _settings(custom: Mapping[str, Any] | None) -> dict[str, Any]:
    settings = dict((custom or {}).get("foundry") or {})
    known = {"addresses", "cartridge", "model_fingerprint", "retry_seconds", "timeout_seconds"}
    if unknown := sorted(set(settings) - known):
        raise InvalidArgument(
            f"rollout.custom.foundry has no {', '.join(unknown)}; it has {', '.join(sorted(known))}",
            field="rollout.custom.foundry",
        )
    return settings


register()
