"""The base model's name, which must mean nothing else: whoever asks by it would get an answer without the cartridge."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import structlog

from foundry.errors import Conflict, FoundryError
from foundry.store import CartridgeStore
from services.gateway.access.names import full_reference
from services.gateway.access.principal import Principal
from services.gateway.balancer import RolloutBalancer

log = structlog.get_logger(__name__)


class BaseName:
    """Knows the cartridges' names as of its last look. New ones are refused before that (`check_free`); what it finds
    was there before the model was served, or came from elsewhere."""

    def __init__(self, store: CartridgeStore, rollouts: RolloutBalancer) -> None:
        self._store, self._rollouts = store, rollouts
        self._names: frozenset[str] = frozenset()
        self._said = ""

    async def watch(self, period_seconds: float) -> None:
        """Look every `period_seconds`, until cancelled."""
        while True:
            await asyncio.sleep(period_seconds)
            await self.look()

    async def look(self) -> None:
        """While the store is away the last known names stand."""
        try:
            self._names = frozenset(await self._store.names())
        except FoundryError as error:
            log.warning("names not looked at", error=error.message)
            return
        # No rollout server has answered yet: nobody can be answered wrongly.
        with suppress(FoundryError):
            warning = "; ".join(self.warnings())
            if warning and warning != self._said:
                log.error("a cartridge has the base model's name", error=warning)
            self._said = warning

    def warnings(self) -> list[str]:
        """What people should be told. Raises Unavailable, FingerprintMismatch."""
        model = self._rollouts.model().name
        return [_taken(model, name) for name in sorted(self._names) if _is_short_for(model, name)]

    def check_unambiguous(self, model: str, principal: Principal) -> None:
        """Raises Conflict if the principal means a cartridge by the base model's name too."""
        try:
            name = full_reference(principal, model, field="model", to_query=True).name
        except FoundryError:
            # No name of a cartridge, or of another tenant's.
            return
        if name in self._names:
            raise Conflict(_taken(model, name), field="model")


def check_free(model: str, name: str) -> None:
    """Raises Conflict unless a cartridge may be called `name`, its whole name, where `model` is served."""
    if _is_short_for(model, name):
        raise Conflict(
            f"{model} is the base model's name: asked by it, nobody would get the cartridge {name}; choose another",
            field="name",
        )


def _is_short_for(model: str, name: str) -> bool:
    """Whether somebody may write the cartridge's name as `model`: its tenant leaves out what is before the slash."""
    return model in (name, name.partition("/")[2])


def _taken(model: str, name: str) -> str:
    return (
        f"{model} is the name of the base model and of the cartridge {name}: ask for the cartridge as {model}@latest, "
        "and serve the model under another name (the rollout servers' model_name) or delete the cartridge"
    )
