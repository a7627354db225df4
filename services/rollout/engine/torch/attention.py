"""Who attends to what in one step: every token to its cartridges and, causally, to its own slot.

Both parts are computed apart and merged by their log-sum-exp, as in Hydragen (https://arxiv.org/abs/2402.05099): the
tokens of all sequences that share a cartridge attend to it in one product, so it is read once however many they are,
and no cartridge is ever copied. Everything but the tensors of a layer is built once per step.

Shape suffixes as in `foundry.model.lm`, and N slots, M tokens of a slot, R query heads per kv head, B sets of keys, Q
queries and K keys of one set, n some of the T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from services.rollout.engine.torch.kv import SlotKV
from services.rollout.engine.torch.scheduler import Scheduled
from services.rollout.engine.torch.sequence import LoadedCartridge

# Of keys and values of a layer: on a CPU they are read in about the time that one part more takes.
_PADDING_BYTES = 512 * 1024

Attended = tuple[Tensor, Tensor]
"""Outputs [n, G, R, D] of some tokens and the log-sum-exp of their scores [n, G, R]."""


class StepAttention:
    """The `AttentionPlan` of one packed forward over a scheduled batch."""

    def __init__(self, kv: SlotKV, batch: SequenceOf[Scheduled], num_heads: int) -> None:
        self._kv = kv
        self._groups = num_heads // kv.num_kv_heads
        slots: list[int] = []
        indices: list[int] = []
        positions: list[int] = []
        for sequence, num_tokens in batch:
            begin = sequence.num_computed_tokens
            slots += [sequence.slot] * num_tokens
            indices += range(begin, begin + num_tokens)
            positions += range(sequence.offset + begin, sequence.offset + begin + num_tokens)
        self._write_index = kv.write_index(slots, indices)
        self.positions_T = torch.tensor(positions, device=kv.device)
        self._own = _own_parts(kv, batch, self._groups)
        self._shared = _shared_parts(kv, batch)

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        self._kv.write(layer, self._write_index, k_GTD, v_GTD)
        num_tokens, head_dim = q_HTD.shape[1:]
        q_TGRD = q_HTD.transpose(0, 1).reshape(num_tokens, self._kv.num_kv_heads, self._groups, head_dim)
        attended = _concatenate([part.attend(self._kv.layers[layer], q_TGRD, scale) for part in self._own])
        for part in self._shared:
            attended = part.merge(attended, layer, q_TGRD, scale)
        return attended[0].reshape(num_tokens, -1, head_dim).to(q_HTD.dtype)


class _OwnPart:
    """What some tokens see in their own slots: one token each of neighbouring slots, or a chunk of one slot's prompt.

    A view of the slots, so nothing is gathered; what a sequence has not written yet is masked.
    """

    def __init__(self, kv: SlotKV, first_row: int, run: SequenceOf[Scheduled], groups: int) -> None:
        first_slot, num_chunk = run[0].sequence.slot, run[0].num_tokens
        self._rows = slice(first_row, first_row + len(run) * num_chunk)
        self._slots = slice(first_slot, first_slot + len(run))
        # Of each sequence's first token in the step; its later ones see one more each.
        num_seen_B = torch.tensor([sequence.num_computed_tokens + 1 for sequence, _ in run], device=kv.device)
        self._num_keys = max(sequence.num_computed_tokens for sequence, _ in run) + num_chunk
        num_seen_BS = num_seen_B[:, None] + torch.arange(num_chunk, device=kv.device)
        seen_BSK = torch.arange(self._num_keys, device=kv.device) < num_seen_BS[:, :, None]
        mask_BSK = torch.zeros(seen_BSK.shape, dtype=kv.dtype, device=kv.device).masked_fill_(~seen_BSK, -torch.inf)
        self._mask_B1QK = mask_BSK.repeat_interleave(groups, dim=1)[:, None]

    def attend(self, kv: tuple[Tensor, Tensor], q_TGRD: Tensor, scale: float) -> Attended:
        k_BGKD, v_BGKD = (slots_NGMD[self._slots, :, : self._num_keys] for slots_NGMD in kv)
        return _attend_folded(q_TGRD[self._rows], k_BGKD, v_BGKD, self._mask_B1QK, scale)


class _SharedPart:
    """All tokens behind one cartridge, which see the whole of it."""

    def __init__(self, cartridge: LoadedCartridge, rows: slice | Tensor) -> None:
        self._kv_L2GPD = cartridge.kv_L2GPD
        self._rows = rows

    def merge(self, attended: Attended, layer: int, q_TGRD: Tensor, scale: float) -> Attended:
        """`attended` with this cartridge's keys added to what its tokens have seen."""
        out_TGRD, lse_TGR = attended
        k_GPD, v_GPD = self._kv_L2GPD[layer]
        part = _attend_folded(q_TGRD[self._rows], k_GPD[None], v_GPD[None], None, scale)
        merged = _merge((out_TGRD[self._rows], lse_TGR[self._rows]), part)
        if len(merged[0]) == len(out_TGRD):
            return merged
        out_TGRD[self._rows], lse_TGR[self._rows] = merged
        return out_TGRD, lse_TGR


def _own_parts(kv: SlotKV, batch: SequenceOf[Scheduled], groups: int) -> list[_OwnPart]:
    """One part per run of single tokens in neighbouring slots, and one per longer chunk."""
    parts = []
    first_row = 0
    for run in _runs(batch, _max_padding(kv)):
        parts.append(_OwnPart(kv, first_row, run, groups))
        first_row += sum(num_tokens for _, num_tokens in run)
    return parts


def _runs(batch: SequenceOf[Scheduled], max_padding: float) -> Iterator[list[Scheduled]]:
    """A run is read as long as its longest sequence: it ends where that would be more than `max_padding` keys for
    nothing."""
    run: list[Scheduled] = []
    longest = num_keys = 0
    for each in batch:
        num_seen = each.sequence.num_computed_tokens
        next_slot = bool(run) and each.sequence.slot == run[-1].sequence.slot + 1
        padding = max(longest, num_seen) * (len(run) + 1) - num_keys - num_seen
        if not (next_slot and each.num_tokens == run[-1].num_tokens == 1 and padding <= max_padding):
            if run:
                yield run
            run, longest, num_keys = [], 0, 0
        run.append(each)
        longest, num_keys = max(longest, num_seen), num_keys + num_seen
    if run:
        yield run


def _max_padding(kv: SlotKV) -> float:
    """Keys. On a GPU one more part takes longer than what any run reads for nothing."""
    return _PADDING_BYTES * len(kv.layers) / kv.token_bytes if kv.device.type == "cpu" else math.inf


def _shared_parts(kv: SlotKV, batch: SequenceOf[Scheduled]) -> list[_SharedPart]:
    cartridges = {cartridge.digest: cartridge for sequence, _ in batch for cartridge in sequence.cartridges}
    rows: dict[str, list[int]] = {digest: [] for digest in cartridges}
    row = 0
    for sequence, num_tokens in batch:
        for digest in sequence.digests:
            rows[digest] += range(row, row + num_tokens)
        row += num_tokens
    return [_SharedPart(cartridge, _as_slice(rows[digest], kv.device)) for digest, cartridge in cartridges.items()]


def _as_slice(rows: list[int], device: torch.device) -> slice | Tensor:
    """Neighbouring rows as a slice, which needs no gathering."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _concatenate(parts: list[Attended]) -> Attended:
    out_TGRD, lse_TGR = parts[0] if len(parts) == 1 else (torch.cat(each) for each in zip(*parts, strict=True))
    # Merged in float32 whatever the model's dtype.
    return out_TGRD.float(), lse_TGR


def _attend_folded(q_nGRD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, mask_B1QK: Tensor | None, scale: float) -> Attended:
    """B sets of keys, each for an equal share of the n tokens, in order.

    A share's tokens and head groups are one query axis, so that all of them read each key once.
    """
    batch, kv_heads = k_BGKD.shape[:2]
    num_tokens, _, groups, head_dim = q_nGRD.shape
    share = num_tokens // batch
    q_BGQD = q_nGRD.view(batch, share, kv_heads, groups, head_dim).transpose(1, 2).flatten(2, 3)
    out_BGQD, lse_BGQ = attend_part(q_BGQD, k_BGKD, v_BGKD, mask_B1QK, scale)
    out_BGSRD, lse_BGSR = (each.view(batch, kv_heads, share, groups, *each.shape[3:]) for each in (out_BGQD, lse_BGQ))
    return out_BGSRD.transpose(1, 2).flatten(0, 1), lse_BGSR.transpose(1, 2).flatten(0, 1)


def attend_part(q_BGQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, mask: Tensor | None, scale: float) -> Attended:
    """Attention over some of the keys, and the log-sum-exp of the scores (float32) to merge it with the rest."""
    if q_BGQD.device.type == "cpu":
        # torch's own flash kernel; the public function keeps the log-sum-exp to itself.
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out_BGQD, lse_BGQ = flash(q_BGQD, k_BGKD, v_BGKD, attn_mask=mask, scale=scale)
        return out_BGQD, lse_BGQ
    return attend_part_plain(q_BGQD, k_BGKD, v_BGKD, mask, scale)


def attend_part_plain(q_BGQD: Tensor, k_BGKD: Tensor, v_BGKD: Tensor, mask: Tensor | None, scale: float) -> Attended:
    """The same with matrix products, for any device."""
    scores_BGQK = torch.matmul(q_BGQD, k_BGKD.transpose(-1, -2)).float() * scale
    if mask is not None:
        scores_BGQK += mask
    lse_BGQ = torch.logsumexp(scores_BGQK, dim=-1)
    weights_BGQK = torch.exp(scores_BGQK - lse_BGQ[..., None]).to(v_BGKD.dtype)
    return torch.matmul(weights_BGQK, v_BGKD), lse_BGQ


def _merge(a: Attended, b: Attended) -> Attended:
    """softmax over both parts' keys = the mean of their outputs weighted by exp(log-sum-exp)."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    weight_b = torch.sigmoid(lse_b - lse_a)[..., None]
    return torch.lerp(out_a.float(), out_b.float(), weight_b), torch.logaddexp(lse_a, lse_b)
