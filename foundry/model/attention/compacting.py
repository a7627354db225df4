"""Reference sequences behind a document whose KV is compacted, layer by layer, in one forward.

Each layer keeps, for every kv head, the document tokens that the references attend to most, and refits their values so
that attention behind the kept tokens gives what attention behind all gave. The references go on behind what was kept:
a layer is fitted to queries as they will be, errors of the layers below included. Shape suffixes: `foundry.model.lm`,
and N document tokens, R query rows of one kv head (its heads x tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.model.attention import causal_mask

# Of scores [G, R, N] in float32 that are held at once.
_TILE_BYTES = 64 * 1024**2


@dataclass(frozen=True, slots=True)
class Compaction:
    """What is kept of a document's tokens."""

    num_tokens: int
    # The first and the last tokens of the context, whatever attends to them.
    num_first: int
    num_last: int
    # Attention weights count to this power: a few strong readers more than many weak ones.
    power: float = 2.0
    # Of the mean of the diagonal of the normal equations.
    ridge: float = 0.1
    # The most reference tokens that values are fitted to.
    max_fitted_tokens: int = 16384
    # Each layer's queries are taken behind the layers below as they were compacted.
    sequential: bool = True
    refit: bool = True


@dataclass(frozen=True, slots=True)
class Rows:
    """Queries of one kv head each, with what they see of their own sequence and what comes out of all that they see."""

    q_GRD: Tensor
    own_lse_GR: Tensor
    own_GRD: Tensor
    out_GRD: Tensor

    @classmethod
    def cat(cls, parts: Sequence[Rows]) -> Rows:
        return cls(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in cls.__slots__))

    def at(self, rows_R: Tensor) -> Rows:
        return Rows(*(getattr(self, name)[:, rows_R] for name in self.__slots__))


class CompactingAttention:
    def __init__(self, sequences: Sequence[Sequence[int]], document_L2GND: Tensor, compaction: Compaction) -> None:
        num_document = document_L2GND.shape[3]
        self._document, self._compaction = document_L2GND, compaction
        self._lengths = [len(sequence) for sequence in sequences]
        device = document_L2GND.device
        self.positions_T = torch.cat(
            [torch.arange(num_document, num_document + length, device=device) for length in self._lengths]
        )
        # Of every layer: kept KV [2, G, P, D], keys where they were in the document.
        self.kept: list[Tensor] = []
        self.indices: list[Tensor] = []

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        key_GND, value_GND = self._document[layer].float().unbind(0)
        q_GrTD = (q_HTD.float() * scale).reshape(k_GTD.shape[0], -1, *q_HTD.shape[1:])
        mass_GN = torch.zeros(key_GND.shape[:2], dtype=torch.float64, device=q_HTD.device)
        parts = []
        begin = 0
        for length in self._lengths:
            end = begin + length
            own = _own(q_GrTD[:, :, begin:end], k_GTD[:, begin:end].float(), v_GTD[:, begin:end].float())
            parts.append(_attend(own, key_GND, value_GND, mass_GN, self._compaction.power))
            begin = end
        indices_GP = self._select(mass_GN)
        index_GPD = indices_GP.unsqueeze(-1).expand(-1, -1, key_GND.shape[-1])
        kept_key_GPD, kept_value_GPD = key_GND.gather(1, index_GPD), value_GND.gather(1, index_GPD)
        if self._compaction.refit:
            fitted = Rows.cat([part.at(rows_R) for part, rows_R in zip(parts, self._fitted_rows(q_GrTD), strict=True)])
            kept_value_GPD = refit(kept_key_GPD, kept_value_GPD, fitted, self._compaction.ridge)
        self.kept.append(torch.stack([kept_key_GPD, kept_value_GPD]))
        self.indices.append(indices_GP)
        if self._compaction.sequential:
            parts = [_attend(part, kept_key_GPD, kept_value_GPD) for part in parts]
        out = [part.out_GRD.reshape(q_HTD.shape[0], -1, q_HTD.shape[2]) for part in parts]
        return torch.cat(out, dim=1).transpose(0, 1).to(q_HTD.dtype)

    def _select(self, mass_GN: Tensor) -> Tensor:
        compaction = self._compaction
        mass_GN[:, : compaction.num_first] = torch.inf
        mass_GN[:, mass_GN.shape[1] - compaction.num_last :] = torch.inf
        return mass_GN.topk(compaction.num_tokens, dim=1).indices.sort(dim=1).values

    def _fitted_rows(self, q_GrTD: Tensor) -> Iterator[Tensor]:
        """For each sequence the rows that values are fitted to: evenly many of every one."""
        stride = -(-sum(self._lengths) // self._compaction.max_fitted_tokens)
        for length in self._lengths:
            rows = torch.arange(0, q_GrTD.shape[1] * length, device=q_GrTD.device).view(-1, length)
            yield rows[:, stride - 1 :: stride].flatten()


def _own(q_GrSD: Tensor, k_GSD: Tensor, v_GSD: Tensor) -> Rows:
    """What queries see of their own sequence."""
    q_GRD = q_GrSD.flatten(1, 2)
    mask_RS = causal_mask(k_GSD.shape[1], 0, q_GRD.device).repeat(q_GrSD.shape[1], 1)
    score_GRS = (q_GRD @ k_GSD.mT).masked_fill_(~mask_RS, -torch.inf)
    return Rows(q_GRD, score_GRS.logsumexp(-1), score_GRS.softmax(-1) @ v_GSD, q_GRD)


def _attend(rows: Rows, key_GND: Tensor, value_GND: Tensor, mass_GN: Tensor | None = None, power: float = 1.0) -> Rows:
    """`rows` with what comes out behind these keys; weights to the `power` are added to `mass_GN`."""
    num_groups, num_rows, _ = rows.q_GRD.shape
    out_GRD = torch.empty_like(rows.q_GRD)
    tile = max(1, _TILE_BYTES // (4 * num_groups * key_GND.shape[1]))
    for some in (slice(begin, begin + tile) for begin in range(0, num_rows, tile)):
        weight_GRN = rows.q_GRD[:, some] @ key_GND.mT
        own_lse_GR = rows.own_lse_GR[:, some]
        lse_GR = torch.logaddexp(weight_GRN.logsumexp(-1), own_lse_GR)
        weight_GRN.sub_(lse_GR.unsqueeze(-1)).exp_()
        own_weight_GR = (own_lse_GR - lse_GR).exp_()
        out_GRD[:, some] = weight_GRN @ value_GND + own_weight_GR.unsqueeze(-1) * rows.own_GRD[:, some]
        if mass_GN is not None:
            mass_GN += weight_GRN.pow_(power).sum(dim=1)
    return Rows(rows.q_GRD, rows.own_lse_GR, rows.own_GRD, out_GRD)


def refit(key_GPD: Tensor, value_GPD: Tensor, rows: Rows, ridge: float) -> Tensor:
    """Values [G, P, D] with which `rows` get out of these keys, nearly, what they got out of all.

    Ridge least squares towards the values that are there; with fewer rows than keys in its dual form.
    """
    fitted = []
    for q_RD, key_PD, value_PD, own_lse_R, own_RD, out_RD in zip(
        rows.q_GRD, key_GPD, value_GPD, rows.own_lse_GR, rows.own_GRD, rows.out_GRD, strict=True
    ):
        score_RP = q_RD @ key_PD.mT
        lse_R = torch.logaddexp(score_RP.logsumexp(-1), own_lse_R)
        weight_RP = (score_RP - lse_R.unsqueeze(-1)).exp_()
        missing_RD = out_RD - (own_lse_R - lse_R).exp_().unsqueeze(-1) * own_RD - weight_RP @ value_PD
        primal = weight_RP.shape[0] >= weight_RP.shape[1]
        gram = (weight_RP.mT @ weight_RP if primal else weight_RP @ weight_RP.mT).double()
        # The traces of both forms are equal; the ridge is relative to the mean over the keys.
        gram.diagonal().add_(ridge * gram.diagonal().sum() / weight_RP.shape[1])
        factor = torch.linalg.cholesky(gram)
        if primal:
            change = torch.cholesky_solve((weight_RP.mT @ missing_RD).double(), factor).float()
        else:
            change = weight_RP.mT @ torch.cholesky_solve(missing_RD.double(), factor).float()
        fitted.append(value_PD + change)
    return torch.stack(fitted)
