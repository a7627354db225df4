"""What the demo model knows of the study's documents: python -m benchmarks.study.answerable

Asks every question of documents/NAME.questions.jsonl twice: behind the whole document as the system message, and with
no document at all. Ids, decoding (greedy, at most 24 new tokens) and answers are those of the product: the document's
KV is loaded into the built-in engine as a cartridge that nobody has trained. An answer is right if any of the expected
strings occurs in it, whatever the case.

A question is of use to the study if the document makes the difference: right with it, not right without.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.document import ANSWERABLE, DOCUMENTS, MAX_NEW_TOKENS, Question, every_document, read_questions
from foundry.local.demo_model import demo_model_directory
from foundry.model.cartridge import Cartridge
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from foundry.settings import ModelSettings
from services.rollout.engine import SamplingParams, SequenceRequest
from services.rollout.engine.torch.engine import TorchEngine

MAX_SEQUENCES, MAX_SEQUENCE_TOKENS = 32, 256


def as_cartridge(lm: FrozenLM, context: Sequence[int]) -> Cartridge:
    """The context's own KV, every token of it."""
    return Cartridge(lm.spec.header(len(context), 1, lm.dtype), lm.prefill(context))


def answers(lm: FrozenLM, prompts: Sequence[Sequence[int]], cartridge: Cartridge | None) -> list[str]:
    engine = TorchEngine(
        lm, max_sequences=MAX_SEQUENCES, max_sequence_tokens=MAX_SEQUENCE_TOKENS, prefill_tokens_per_step=1024
    )
    digests: tuple[str, ...] = ()
    if cartridge is not None:
        digests = ("document",)
        engine.load("document", cartridge)
    sampling = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, temperature=0.0)
    engine.admit({index: SequenceRequest(tuple(ids), digests, sampling) for index, ids in enumerate(prompts)})
    texts = [""] * len(prompts)
    while (stats := engine.stats()).num_running or stats.num_waiting:
        for output in engine.step():
            texts[output.sequence_id] += output.text
    return [text.strip() for text in texts]


def examine(lm: FrozenLM, template: ChatTemplate, document: str, questions: Sequence[Question]) -> dict[str, Any]:
    context = template.context(document, max_tokens=lm.spec.max_tokens)
    behind = answers(lm, [template.turn(each.messages) for each in questions], as_cartridge(lm, context))
    alone = answers(lm, [template.prompt(each.messages) for each in questions], None)
    rows = [
        {
            "question": question.text,
            "right_with_document": question.is_right(with_document),
            "right_without": question.is_right(without),
            "answer_with_document": with_document,
            "answer_without": without,
        }
        for question, with_document, without in zip(questions, behind, alone, strict=True)
    ]
    return {
        "context_tokens": len(context),
        "num_questions": len(rows),
        "num_right_with_document": sum(bool(row["right_with_document"]) for row in rows),
        "num_right_without": sum(bool(row["right_without"]) for row in rows),
        "questions": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--documents", nargs="+", choices=sorted(every_document()), help="only these, and write no result"
    )
    parser.add_argument("--result", type=Path, default=ANSWERABLE)
    arguments = parser.parse_args()
    lm = FrozenLM.load(demo_model_directory(), device=arguments.device)
    template = ChatTemplate(lm.tokenizer, ModelSettings.model_fields["template_clock"].default)
    result = {}
    for name, path in every_document().items():
        if arguments.documents and name not in arguments.documents:
            continue
        found = examine(lm, template, path.read_text(), read_questions(DOCUMENTS / f"{name}.questions.jsonl"))
        for row in found["questions"]:
            marks = "".join("+" if row[key] else "-" for key in ("right_with_document", "right_without"))
            print(f"{marks}  {row['question']}  {row['answer_with_document']!r}")
        print(
            f"{name}: {found['context_tokens']} tokens, {found['num_questions']} questions, right "
            f"{found['num_right_with_document']} with the document and {found['num_right_without']} without"
        )
        result[name] = found
    if not arguments.documents:
        arguments.result.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
