"""What the cartridge of a run holds before the first step."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from torch import Tensor

from foundry.model.attention.compacting import Compaction
from foundry.model.initialise import compact, cut_context, from_version, random_tokens
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from foundry.seeds import derive_seed
from foundry.selfstudy.references import references
from services.trainer.attempt import Attempt


async def initial_kv(
    attempt: Attempt, lm: FrozenLM, template: ChatTemplate, document: str, context: Sequence[int]
) -> Tensor:
    """KV [L, 2, G, P, D] as the run's `init` says. Raises what makes that impossible, e.g. CartridgeTooLong."""
    spec = attempt.spec
    await attempt.tell({"type": "progress", "stage": f"start ({spec.init})", "done": 0, "total": 1})
    if spec.init == "version":
        kv_L2GPD = from_version(lm, await attempt.version(spec.init_version), spec.num_tokens)
    elif spec.init == "compact":
        kv_L2GPD = await asyncio.to_thread(_compact, attempt, lm, template, document, context)
    elif spec.init == "random":
        seed, num_closing = derive_seed(spec.seed, "init"), len(template.closing)
        kv_L2GPD = await asyncio.to_thread(random_tokens, lm, context, num_closing, spec.num_tokens, seed)
    else:
        text = template.context(await attempt.document(spec.init_text)) if spec.init == "text" else context
        kv_L2GPD = await asyncio.to_thread(lm.prefill, cut_context(text, template.closing, spec.num_tokens))
    await attempt.tell({"type": "progress", "stage": f"start ({spec.init})", "done": 1, "total": 1})
    return kv_L2GPD


def _compact(attempt: Attempt, lm: FrozenLM, template: ChatTemplate, document: str, context: Sequence[int]) -> Tensor:
    spec = attempt.spec
    seed = derive_seed(spec.seed, "references")
    shown = references(document, template, lm.tokenizer, max_tokens=spec.reference_tokens, seed=seed)
    return compact(lm, context, shown, Compaction(spec.num_tokens, num_first=1, num_last=len(template.closing)))
