"""What a job's cartridge holds before the first step: the product's starts, and what `compact` is when parts of it are
left out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.study.job import Job
from benchmarks.study.teacher import Teacher
from foundry.model.attention.compacting import Compaction
from foundry.model.initialise import compact, cut_context, random_tokens
from foundry.seeds import derive_seed
from foundry.selfstudy.passages import cloze, evenly, recite
from foundry.selfstudy.references import references
from services.trainer.data.conversation import Conversation

# Of one kind alone; the product's references have recitations of this length too.
_RECITED_TOKENS, _CLOZE_CUTS = 40, 4


def start_kv(teacher: Teacher, job: Job, questions: Sequence[Conversation]) -> Tensor:
    """KV [L, 2, G, P, D]. `questions` are the model's own with its answers, for references that want them."""
    lm, context, closing = teacher.lm, teacher.context_ids, teacher.template.closing
    num_tokens = job.num_tokens(len(context))
    if job.start == "first_tokens":
        return lm.prefill(cut_context(context, closing, num_tokens))
    if job.start == "random":
        return random_tokens(lm, context, len(closing), num_tokens, derive_seed(job.seed, "init"))
    compaction = Compaction(
        *(num_tokens, 1, len(closing)),
        power=job.power,
        sequential=job.sequential,
        refit=job.refit,
        restore_mass=job.restore_mass,
        matching_steps=job.matching_steps,
    )
    return compact(lm, context, _references(teacher, job, questions), compaction)


def _references(teacher: Teacher, job: Job, questions: Sequence[Conversation]) -> list[list[int]]:
    """Turns with their answers, at most `reference_tokens` in all."""
    text, tokenizer = teacher.document.text, teacher.lm.tokenizer
    seed = derive_seed(job.seed, "references")
    if job.shown in ("both", "questions"):
        asked = _fitting([[*each.turn_ids, *each.answer_ids] for each in questions], job.reference_tokens // 2)
        room = job.reference_tokens - sum(map(len, asked))
        return [*references(text, teacher.template, tokenizer, max_tokens=room, seed=seed), *asked]
    exercises = (
        recite(text, tokenizer, _RECITED_TOKENS) if job.shown == "recite" else cloze(text, tokenizer, _CLOZE_CUTS, seed)
    )
    sequences = [
        [*teacher.turn(each.prompt), *tokenizer(each.answer, add_special_tokens=False)["input_ids"]]
        for each in exercises
    ]
    return _fitting(sequences, job.reference_tokens)


def _fitting(sequences: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """All, or evenly as many as fit on average."""
    total = max(1, sum(map(len, sequences)))
    return evenly(sequences, min(len(sequences), len(sequences) * max_tokens // total))
