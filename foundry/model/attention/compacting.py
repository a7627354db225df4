"""Reference sequences behind a document whose KV is compacted, layer by layer, in one forward.

Each layer keeps, for every kv head, the document tokens that the references attend to most, and refits their values so
that attention behind the kept tokens gives what attention behind all gave; steps of Adam on keys and values may bring
it nearer still. The references go on behind what was kept: a layer is fitted to queries as they will be, errors of the
layers below included. Shape suffixes: `foundry.model.lm`, and N document tokens, R query rows of one kv head (its heads
x tokens).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foundry.model.attention import causal_mask

# Of scores [G, R, N] in float32 that are held at once.
_TILE_BYTES = 64 * 1024**2
# Query rows of a kv head whose attention is restored: one number for each is fitted, where values take a whole row.
_MASS_ROWS = 8192
_MASS_UPDATES = 100
# A key that few attend to is no stand-in for many.
_MAX_FACTOR = 20.0
# Of the mean of the diagonal of the queries' second moments.
_DIRECTION_RIDGE = 0.01
# Query rows of each kv head in a step of matching.
_MATCHED_ROWS = 512


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
    # Kept keys take over the attention that went to those left out.
    restore_mass: bool = True
    # Of Adam, on a layer's keys and values, towards what attention behind all gave; none are taken at 0.
    matching_steps: int = 0
    # Of the root mean square of the keys, and of the values, in the first step; it falls to nothing over the others.
    matching_rate: float = 0.01


@dataclass(frozen=True, slots=True)
class Rows:
    """Queries of one kv head each, with what they see of their own sequence and what comes out of all that they see.

    `lse` is the log of the sum of what scores are exponentiated to: of the own sequence, and of all.
    """

    q_GRD: Tensor
    own_lse_GR: Tensor
    own_GRD: Tensor
    lse_GR: Tensor
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
        fitted = Rows.cat([part.at(rows_R) for part, rows_R in zip(parts, self._fitted_rows(q_GrTD), strict=True)])
        if self._compaction.restore_mass:
            some_R = torch.arange(0, fitted.own_lse_GR.shape[1], -(-fitted.own_lse_GR.shape[1] // _MASS_ROWS))
            kept_key_GPD = restore_mass(kept_key_GPD, fitted.at(some_R), self._compaction.num_first)
        if self._compaction.refit:
            kept_value_GPD = refit(kept_key_GPD, kept_value_GPD, fitted, self._compaction.ridge)
        if self._compaction.matching_steps:
            kept_key_GPD, kept_value_GPD = match(kept_key_GPD, kept_value_GPD, fitted, self._compaction)
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
    lse_GR = score_GRS.logsumexp(-1)
    out_GRD = score_GRS.softmax(-1) @ v_GSD
    return Rows(q_GRD, lse_GR, out_GRD, lse_GR, out_GRD)


def _attend(rows: Rows, key_GND: Tensor, value_GND: Tensor, mass_GN: Tensor | None = None, power: float = 1.0) -> Rows:
    """`rows` with what comes out behind these keys; weights to the `power` are added to `mass_GN`."""
    num_groups, num_rows, _ = rows.q_GRD.shape
    all_lse_GR, out_GRD = torch.empty_like(rows.own_lse_GR), torch.empty_like(rows.q_GRD)
    tile = max(1, _TILE_BYTES // (4 * num_groups * key_GND.shape[1]))
    for some in (slice(begin, begin + tile) for begin in range(0, num_rows, tile)):
        weight_GRN = rows.q_GRD[:, some] @ key_GND.mT
        own_lse_GR = rows.own_lse_GR[:, some]
        lse_GR = all_lse_GR[:, some] = torch.logaddexp(weight_GRN.logsumexp(-1), own_lse_GR)
        weight_GRN.sub_(lse_GR.unsqueeze(-1)).exp_()
        own_weight_GR = (own_lse_GR - lse_GR).exp_()
        out_GRD[:, some] = weight_GRN @ value_GND + own_weight_GR.unsqueeze(-1) * rows.own_GRD[:, some]
        if mass_GN is not None:
            mass_GN += weight_GRN.pow_(power).sum(dim=1)
    return Rows(rows.q_GRD, rows.own_lse_GR, rows.own_GRD, all_lse_GR, out_GRD)


def restore_mass(key_GPD: Tensor, rows: Rows, num_first: int) -> Tensor:
    """Keys [G, P, D] to which `rows` attend, nearly, as much as they attended to all.

    Each key's exponentiated score gets a factor of at least 1, by non-negative least squares over the rows' sums, in
    multiplicative updates (Lee and Seung, 1999). A cartridge has no place for factors: they become part of the keys,
    along the direction in which the score of every query grows by one, as nearly as there is such a direction. The
    first keys, which are never trained, stay. Attention Matching, https://arxiv.org/abs/2602.16284, has biases instead.
    """
    restored = []
    for q_RD, key_PD, own_lse_R, lse_R in zip(rows.q_GRD, key_GPD, rows.own_lse_GR, rows.lse_GR, strict=True):
        weight_RP = (q_RD @ key_PD.mT - lse_R.unsqueeze(-1)).exp_()
        wanted_P = weight_RP.mT @ (1 - (own_lse_R - lse_R).exp())
        gram_PP = weight_RP.mT @ weight_RP
        factor_P = torch.ones_like(wanted_P)
        for _ in range(_MASS_UPDATES):
            factor_P *= wanted_P / (gram_PP @ factor_P).clamp_(min=torch.finfo().tiny)
        gain_P = factor_P.clamp_(1.0, _MAX_FACTOR).log_()
        gain_P[:num_first] = 0.0
        restored.append(key_PD + torch.outer(gain_P, _common_direction(q_RD)))
    return torch.stack(restored)


def _common_direction(q_RD: Tensor) -> Tensor:
    """Of least squares, so that it is short where the queries have little in common."""
    covariance_DD = (q_RD.mT @ q_RD).double() / len(q_RD)
    covariance_DD.diagonal().add_(_DIRECTION_RIDGE * covariance_DD.diagonal().mean())
    direction_D: Tensor = torch.linalg.solve(covariance_DD, q_RD.mean(dim=0).double())
    return direction_D.float()


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


def match(key_GPD: Tensor, value_GPD: Tensor, rows: Rows, compaction: Compaction) -> tuple[Tensor, Tensor]:
    """Keys and values [G, P, D] behind which `rows` get, more nearly than behind these, what they got out of all.

    Adam on the squared error, whose gradients are short enough to write out; each step draws rows of its own. The first
    keys, which are never trained, stay.
    """
    key_GPD, value_GPD = key_GPD.clone(), value_GPD.clone()
    rates = [compaction.matching_rate * some.square().mean().sqrt().item() for some in (key_GPD, value_GPD)]
    # In units of what comes out, lest Adam's epsilon counts where that is small.
    scale = rows.out_GRD.square().mean()
    optimizer = torch.optim.Adam([{"params": [key_GPD]}, {"params": [value_GPD]}])
    num_groups, num_rows, _ = rows.q_GRD.shape
    num_drawn = max(1, min(_MATCHED_ROWS, _TILE_BYTES // (4 * num_groups * key_GPD.shape[1])))
    generator = torch.Generator().manual_seed(0)
    for step in range(compaction.matching_steps):
        drawn_R = torch.randint(num_rows, (num_drawn,), generator=generator)
        some = rows.at(drawn_R.to(key_GPD.device))
        weight_GRP = some.q_GRD @ key_GPD.mT
        lse_GR = torch.logaddexp(weight_GRP.logsumexp(-1), some.own_lse_GR)
        weight_GRP.sub_(lse_GR.unsqueeze(-1)).exp_()
        out_GRD = weight_GRP @ value_GPD + (some.own_lse_GR - lse_GR).exp_().unsqueeze(-1) * some.own_GRD
        error_GRD = (out_GRD - some.out_GRD) / (scale * num_drawn)
        value_GPD.grad = weight_GRP.mT @ error_GRD
        pull_GRP = (error_GRD @ value_GPD.mT).sub_((error_GRD * out_GRD).sum(-1, keepdim=True)).mul_(weight_GRP)
        key_GPD.grad = pull_GRP.mT @ some.q_GRD
        key_GPD.grad[:, : compaction.num_first] = 0.0
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / compaction.matching_steps)
        optimizer.step()
    return key_GPD, value_GPD
