"""The ranks beside rank 0: each computes its share of a step's gradient, and keeps nothing for the next."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from foundry.errors import FoundryError
from foundry.identity import CartridgeHeader
from foundry.model.cartridge import TrainableCartridge
from foundry.model.lm import FrozenLM
from services.trainer.ranks.group import Group, RankMessage
from services.trainer.ranks.share import Share
from services.trainer.update.gradient import Batch, backward


def follow(lm: FrozenLM, group: Group) -> int:
    """Do as rank 0 says until it ends the group; returns the exit status that it wants. Raises RankLost."""
    group.use_device()
    gradient = None
    while (message := group.receive(0)).kind != "end":
        if message.kind == "share":
            gradient = _compute(lm, group, Share.from_message(message))
        elif message.kind == "sum" and gradient is not None:
            group.sum(gradient)
    group.close()
    return int(message.values["status"])


def _compute(lm: FrozenLM, group: Group, share: Share) -> Tensor | None:
    """The gradient of the share; rank 0 has its scores then. None if it failed, which rank 0 knows then."""
    header = share.prefix
    prefix_L2GPD = _receive_prefix(group, header)
    claimed_L2GPD = _receive_prefix(group, header) if share.claims_older else None
    try:
        lm.spec.check(header)
        # The published cast, as a master: cast again, it is the same numbers.
        cartridge = TrainableCartridge(lm, prefix_L2GPD, num_frozen=header.num_frozen, dtype=prefix_L2GPD.dtype)
        scores = _backward(lm, cartridge, replace(share.batch, claimed_L2GPD=claimed_L2GPD))
    except Exception as error:
        reason = error.reason if isinstance(error, FoundryError) else FoundryError.reason
        message = error.message if isinstance(error, FoundryError) else repr(error)
        group.send(0, RankMessage("failed", {"reason": reason, "message": message}))
        return None
    group.send(0, RankMessage("scores", tensors={"scores": scores}))
    master = cartridge.master_L2GRD
    return master.grad if master.grad is not None else torch.zeros_like(master)


def _receive_prefix(group: Group, header: CartridgeHeader) -> Tensor:
    prefix_L2GPD = torch.empty(header.shape, dtype=getattr(torch, header.dtype), device=group.device)
    group.broadcast(prefix_L2GPD)
    return prefix_L2GPD


def _backward(lm: FrozenLM, cartridge: TrainableCartridge, batch: Batch) -> Tensor:
    """[4, N], as the fields of TokenScores stand."""
    return backward(lm, cartridge, batch).stacked() if batch.samples else torch.empty(4, 0)
