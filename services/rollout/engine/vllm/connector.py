"""Puts cartridges into vLLM's KV memory. vLLM makes it twice, for its scheduler and for its worker: on a GPU both
are in one process beside ours, on a CPU in two.

A prompt begins with one placeholder id for each token of its cartridges. To vLLM their KV is somewhere else: it asks
here how many tokens of it there are, allots blocks, and has them filled before the forward. Its prefix cache knows the
blocks by the digests (the request's cache salt), so a second sequence behind the same cartridges finds them there.

A placeholder that was computed instead would be an answer behind garbage, without an error. Hence every batch is
checked before it runs: no scheduled sequence may have fewer computed tokens than its cartridges have. And after it ran:
its cartridges must have been written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
from vllm.platforms import current_platform

from services.rollout.engine.vllm.handover import SchedulerEnd, WorkerEnd

# Of the connector's configuration.
ADDRESS = "address"
# Of a request's transfer parameters.
SEQUENCE, DIGESTS, NUM_TOKENS = "sequence", "digests", "num_tokens"
# Of the device's memory, outside of what vLLM manages; a whole cartridge of 2048 tokens of a 3B model.
_STAGING_BYTES = 256 * 1024**2


@dataclass(frozen=True, slots=True)
class Load:
    """The tokens from `begin` on of the cartridges of a sequence, and the slot of the KV memory [n] of each."""

    digests: Sequence[str]
    begin: int
    slots_n: Tensor


@dataclass
class Loads(KVConnectorMetadata):  # type: ignore[misc]
    """What is to be written before one forward."""

    loads: list[Load] = field(default_factory=list)
    written: bool = False


class CartridgeConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """See `KVConnectorBase_V1`: the upper half is the scheduler's, the lower half the worker's."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        address = self._kv_transfer_config.get_from_extra_config(ADDRESS, None)
        if role == KVConnectorRole.SCHEDULER:
            self._block_size: int = vllm_config.cache_config.block_size
            # Cartridge tokens by vLLM's own ids of the sequences that have a place.
            self._placed: dict[str, int] = {}
            self._loads = Loads()
            self._engine = SchedulerEnd(address)
        else:
            self._cartridges = WorkerEnd(address, pin=current_platform.is_cuda_alike())

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return max(0, request.kv_transfer_params[NUM_TOKENS] - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        # Again after a preemption: its blocks are others then.
        end = self._placed[request.request_id] = request.kv_transfer_params[NUM_TOKENS]
        if num_external_tokens:
            begin = end - num_external_tokens
            positions_n = torch.arange(begin, end)
            (block_ids,) = blocks.get_block_ids()
            slots_n = torch.tensor(block_ids)[positions_n // self._block_size] * self._block_size
            slots_n += positions_n % self._block_size
            self._loads.loads.append(Load(request.kv_transfer_params[DIGESTS], begin, slots_n))

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        for request_id, num_computed in _scheduled(scheduler_output):
            if num_computed < self._placed[request_id]:
                raise RuntimeError(
                    f"vLLM has {num_computed} of the {self._placed[request_id]} cartridge tokens of {request_id} and "
                    "would compute the others from their placeholders"
                )
        loads, self._loads = self._loads, Loads()
        return loads

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        self._placed.pop(request.request_id, None)
        self._engine.ended(request.kv_transfer_params[SEQUENCE])
        return False, None

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata: Loads = self._get_connector_metadata()
        if metadata.loads:
            self._write(metadata.loads, list(_attention_layers(forward_context)))
        metadata.written = True

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing to wait for: writes and forward follow each other on one stream."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is taken out of vLLM's memory."""

    def wait_for_save(self) -> None:
        """After the forward, whose tokens nobody has seen yet."""
        metadata: Loads = self._get_connector_metadata()
        if metadata.loads and not metadata.written:
            raise RuntimeError("vLLM computed a batch without the cartridges before its sequences")

    def _write(self, loads: Sequence[Load], layers: Sequence[tuple[int, Any]]) -> None:
        device = layers[0][1].kv_cache.device
        for pieces in _staged((self._after(load.digests, load.begin), load.slots_n) for load in loads):
            kv_nL2GD = torch.cat([kv.to(device, non_blocking=True) for kv, _ in pieces])
            slots_n = torch.cat([slots for _, slots in pieces]).to(device, non_blocking=True)
            for index, layer in layers:
                key_nGD, value_nGD = kv_nL2GD[:, index].unbind(1)
                layer.impl.do_kv_cache_update(layer, key_nGD, value_nGD, layer.kv_cache, slots_n)

    def _after(self, digests: Sequence[str], begin: int) -> Iterator[Tensor]:
        """KV [n, L, 2, G, D] of the tokens from `begin` on, in pieces that are whole in memory."""
        for digest in digests:
            kv_PL2GD = self._cartridges[digest]
            if begin < len(kv_PL2GD):
                yield kv_PL2GD[begin:]
            begin = max(0, begin - len(kv_PL2GD))


def _scheduled(scheduler_output: Any) -> Iterator[tuple[str, int]]:
    """The sequences of a batch and how many tokens of each were computed, cached or loaded before it."""
    for request in scheduler_output.scheduled_new_reqs:
        yield request.req_id, request.num_computed_tokens
    cached = scheduler_output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)


def _staged(loads: Iterable[tuple[Iterable[Tensor], Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """KV [n, L, 2, G, D] and slots [n], some at a time: many small ones are written as one, none takes much memory."""
    pieces: list[tuple[Tensor, Tensor]] = []
    room = _STAGING_BYTES
    for kvs_nL2GD, slots_n in loads:
        for kv_nL2GD in kvs_nL2GD:
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
