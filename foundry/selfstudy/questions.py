"""Self-study: the base model reads passages of the document and writes questions about them.

The idea of seeds over passages is that of Eyuboglu et al., https://arxiv.org/abs/2506.06266, section 4.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from foundry.model.template import ChatTemplate
from foundry.rpc.answers import Answer, Prompt
from foundry.seeds import derive_seed
from foundry.selfstudy.passages import num_tokens, pieces

# Passages of one sentence or two: what is asked about one is answered by all of it, the document's own words.
EVIDENCE_TOKENS = 24
# Of the document, for each question of this kind: each passage is asked for about four times.
TOKENS_FOR_EVIDENCE = 6
MAX_EVIDENCE_QUESTION_TOKENS = 48

# What the base model is shown first: a text that has nothing to do with any document, and questions about it. Small
# models write questions by example far better than by instruction.
EXAMPLE_TEXT = (
    "The bakery in Port Lune opens at six. The baker is Tom Reed, and his oven is painted green. "
    "The oven bakes 40 loaves an hour. Never open the oven while it sings, because the bread would fall. "
    "To light the oven, fill it with beech wood and close both doors."
)


@dataclass(frozen=True, slots=True)
class Seed:
    """A kind of question, what asks for one, and the one that the example text is asked."""

    kind: str
    request: str
    example: str


SEEDS = (
    Seed("number", "Write one question about a number in the text.", "How many loaves does the oven bake in an hour?"),
    Seed("name", "Write one question about a name in the text.", "Who is the baker in Port Lune?"),
    Seed("fact", "Write one question about a thing in the text.", "What is the colour of the oven of the bakery?"),
    Seed(
        "reason", "Write one question about a reason in the text.", "Why must the oven never be opened while it sings?"
    ),
    Seed("procedure", "Write one question about how something is done.", "How is the oven of the bakery lit?"),
    Seed("use case", "Write one question of a person who needs the text.", "When can I buy bread in Port Lune?"),
    Seed("overview", "Write one request to describe something in the text.", "Describe the oven of the bakery."),
)


@dataclass(frozen=True, slots=True)
class StudyQuestion:
    """What the model asked, of which kind, and the passage it had before it, which has `passage_tokens`."""

    prompt: str
    kind: str
    passage: int
    passage_tokens: int


Answerer = Callable[[Sequence[Prompt]], Awaitable[list[Answer]]]


class Questioner:
    """Asks about a document: each passage as often as its share of the tokens says, for `num_questions` in all."""

    def __init__(
        self,
        document: str,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_questions: int,
        passage_tokens: int,
        seed: int,
        max_request_tokens: int | None = None,
    ) -> None:
        """Requests of more than `max_request_tokens` are not made."""
        self.passages = pieces(document, tokenizer, passage_tokens)
        self._lengths = [num_tokens(passage, tokenizer) for passage in self.passages]
        self._ends = list(accumulate(self._lengths))
        self._template, self._num_questions, self._seed = template, num_questions, seed
        self._max_request_tokens = max_request_tokens
        # A small model repeats itself; a hopeless one must not be asked for ever.
        self.max_tries = 2 * num_questions + len(self.passages)

    async def ask(self, tries: range, answer: Answerer) -> list[StudyQuestion]:
        """What the base model writes at these tries, of which some may come to nothing; `answer` has it answer."""
        places = [self._place(each) for each in tries]
        seeds = [SEEDS[(each + each // self._num_questions) % len(SEEDS)] for each in tries]
        requests = [self._request(*each) for each in zip(tries, places, seeds, strict=True)]
        made = [each for each in zip(requests, places, seeds, strict=True) if self._may_be_made(each[0])]
        answers = await answer([request for request, _, _ in made]) if made else []
        return [
            StudyQuestion(question, seed.kind, place, self._lengths[place])
            for written, (_, place, seed) in zip(answers, made, strict=True)
            if (question := _clean(written.text))
        ]

    def _place(self, number: int) -> int:
        """Numbers are spread evenly over the tokens, so that neighbours share a passage, whose KV is reused."""
        token = (number % self._num_questions + 0.5) / self._num_questions * self._ends[-1]
        return bisect_right(self._ends[:-1], token)

    def _may_be_made(self, request: Prompt) -> bool:
        return self._max_request_tokens is None or len(request.ids) <= self._max_request_tokens

    def _request(self, number: int, place: int, seed: Seed) -> Prompt:
        # All share the examples.
        messages = [{"role": "user", "content": f"Text: {self.passages[place]}\n\n{seed.request}"}]
        return Prompt(self._template.prompt([*_examples(), *messages]), derive_seed(self._seed, "selfstudy", number))


def _examples() -> list[dict[str, str]]:
    messages = []
    for seed in SEEDS:
        messages.append({"role": "user", "content": seed.request})
        messages.append({"role": "assistant", "content": seed.example})
    messages[0]["content"] = f"Text: {EXAMPLE_TEXT}\n\n{SEEDS[0].request}"
    return messages


def _clean(text: str) -> str:
    line = text.strip().splitlines()[0].strip().strip('"*') if text.strip() else ""
    return line if len(line.split()) >= 3 else ""
