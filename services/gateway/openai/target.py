"""What a request asks to be answered with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from foundry.errors import IdentityMismatch, InvalidArgument, ModelNotFound
from foundry.store import CartridgeId
from foundry.v1 import common_pb2
from services.gateway import metrics
from services.gateway.access.names import full_reference
from services.gateway.access.principal import Principal
from services.gateway.balancer import ServedModel
from services.gateway.errors import naming
from services.gateway.openai.requests.parameters import Rope
from services.gateway.state import Gateway

ROPES: dict[Rope, common_pb2.Rope.ValueType] = {"keep": common_pb2.ROPE_KEEP, "shift": common_pb2.ROPE_SHIFT}
# A server that knows no rope keeps keys where they are, and says nothing of it.
_ANSWERED = {common_pb2.ROPE_UNSPECIFIED: "keep"} | {value: name for name, value in ROPES.items()}


class Naming(Protocol):
    """A request that names what it asks."""

    @property
    def model(self) -> str: ...

    @property
    def cartridges(self) -> Sequence[str] | None: ...

    @property
    def rope(self) -> Rope | None: ...


@dataclass(frozen=True, slots=True)
class Target:
    """What `model` and `cartridges` of a request stand for, fixed once, and where the cartridges' keys stand."""

    model: ServedModel
    cartridges: tuple[CartridgeId, ...]
    rope: Rope = "keep"

    @classmethod
    async def resolve(cls, gateway: Gateway, principal: Principal, asked: Naming) -> Target:
        """Raises ModelNotFound, CartridgeNotFound, Conflict, InvalidArgument, Unavailable."""
        model = gateway.rollouts.model()
        if asked.cartridges is not None:
            if asked.model != model.name:
                raise InvalidArgument(f"with `cartridges`, model must be the base model {model.name!r}", field="model")
            cartridges = [
                await _resolve(gateway, principal, reference, f"cartridges.{index}")
                for index, reference in enumerate(asked.cartridges)
            ]
        else:
            cartridges = [] if asked.model == model.name else [await _resolve(gateway, principal, asked.model, "model")]
            if not cartridges:
                gateway.base_name.check_unambiguous(model.name, principal)
        return cls(model, tuple(cartridges), asked.rope or "keep")

    def check(self, identity: common_pb2.Identity) -> None:
        """Raises IdentityMismatch unless an answer was made with exactly this."""
        rope = _ANSWERED.get(identity.rope, str(identity.rope))
        wanted = (self.model.fingerprint, [cartridge.digest for cartridge in self.cartridges], str(self.rope))
        found = (identity.model_fingerprint, [cartridge.digest for cartridge in identity.cartridges], rope)
        if wanted != found:
            metrics.IDENTITY_MISMATCHES.inc()
            raise IdentityMismatch(
                f"the rollout server answered with (model, cartridges, rope) {found}, asked were {wanted}"
            )


async def _resolve(gateway: Gateway, principal: Principal, reference: str, param: str) -> CartridgeId:
    try:
        with naming(param):
            return await gateway.store.resolve(full_reference(principal, reference, field=param, to_query=True))
    except InvalidArgument as error:
        if param == "model":
            raise ModelNotFound(f"there is no model {reference!r}: {error.message}", field=param) from error
        raise
