"""What the cartridge of a run holds before the first step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

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


async def plan_start(
    attempt: Attempt, lm: FrozenLM, template: ChatTemplate, contexts: Sequence[Context]
) -> Callable[[], Awaitable[Tensor]]:
    """What gives the KV [L, 2, G, P, D] that the run's `init` says, from the model alone.

    All that takes the tokenizer is done here: it bears no second thread. Raises what makes the start impossible, e.g.
    CartridgeTooLong, as the result does.
    """
    spec, tokenizer = attempt.spec, lm.tokenizer
    if spec.init == "version":
        kv_L2GPD = from_version(lm, await attempt.version(spec.init_version), spec.num_tokens)
        return lambda: asyncio.sleep(0, kv_L2GPD)
    if spec.init == "text":
        ids = await asyncio.to_thread(template.context, await attempt.document(spec.init_text))
        text = cut_context(ids, template.closing, spec.num_tokens)
        return lambda: asyncio.to_thread(lm.prefill, text)
    shares = share_tokens(spec.num_tokens, [len(context.ids) for context in contexts])
    most, seed = spec.reference_tokens, derive_seed(spec.seed, "references")
    shown = [
        await asyncio.to_thread(references, context.text, template, tokenizer, max_tokens=most, seed=seed)
        if spec.init == "compact"
        else []
        for context in contexts
    ]

    async def start() -> Tensor:
        stage, parts = f"start ({spec.init})", []
        for place, (context, num_tokens) in enumerate(zip(contexts, shares, strict=True)):
            await attempt.tell({"type": "progress", "stage": stage, "done": place, "total": len(contexts)})
            part = partial(_part, attempt, lm, template.closing, context.ids, num_tokens, shown[place])
            parts.append(await asyncio.to_thread(part))
        await attempt.tell({"type": "progress", "stage": stage, "done": len(contexts), "total": len(contexts)})
        return side_by_side(lm, parts)

    return start


def _part(
    attempt: Attempt,
    lm: FrozenLM,
    closing: Sequence[int],
    context: Sequence[int],
    num_tokens: int,
    shown: Sequence[Sequence[int]],
) -> Tensor:
    """Of one document."""
    spec, num_closing = attempt.spec, len(closing)
    if spec.init == "first_tokens":
        return lm.prefill(cut_context(context, closing, num_tokens))
    if spec.init == "random":
        return random_tokens(lm, context, num_closing, num_tokens, derive_seed(spec.seed, "init"))
    compaction = Compaction(num_tokens, num_first=1, num_last=num_closing, matching_steps=spec.matching_steps)
    return compact(lm, context, shown, compaction)
