"""Self-study: the base model reads chunks of the document and writes the prompts that the cartridge will train on.

The idea of seeds over chunks is that of Eyuboglu et al., https://arxiv.org/abs/2506.06266, section 4.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from transformers import PreTrainedTokenizerBase

from foundry.errors import InvalidArgument
from foundry.template import ChatTemplate
from services.trainer.rollouts import Answer, Prompt
from services.trainer.sample import derive_seed

# Each asks for a question of another kind, so that prompts cover facts, numbers, procedures and overviews.
SEEDS = (
    "Write one short question about a fact in the text above. Write only the question.",
    "Write one question that starts with 'What' and that the text above answers. Write only the question.",
    "Write one question about a number in the text above. Write only the question.",
    "Write one question about a name or a place in the text above. Write only the question.",
    "Write one question that starts with 'How' and that the text above answers. Write only the question.",
    "Write one question about a rule or a warning in the text above. Write only the question.",
    "Write one request to explain a part of the text above. Write only the request.",
    "Write one question that starts with 'Which' or 'Who' and that the text above answers. Write only the question.",
)
# Asked of the base model in one call at the most.
ROUND = 32

Ask = Callable[[Sequence[Prompt]], Awaitable[list[Answer]]]


def chunk_document(document: str, tokenizer: PreTrainedTokenizerBase, chunk_tokens: int) -> list[str]:
    """The document in consecutive pieces of about `chunk_tokens`, cut between lines where it can be."""
    chunks: list[str] = []
    lines: list[str] = []
    num_tokens = 0
    for line in document.splitlines(keepends=True):
        ids = tokenizer(line, add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), chunk_tokens):
            piece = ids[start : start + chunk_tokens]
            if lines and num_tokens + len(piece) > chunk_tokens:
                chunks.append("".join(lines))
                lines, num_tokens = [], 0
            lines.append(line if len(piece) == len(ids) else str(tokenizer.decode(piece)))
            num_tokens += len(piece)
    return [chunk for chunk in [*chunks, "".join(lines)] if chunk.strip()]


async def write_prompts(
    document: str,
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    ask: Ask,
    *,
    num_prompts: int,
    chunk_tokens: int,
    seed: int,
    progress: Callable[[int], Awaitable[None]],
) -> list[str]:
    """`num_prompts` different questions about the document, every chunk asked about as often as the others.

    `ask` has the base model answer prompts. Raises InvalidArgument if it does not find enough different ones.
    """
    chunks = chunk_document(document, tokenizer, chunk_tokens)
    per_chunk = -(-num_prompts // len(chunks))
    questions: dict[str, None] = {}
    # Twice as many tries as prompts: a small model repeats itself, a hopeless one must not loop for ever.
    for begin in range(0, 2 * num_prompts + len(chunks), ROUND):
        wanted = min(ROUND, num_prompts - len(questions))
        answers = await ask(
            [_request(template, chunks, per_chunk, number, seed) for number in range(begin, begin + wanted)]
        )
        questions |= {question: None for answer in answers if (question := _clean(answer.text))}
        await progress(len(questions))
        if len(questions) >= num_prompts:
            return list(questions)
    raise InvalidArgument(
        f"the base model wrote {len(questions)} different questions about the document, {num_prompts} were asked for: "
        "ask for fewer, or bring a prompts file",
        field="prompts.num_prompts",
    )


def _request(template: ChatTemplate, chunks: Sequence[str], per_chunk: int, number: int, seed: int) -> Prompt:
    # Neighbours share a chunk, whose KV the rollout server then reuses; a chunk asked again gets the seeds after.
    visit, within = divmod(number, per_chunk)
    again, place = divmod(visit, len(chunks))
    messages = [
        {"role": "system", "content": chunks[place]},
        {"role": "user", "content": SEEDS[(again * per_chunk + within + place) % len(SEEDS)]},
    ]
    return Prompt(template.prompt(messages), derive_seed(seed, "selfstudy", number))


def _clean(text: str) -> str:
    line = text.strip().splitlines()[0].strip().strip('"*') if text.strip() else ""
    return line if len(line.split()) >= 3 else ""
