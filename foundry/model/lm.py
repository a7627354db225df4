"""The frozen model: any decoder of `transformers` whose layers call the attention interface, used as it is.

Shape suffixes: L layers, H query heads, G kv heads, P prefix tokens, S segment tokens, T packed tokens, D head dim,
E hidden size, V vocabulary; 2 is key and value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from foundry.identity import Dtype
from foundry.model.attention import ATTENTION, AttentionPlan, LayeredPlan
from foundry.model.attention.flex import FlexAttention
from foundry.model.attention.packed import PackedAttention
from foundry.model.attention.prefill import FlexPrefill, PrefillAttention
from foundry.model.attention.shared import SharedPrefixAttention
from foundry.model.fingerprint import fingerprint_model
from foundry.model.info import ModelInfo, resolve_dtype
from foundry.model.layers import compile_layers
from foundry.model.packed_linear import pack_products
from foundry.model.projections import join_projections
from foundry.model.transfer import to_device

# Of a document, computed at once. With more a GPU is no fuller, and nobody could stop meanwhile.
_CUDA_CHUNK_TOKENS = 8192
_CHUNK_TOKENS = 1024


class FrozenLM:
    """A causal language model without gradients on its weights, its tokenizer and what identifies them."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fingerprint: str) -> None:
        """Use `FrozenLM.load`; this takes a model that is already in memory. Raises ModelUnsupported."""
        self.info = ModelInfo.of(model.config, model.generation_config, tokenizer, fingerprint)
        model.set_attn_implementation(ATTENTION)
        model.train(False)
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.head_VE: Tensor = head.weight.detach()
        join_projections(model)
        pack_products(model)
        compile_layers(model)
        self.model = model.requires_grad_(False)
        self.tokenizer = tokenizer
        self.spec, self.eos_ids = self.info.spec, self.info.eos_ids
        self.num_heads: int = model.config.get_text_config().num_attention_heads
        self.packed_plan = _packed_plan(self.device)
        self.prefill_plan: type[FlexPrefill | PrefillAttention] = (
            FlexPrefill if self.head_VE.is_cuda else PrefillAttention
        )

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

    def hidden(self, ids_T: Tensor, positions_T: Tensor, plan: AttentionPlan | LayeredPlan) -> Tensor:
        """Last hidden states [T, E], after the final norm, of packed tokens at the given positions."""
        out = self.model.base_model(
            input_ids=ids_T.unsqueeze(0), position_ids=positions_T.unsqueeze(0), use_cache=False, plan=plan
        )
        hidden_TE: Tensor = out.last_hidden_state[0]
        return hidden_TE

    def logits(self, hidden_TE: Tensor) -> Tensor:
        """Logits [T, V] in float32."""
        logits_TV: Tensor = self.model.get_output_embeddings()(hidden_TE)  # type: ignore[no-untyped-call]
        return logits_TV.float()

    def packed_hidden(
        self, sequences: Sequence[Sequence[int]], prefixes: Sequence[Tensor | None], *, recompute: bool = False
    ) -> Tensor:
        """Hidden states [T, E] of sequences laid end to end, each behind its own prefix KV [L, 2, G, P, D].

        Token i of a sequence has position P + i. Gradients reach the prefixes. With `recompute` what is kept for the
        backward on CUDA is a tenth, for a forward more. Raises InvalidArgument for an empty or too long sequence.
        """
        plan = self.packed_plan(sequences, prefixes, self.spec.max_tokens, self.device)
        if isinstance(plan, LayeredPlan):
            plan.recompute = recompute
        return self._planned_hidden([token for sequence in sequences for token in sequence], plan)

    def prefill(self, ids: Sequence[int], *, chunk_tokens: int | None = None) -> Tensor:
        """KV [L, 2, G, P, D] of a context at positions 0..P-1, computed `chunk_tokens` at a time."""
        kv_L2GPD = self.unfilled(len(ids))
        for _ in self.fill(kv_L2GPD, ids, chunk_tokens=chunk_tokens):
            pass
        return kv_L2GPD

    def unfilled(self, num_tokens: int) -> Tensor:
        """Room for the KV [L, 2, G, P, D] of a context."""
        return torch.empty(self.spec.kv_shape(num_tokens), dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def fill(
        self, kv_L2GPD: Tensor, ids: Sequence[int], begin: int = 0, *, chunk_tokens: int | None = None
    ) -> Iterator[int]:
        """Computes a context's KV in place, from token `begin` on; after each chunk says how many tokens have theirs.

        Who stops and goes on from there gets the same bits. On CUDA a chunk is a multiple of 128 tokens.
        """
        chunk_tokens = chunk_tokens or (_CUDA_CHUNK_TOKENS if self.device.type == "cuda" else _CHUNK_TOKENS)
        for start in range(begin, len(ids), chunk_tokens):
            chunk = ids[start : start + chunk_tokens]
            plan = self.prefill_plan(kv_L2GPD, start, len(chunk))
            self._planned_hidden(chunk, plan)
            plan.keep()
            if kv_L2GPD.is_cuda:
                # Else a document's chunks would all be queued before anybody could stop them.
                torch.cuda.current_stream(self.device).synchronize()
            yield start + len(chunk)

    def _planned_hidden(self, ids: Sequence[int], plan: Any) -> Tensor:
        """Hidden states [T, E] of tokens at their plan's positions, of which there may be more than tokens."""
        ids_T = torch.zeros(len(plan.positions_T), dtype=torch.long)
        ids_T[: len(ids)] = torch.tensor(ids)
        return self.hidden(to_device(ids_T, self.device), plan.positions_T, plan)[: len(ids)]


def _packed_plan(device: torch.device) -> type[FlexAttention | SharedPrefixAttention | PackedAttention]:
    if device.type == "cuda":
        return FlexAttention
    # FlexAttention knows no backward on a CPU, and without compilation no fused kernel.
    return SharedPrefixAttention if device.type == "cpu" else PackedAttention
