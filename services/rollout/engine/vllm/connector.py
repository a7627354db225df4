"""Puts cartridges into vLLM's KV memory. vLLM makes it twice, for its scheduler and for its worker.

A prompt begins with one placeholder id for each token of its cartridges. To vLLM their KV is somewhere else: it asks
here how many tokens of it there are, allots blocks, and has them filled before the forward. Its prefix cache knows the
blocks by the digests (the request's cache salt), so a second sequence behind the same cartridges finds them there.

A placeholder that was computed instead would be an answer behind garbage, without an error. Hence every batch is
checked before it runs: no scheduled sequence may have fewer computed tokens than its cartridges have.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.model_executor.models.utils import extract_layer_index

from services.rollout.engine.vllm.prefix import Prefix, Prefixes

# Of the connector's configuration, and of a request's transfer parameters.
PREFIXES, SEQUENCE = "prefixes", "sequence"
# Of the device's memory, outside of what vLLM manages; a whole cartridge of 2048 tokens of a 3B model.
_STAGING_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True)
class Load:
    """The tokens of a prefix from `begin` on, and the slot of the KV memory [n] that each goes to."""

    prefix: Prefix
    begin: int
    slots_n: Tensor


@dataclass
class Loads(KVConnectorMetadata):  # type: ignore[misc]
    """What is to be written before one forward."""

    loads: list[Load] = field(default_factory=list)


class CartridgeConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """See `KVConnectorBase_V1`: the upper half is the scheduler's, the lower half the worker's."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._prefixes = Prefixes.find(self._kv_transfer_config.get_from_extra_config(PREFIXES, None))
        self._block_size: int = vllm_config.cache_config.block_size
        # By vLLM's own ids of the sequences that have a place.
        self._placed: dict[str, Prefix] = {}
        self._loads = Loads()

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._prefixes.block_pool = gpu_block_pool

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return max(0, self._prefix(request).num_tokens - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        prefix = self._prefix(request)
        self._placed[request.request_id] = prefix
        # Again after a preemption: its blocks are others then.
        prefix.in_place = num_external_tokens == 0
        prefix.scheduled_at = prefix.scheduled_at or time.perf_counter()
        if num_external_tokens:
            begin = prefix.num_tokens - num_external_tokens
            positions_n = torch.arange(begin, prefix.num_tokens)
            (block_ids,) = blocks.get_block_ids()
            blocks_n = torch.tensor(block_ids)[positions_n // self._block_size]
            self._loads.loads.append(Load(prefix, begin, blocks_n * self._block_size + positions_n % self._block_size))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        for request_id, num_computed in _scheduled(scheduler_output):
            if num_computed < self._placed[request_id].num_tokens:
                raise RuntimeError(
                    f"vLLM has {num_computed} of the {self._placed[request_id].num_tokens} cartridge tokens of "
                    f"{request_id} and would compute the others from their placeholders"
                )
        loads, self._loads = self._loads, Loads()
        return loads

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        self._placed.pop(request.request_id, None)
        return False, None

    def _prefix(self, request: Any) -> Prefix:
        return self._prefixes[request.kv_transfer_params[SEQUENCE]]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        loads: list[Load] = self._get_connector_metadata().loads
        if not loads:
            return
        layers = list(_attention_layers(forward_context))
        device = layers[0][1].kv_cache.device
        for pieces in _staged(loads):
            kv_nL2GD = torch.cat([kv.to(device, non_blocking=True) for kv, _ in pieces])
            slots_n = torch.cat([slots for _, slots in pieces]).to(device, non_blocking=True)
            for index, layer in layers:
                key_nGD, value_nGD = kv_nL2GD[:, index].unbind(1)
                layer.impl.do_kv_cache_update(layer, key_nGD, value_nGD, layer.kv_cache, slots_n)
        for load in loads:
            load.prefix.in_place = True

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: writes and forward follow each other on one stream."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is taken out of vLLM's memory."""

    def wait_for_save(self) -> None:
        """See `save_kv_layer`."""


def _scheduled(scheduler_output: Any) -> Iterator[tuple[str, int]]:
    """The sequences of a batch and how many tokens of each were computed, cached or loaded before it."""
    for request in scheduler_output.scheduled_new_reqs:
        yield request.req_id, request.num_computed_tokens
    cached = scheduler_output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)


def _staged(loads: Iterable[Load]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """KV [n, L, 2, G, D] and slots [n], some at a time: many small ones are written as one, none takes much memory."""
    pieces: list[tuple[Tensor, Tensor]] = []
    room = _STAGING_BYTES
    for load in loads:
        slots_n = load.slots_n
        for kv_nL2GD in load.prefix.after(load.begin):
            while len(kv_nL2GD):
                if room < kv_nL2GD[0].nbytes:
                    yield pieces
                    pieces, room = [], _STAGING_BYTES
                num = min(len(kv_nL2GD), room // kv_nL2GD[0].nbytes)
                pieces.append((kv_nL2GD[:num], slots_n[:num]))
                room -= pieces[-1][0].nbytes
                kv_nL2GD, slots_n = kv_nL2GD[num:], slots_n[num:]
    yield pieces


def _attention_layers(forward_context: Any) -> Iterator[tuple[int, Any]]:
    for name, layer in forward_context.no_compile_layers.items():
        if hasattr(layer, "kv_cache"):
            yield extract_layer_index(name), layer
