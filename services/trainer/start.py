"""What the cartridge of a run holds before the first step."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from torch import Tensor

from foundry.model.attention.compacting import Compaction
from foundry.model.initialise import (
    compact,
    cut_context,
    from_version,
    random_tokens,
    share_tokens,
    side_by_side,
)
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from foundry.seeds import derive_seed
from foundry.selfstudy.references import references
from services.trainer.attempt import Attempt
from services.trainer.contexts import Context


async def initial_kv(attempt: Attempt, lm: FrozenLM, template: ChatTemplate, contexts: Sequence[Context]) -> Tensor:
    """KV [L, 2, G, P, D] as the run's `init` says. Raises what makes that impossible, e.g. CartridgeTooLong."""
    spec, stage = attempt.spec, f"start ({attempt.spec.init})"
    if spec.init == "version":
        return from_version(lm, await attempt.version(spec.init_version), spec.num_tokens)
    if spec.init == "text":
        text = template.context(await attempt.document(spec.init_text))
        return await asyncio.to_thread(lm.prefill, cut_context(text, template.closing, spec.num_tokens))
    parts = []
    shares = share_tokens(spec.num_tokens, [len(context.ids) for context in contexts])
    for place, (context, num_tokens) in enumerate(zip(contexts, shares, strict=True)):
        await attempt.tell({"type": "progress", "stage": stage, "done": place, "total": len(contexts)})
        parts.append(await asyncio.to_thread(_part, attempt, lm, template, context, num_tokens))
    await attempt.tell({"type": "progress", "stage": stage, "done": len(contexts), "total": len(contexts)})
    return side_by_side(lm, parts)


def _part(attempt: Attempt, lm: FrozenLM, template: ChatTemplate, context: Context, num_tokens: int) -> Tensor:
    """Of one document."""
    spec, num_closing = attempt.spec, len(template.closing)
    if spec.init == "first_tokens":
        return lm.prefill(cut_context(context.ids, template.closing, num_tokens))
    if spec.init == "random":
        return random_tokens(lm, context.ids, num_closing, num_tokens, derive_seed(spec.seed, "init"))
    seed = derive_seed(spec.seed, "references")
    shown = references(context.text, template, lm.tokenizer, max_tokens=spec.reference_tokens, seed=seed)
    return compact(lm, context.ids, shown, Compaction(num_tokens, num_first=1, num_last=num_closing))
