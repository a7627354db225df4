"""The frozen model, and attention in which every packed sequence sees its own prefix and itself only.

Any decoder of `transformers` whose layers call the attention interface is used as it is: `FrozenLM` registers one
attention function, and a plan passed through the forward's keyword arguments says who sees whom.

Shape suffixes: L layers, H query heads, G kv heads, P prefix tokens, S segment tokens, T packed tokens, D head dim,
E hidden size, V vocabulary; 2 is key and value.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foundry.errors import InvalidArgument, ModelUnsupported
from foundry.fingerprint import fingerprint_model
from foundry.identity import Dtype
from foundry.model_info import ModelInfo, resolve_dtype

ATTENTION = "foundry"
# What models pass to their attention function beside the usual, and what would silently be left out.
UNSUPPORTED_ATTENTION = ("sliding_window", "softcap", "s_aux")


class AttentionPlan(Protocol):
    """Who attends to whom in one forward over packed tokens."""

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        """Return the attention output [T, H, D] of one layer. Keys come after RoPE."""
        ...


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    plan: AttentionPlan,
    **extras: Any,
) -> tuple[Tensor, None]:
    if wanted := [name for name in UNSUPPORTED_ATTENTION if extras.get(name) is not None]:
        raise ModelUnsupported(f"layer {module.layer_idx} asks for attention with {', '.join(wanted)}")
    out_THD = plan.attend(module.layer_idx, query[0], key[0], value[0], scaling)  # type: ignore[arg-type]
    return out_THD.unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)


class FrozenLM:
    """A causal language model without gradients on its weights, its tokenizer and what identifies them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> None:
        """Use `FrozenLM.load`; this takes a model that is already in memory. Raises ModelUnsupported."""
        self.info = ModelInfo.of(model.config, model.generation_config, tokenizer, fingerprint)
        model.set_attn_implementation(ATTENTION)
        model.train(False)
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.head_VE: Tensor = head.weight
        self.spec, self.eos_ids = self.info.spec, self.info.eos_ids

    @classmethod
    def load(cls, directory: Path, *, device: str = "cpu", dtype: Dtype = "auto") -> FrozenLM:
        """Load a model directory. `auto` is bfloat16 on CUDA and float32 elsewhere.

        Raises ModelNotFound or ModelUnsupported.
        """
        fingerprint = fingerprint_model(directory)
        model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=resolve_dtype(dtype, device), local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return cls(model.to(device), tokenizer, fingerprint)

    @property
    def device(self) -> torch.device:
        return self.head_VE.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head_VE.dtype

    def hidden(self, ids_T: Tensor, positions_T: Tensor, plan: AttentionPlan) -> Tensor:
        """Last hidden states [T, E], after the final norm, of packed tokens at the given positions."""
        out = self.model.base_model(
            input_ids=ids_T.unsqueeze(0), position_ids=positions_T.unsqueeze(0), use_cache=False, plan=plan
        )
        hidden_TE: Tensor = out.last_hidden_state[0]
        return hidden_TE

    def logits(self, hidden_TE: Tensor) -> Tensor:
        """Logits [T, V] in float32."""
        return F.linear(hidden_TE, self.head_VE).float()

    def packed_hidden(self, sequences: Sequence[Sequence[int]], prefixes: Sequence[Tensor | None]) -> Tensor:
        """Hidden states [T, E] of sequences laid end to end, each behind its own prefix KV [L, 2, G, P, D].

        Token i of a sequence has position P + i. Gradients reach the prefixes. Raises InvalidArgument for an empty or
        too long sequence.
        """
        plan = PackedAttention(sequences, prefixes, self.spec.max_tokens, self.device)
        ids_T = torch.tensor([token for sequence in sequences for token in sequence], device=self.device)
        return self.hidden(ids_T, plan.positions_T, plan)

    @torch.no_grad()
    def prefill(self, ids: Sequence[int], *, chunk_tokens: int = 1024) -> Tensor:
        """KV [L, 2, G, P, D] of a context at positions 0..P-1, computed `chunk_tokens` at a time."""
        spec = self.spec
        kv_L2GPD = torch.empty(
            spec.num_layers, 2, spec.num_kv_heads, len(ids), spec.head_dim, dtype=self.dtype, device=self.device
        )
        for begin in range(0, len(ids), chunk_tokens):
            chunk = ids[begin : begin + chunk_tokens]
            plan = _Prefill(kv_L2GPD, begin, len(chunk))
            positions_T = torch.arange(begin, begin + len(chunk), device=self.device)
            self.hidden(torch.tensor(chunk, device=self.device), positions_T, plan)
        return kv_L2GPD


class PackedAttention:
    """Sequences laid end to end; each sees the whole of its prefix and, causally, itself."""

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        prefixes: Sequence[Tensor | None],
        max_tokens: int,
        device: torch.device,
    ) -> None:
        # Taken apart once: the gradient of indexing is a whole prefix of zeros for every layer and segment.
        layers = {
            id(prefix): [layer.unbind(0) for layer in prefix.unbind(0)] for prefix in prefixes if prefix is not None
        }
        self.prefix_layers = [None if prefix is None else layers[id(prefix)] for prefix in prefixes]
        self.segments: list[tuple[int, int]] = []
        self.masks_SK: list[Tensor] = []
        positions: list[Tensor] = []
        masks: dict[tuple[int, int], Tensor] = {}
        begin = 0
        for index, (sequence, prefix_L2GPD) in enumerate(zip(sequences, prefixes, strict=True)):
            num_prefix, num_tokens = 0 if prefix_L2GPD is None else prefix_L2GPD.shape[3], len(sequence)
            if num_tokens == 0:
                raise InvalidArgument(f"sequence {index} is empty: it needs at least one token")
            if num_prefix + num_tokens > max_tokens:
                raise InvalidArgument(
                    f"sequence {index} has {num_tokens} tokens behind a prefix of {num_prefix}: "
                    f"the model's context is {max_tokens}"
                )
            self.segments.append((begin, begin + num_tokens))
            positions.append(torch.arange(num_prefix, num_prefix + num_tokens, device=device))
            shape = (num_tokens, num_prefix)
            if shape not in masks:
                masks[shape] = causal_mask(num_tokens, num_prefix, device)
            self.masks_SK.append(masks[shape])
            begin += num_tokens
        self.positions_T = torch.cat(positions)

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        outputs = []
        for (begin, end), prefix, mask_SK in zip(self.segments, self.prefix_layers, self.masks_SK, strict=True):
            k_GKD, v_GKD = k_GTD[:, begin:end], v_GTD[:, begin:end]
            if prefix is not None:
                k_GPD, v_GPD = prefix[layer]
                k_GKD = torch.cat([k_GPD, k_GKD], dim=1)
                v_GKD = torch.cat([v_GPD, v_GKD], dim=1)
            outputs.append(attend_masked(q_HTD[:, begin:end], k_GKD, v_GKD, mask_SK, scale))
        return torch.cat(outputs, dim=1).transpose(0, 1)


class _Prefill:
    """One sequence that attends to a KV buffer [L, 2, G, P, D] which this plan fills from `begin` on."""

    def __init__(self, kv_L2GPD: Tensor, begin: int, num_tokens: int) -> None:
        self.kv_L2GPD = kv_L2GPD
        self.begin, self.end = begin, begin + num_tokens
        self.mask_SK = causal_mask(num_tokens, begin, kv_L2GPD.device)

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scale: float) -> Tensor:
        kv_2GPD = self.kv_L2GPD[layer]
        kv_2GPD[0, :, self.begin : self.end] = k_GTD
        kv_2GPD[1, :, self.begin : self.end] = v_GTD
        seen_2GKD = kv_2GPD[:, :, : self.end]
        return attend_masked(q_HTD, seen_2GKD[0], seen_2GKD[1], self.mask_SK, scale).transpose(0, 1)


def causal_mask(num_tokens: int, num_prefix: int, device: torch.device) -> Tensor:
    """Bool [S, P + S]: row i sees the prefix and tokens 0..i."""
    return torch.ones(num_tokens, num_prefix + num_tokens, dtype=torch.bool, device=device).tril(num_prefix)


def attend_masked(q_HSD: Tensor, k_GKD: Tensor, v_GKD: Tensor, mask_SK: Tensor, scale: float) -> Tensor:
    """Grouped-query attention of one sequence: [H, S, D]."""
    return F.scaled_dot_product_attention(
        q_HSD.unsqueeze(0), k_GKD.unsqueeze(0), v_GKD.unsqueeze(0), attn_mask=mask_SK, scale=scale, enable_gqa=True
    )[0]
