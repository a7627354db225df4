"""What a run is when little is said of it: length, data, steps and rates, chosen from the document's length.

Why these values: docs/training.md.
"""

from __future__ import annotations

from typing import Any

from foundry.errors import InvalidArgument
from foundry.store.spec import DocumentPrompts, RunRequest, RunSpec, SelfStudyPrompts

# Of the document: at a quarter most of what the model can say with the document before it is kept.
COMPRESSION = 4.0
_MIN_TOKENS = 16
# Times the recipe's, of shorter cartridges than `COMPRESSION` has.
_HIGHEST_RATE = 2.0
# A short document is not worth more questions, and a small model does not find more.
_TOKENS_FOR_A_QUESTION = 8
_COMMON = {
    "mode": "hybrid",
    "learning_rate": 0.014,
    "schedule": "cosine",
    "general_share": 0.03,
    "max_grad_norm": 1.0,
}
_RECIPES: dict[str, dict[str, Any]] = {
    # Minutes on two cores.
    "quick": {
        "off_policy_share": 0.97,
        "reference_tokens": 6144,
        "matching_steps": 100,
        "families": ("recite", "quote", "blank", "evidence"),
        "batch_size": 16,
        "learning_rate": 0.007,
        "hard_label_weight": 0.15,
        "max_new_tokens": 40,
        "prompts": SelfStudyPrompts(num_prompts=32, max_prompt_tokens=48),
        "warmup_steps": 2,
    },
    # The best that was measured for its cost on a GPU.
    "standard": {
        "off_policy_share": 0.95,
        "families": ("recite", "quote", "blank", "evidence", "question"),
        "hard_label_weight": 0.5,
        "batch_size": 32,
        "max_new_tokens": 48,
        "prompts": SelfStudyPrompts(num_prompts=256),
        "warmup_steps": 5,
    },
    "thorough": {
        "off_policy_share": 0.9,
        "families": ("recite", "quote", "blank", "evidence", "question", "summary"),
        "hard_label_weight": 0.5,
        "batch_size": 32,
        "max_new_tokens": 64,
        "prompts": SelfStudyPrompts(num_prompts=512),
        "warmup_steps": 10,
    },
}
# Steps for each thousand tokens of the document, at least and at most.
_STEPS = {"quick": (20.0, 20, 140), "standard": (150.0, 80, 2000), "thorough": (300.0, 160, 4000)}


def choose(request: RunRequest, num_context_tokens: int | None) -> RunSpec:
    """The run, with what was not asked for as the recipe has it.

    `num_context_tokens` are the document's with its template. Raises InvalidArgument if they are not known and what
    depends on them was not asked for.
    """
    asked = {name: getattr(request, name) for name in request.model_fields_set & RunSpec.model_fields.keys()}
    # A document that comes as text is named by it.
    values = {**_COMMON, **_RECIPES[request.recipe], **asked, "document": request.document}
    if isinstance(request.prompts, DocumentPrompts) and "families" not in asked:
        # What somebody thought of is worth learning.
        values["families"] = tuple(dict.fromkeys((*values["families"], "question")))
    if missing := [name for name in ("num_tokens", "num_steps") if name not in asked]:
        if num_context_tokens is None:
            raise InvalidArgument(
                f"{' and '.join(missing)} would follow from the document's length, which is not known while no teacher "
                "answers: give them, or ask again",
                field=missing[0],
            )
        values = {
            "num_tokens": _num_tokens(request, num_context_tokens),
            "num_steps": _num_steps(request.recipe, num_context_tokens),
            **values,
        }
    if "learning_rate" not in asked and num_context_tokens is not None:
        # What holds more of the document is nearer to it from the start, and too large steps lead away.
        ratio = max(1.0, num_context_tokens / values["num_tokens"])
        share = min(_HIGHEST_RATE, ratio / COMPRESSION)
        values["learning_rate"] = round(values["learning_rate"] * share, 4)
    if "prompts" not in asked and num_context_tokens is not None:
        prompts: SelfStudyPrompts = values["prompts"]
        num_prompts = min(prompts.num_prompts, max(4, num_context_tokens // _TOKENS_FOR_A_QUESTION))
        values["prompts"] = prompts.model_copy(update={"num_prompts": num_prompts})
    values.setdefault("heldout_every", max(1, values["num_steps"] // 3))
    values["warmup_steps"] = asked.get("warmup_steps", min(values["warmup_steps"], values["num_steps"] // 4))
    return RunSpec(**values)


def describe(spec: RunSpec, recipe: str, num_context_tokens: int) -> list[str]:
    """Two lines: what was chosen, and why."""
    size, off = spec.batch_size * spec.samples_per_prompt, spec.num_off_policy_steps
    ratio, density = num_context_tokens / spec.num_tokens, 100 * spec.num_steps * size / num_context_tokens
    length = (
        f"{spec.num_tokens} tokens stand in for {num_context_tokens}, {ratio:.1f} to 1; "
        f"{COMPRESSION:.0f} to 1 keeps most of what the model can answer with the document"
    )
    if not spec.num_steps:
        return [length, f"recipe {recipe}, no steps: the start is published as it is"]
    return [
        length,
        f"recipe {recipe}: {spec.num_steps} steps of {size} answers, {density:.0f} for every 100 tokens; "
        f"{off} steps on written answers, then {spec.num_steps - off} on its own",
    ]


def _num_tokens(request: RunRequest, num_context_tokens: int) -> int:
    wanted = max(_MIN_TOKENS, round(num_context_tokens / (request.compression or COMPRESSION)))
    return min(wanted, num_context_tokens)


def _num_steps(recipe: str, num_context_tokens: int) -> int:
    per_thousand, least, most = _STEPS[recipe]
    return min(most, max(least, round(per_thousand * num_context_tokens / 1000)))
