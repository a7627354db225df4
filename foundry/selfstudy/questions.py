"""Self-study: the base model reads chunks of the document and writes the prompts that the cartridge will train on.

The idea of seeds over chunks is that of Eyuboglu et al., https://arxiv.org/abs/2506.06266, section 4.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from transformers import PreTrainedTokenizerBase

from foundry.errors import InvalidArgument
from foundry.model.template import ChatTemplate
from foundry.rpc.rollout import Answer, Prompt
from foundry.seeds import derive_seed
from foundry.selfstudy.passages import pieces

# What the base model is shown first: a text that has nothing to do with any document, and questions about it. Small
# models write questions by example far better than by instruction.
EXAMPLE_TEXT = (
    "The bakery in Port Lune opens at six. The baker is Tom Reed, and his oven is painted green. "
    "The oven bakes 40 loaves an hour. Never open the oven while it sings."
)
# Each asks for a question of another kind: numbers, names, things, procedures, overviews.
SEEDS = (
    ("Write one question about a number in the text.", "How many loaves does the oven bake in an hour?"),
    ("Write one question about a name in the text.", "Who is the baker in Port Lune?"),
    ("Write one question about a thing in the text.", "What is the colour of the oven of the bakery?"),
    ("Write one question about a rule in the text.", "What must never be done while the oven sings?"),
    ("Write one question about a time or a place in the text.", "When does the bakery in Port Lune open?"),
    ("Write one request to describe something in the text.", "Describe the oven of the bakery."),
)
# Asked of the base model in one call at the most.
ROUND = 32

Ask = Callable[[Sequence[Prompt]], Awaitable[list[Answer]]]


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
    chunks = pieces(document, tokenizer, chunk_tokens)
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
    # All share the examples and neighbours share a chunk: the rollout server reuses their KV.
    visit, within = divmod(number, per_chunk)
    again, place = divmod(visit, len(chunks))
    seed_request, _ = SEEDS[(again * per_chunk + within + place) % len(SEEDS)]
    messages = [{"role": "user", "content": f"Text: {chunks[place]}\n\n{seed_request}"}]
    return Prompt(template.prompt([*_examples(), *messages]), derive_seed(seed, "selfstudy", number))


def _examples() -> list[dict[str, str]]:
    messages = []
    for request, question in SEEDS:
        messages.append({"role": "user", "content": request})
        messages.append({"role": "assistant", "content": question})
    messages[0]["content"] = f"Text: {EXAMPLE_TEXT}\n\n{SEEDS[0][0]}"
    return messages


def _clean(text: str) -> str:
    line = text.strip().splitlines()[0].strip().strip('"*') if text.strip() else ""
    return line if len(line.split()) >= 3 else ""
