"""Keys moved to other positions: rotary embeddings turn by a constant angle, so the cached keys can be turned too.

Which of a key's numbers turn together, and whether a layer turns them at all, is seen from the model, not assumed.
Shape suffixes: `foundry.model.lm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from foundry.errors import ModelUnsupported
from foundry.model.attention import attend_masked, causal_mask
from foundry.model.info import ModelInfo
from foundry.model.lm import FrozenLM

# Which two numbers of a key turn together: i and i + half, or neighbours; None in a layer without positions.
Pairs = Literal["halves", "neighbours"] | None

_PROBE_TOKENS, _PROBE_SHIFT = 8, 37
# Of a model that is made to be probed.
_PROBE_SIZE = 64
# Rounding adds up from layer to layer, in bf16 to a few hundredths; another rotation is off by about one.
_MAX_ERROR = 0.1


@dataclass(frozen=True, slots=True)
class KeyRotation:
    """The angle of one position for each pair, and which pairs each layer has."""

    inv_freq: Tensor
    layers: tuple[Pairs, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, lm: FrozenLM) -> KeyRotation:
        """Compare keys of the same tokens at two places. Raises ModelUnsupported if no rotation explains them."""
        embedding = getattr(lm.model.base_model, "rotary_emb", None)
        inv_freq = getattr(embedding, "inv_freq", None)
        if not isinstance(inv_freq, Tensor):
            raise ModelUnsupported(
                f"{type(lm.model).__name__} has no rotary_emb.inv_freq: its keys can't be moved to other positions"
            )
        here, there = _keys(lm, 0), _keys(lm, _PROBE_SHIFT)
        layers = tuple(_pairs(inv_freq, *both, layer) for layer, both in enumerate(zip(here, there, strict=True)))
        return cls(inv_freq, layers)

    @classmethod
    def known(cls, lm: FrozenLM) -> KeyRotation | str:
        """As `of`, or why there is none."""
        try:
            return cls.of(lm)
        except ModelUnsupported as error:
            return error.message

    @classmethod
    def of_directory(cls, directory: Path, info: ModelInfo) -> KeyRotation | str:
        """As `known`, for a model that another process has: of one with its configuration, but few and random weights.

        How keys turn follows from the configuration alone.
        """
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        text = config.get_text_config()
        narrow = {"hidden_size": _PROBE_SIZE, "intermediate_size": _PROBE_SIZE, "vocab_size": _PROBE_SIZE}
        alone = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": info.spec.head_dim}
        ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
        for name, value in (narrow | alone | ids).items():
            setattr(text, name, value)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        return cls.known(FrozenLM(model, info.tokenizer, info.spec.fingerprint))

    def move(self, kv_L2GPD: Tensor, shift: int) -> Tensor:
        """KV [L, 2, G, P, D] with its keys `shift` positions further on, in new memory and, but for one layer, no more.

        What a scaled embedding multiplies keys with is in them already: they are turned, and not multiplied again.
        """
        inv_freq = self.inv_freq.to(kv_L2GPD.device)
        moved_L2GPD = kv_L2GPD.clone()
        for kv_2GPD, pairs in zip(moved_L2GPD, self.layers, strict=True):
            kv_2GPD[0] = _turn(kv_2GPD[0], inv_freq, shift, pairs)
        return moved_L2GPD


class _Probe:
    """One sequence that attends to itself, and leaves its keys behind."""

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self.mask_SK = causal_mask(num_tokens, 0, device)
        self.keys: list[Tensor] = []

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        self.keys.append(k_GTD)
        return attend_masked(q_HTD, k_GTD, v_GTD, self.mask_SK, scale).transpose(0, 1)


def _keys(lm: FrozenLM, begin: int) -> list[Tensor]:
    probe = _Probe(_PROBE_TOKENS, lm.device)
    ids_T = torch.arange(_PROBE_TOKENS, device=lm.device) % lm.spec.vocab_size
    lm.hidden(ids_T, torch.arange(begin, begin + _PROBE_TOKENS, device=lm.device), probe)
    return probe.keys


def _pairs(inv_freq: Tensor, here_GTD: Tensor, there_GTD: Tensor, layer: int) -> Pairs:
    candidates: tuple[Pairs, ...] = ("halves", "neighbours", None)
    for pairs in candidates:
        error = (_turn(here_GTD, inv_freq, _PROBE_SHIFT, pairs) - there_GTD).float().norm() / there_GTD.float().norm()
        if error.item() < _MAX_ERROR:
            return pairs
    raise ModelUnsupported(
        f"layer {layer}: keys of the same tokens at two places differ by more than a rotation, so they can't be moved"
    )


def _turn(k_GPD: Tensor, inv_freq: Tensor, shift: int, pairs: Pairs) -> Tensor:
    if pairs is None or shift == 0:
        return k_GPD
    angle = shift * inv_freq.double()
    cos, sin = angle.cos().float(), angle.sin().float()
    # Models may leave the last numbers of a key as they are.
    turning, still = k_GPD.float().tensor_split([2 * len(inv_freq)], dim=-1)
    x, y = turning.chunk(2, dim=-1) if pairs == "halves" else (turning[..., ::2], turning[..., 1::2])
    both = (x * cos - y * sin, y * cos + x * sin)
    turned = torch.cat(both, dim=-1) if pairs == "halves" else torch.stack(both, dim=-1).flatten(-2)
    return torch.cat([turned, still], dim=-1).to(k_GPD.dtype)
