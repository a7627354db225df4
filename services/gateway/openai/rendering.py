"""An answer in OpenAI's words."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel

from services.gateway.openai.answers import PromptLogprob, PromptLogprobs
from services.gateway.openai.generation import Choice, Chunk, Generation
from services.gateway.openai.tokens import TokenSpelling, finite


class Renderer(ABC):
    """Chat and text completions share all but the words for a choice, for a part of one, and for logprobs.

    `shared` is what every choice has: `index`, `logprobs`, `finish_reason`, `token_ids`.
    """

    body: ClassVar[type[BaseModel]]
    chunk_body: ClassVar[type[BaseModel]]
    # Whether a choice of a stream begins with a chunk of its own, without content.
    opens: ClassVar[bool]
    # Whether text of one part may come with the next.
    withholds = False
    # What a whole answer's `system_fingerprint` is instead, where a client has more written there.
    pack: Callable[[Sequence[Choice]], str] | None = None

    def __init__(self, generation: Generation, spelling: TokenSpelling) -> None:
        self.generation = generation
        self.spelling = spelling
        self._begun: set[int] = set()

    @abstractmethod
    def choice(self, choice: Choice, shared: dict[str, Any]) -> BaseModel: ...

    @abstractmethod
    def delta_choice(self, part: Choice, shared: dict[str, Any], *, first: bool) -> BaseModel:
        """A part that says why the choice ends has nothing else."""

    @abstractmethod
    def logprobs(self, part: Choice) -> BaseModel: ...

    def whole(self, choices: Sequence[Choice]) -> BaseModel:
        rendered = [self.choice(choice, self._shared(index, choice)) for index, choice in enumerate(choices)]
        body = self._body(self.body, rendered, usage=self.generation.usage(), foundry=self.generation.info())
        return body if self.pack is None else body.model_copy(update={"system_fingerprint": self.pack(choices)})

    def deltas(self, index: int, chunk: Chunk) -> Iterator[BaseModel]:
        """As OpenAI sends them: content, and then, apart from it, why it ends."""
        asked, part = self.generation.asked, Choice(echo=self.generation.echo(index))
        part.add(chunk)
        if index in self._begun:
            part.echo = ""
        reason, part.finish_reason = part.finish_reason, None
        part.is_last = reason is not None
        if self.opens and index not in self._begun:
            yield self._delta(index, Choice(), num_to_come=len(part.ids))
        # An end token is no text, and its logprob was perhaps not asked for.
        if (
            part.echo
            or part.text
            or self.withholds
            or reason is None
            or asked.num_logprobs is not None
            or asked.return_token_ids
        ):
            yield self._delta(index, part)
        if reason is not None:
            yield self._delta(index, Choice(finish_reason=reason))

    def _delta(self, index: int, part: Choice, *, num_to_come: int = 0) -> BaseModel:
        """`num_to_come` tokens have arrived and are not in the chunks so far."""
        first = index not in self._begun
        self._begun.add(index)
        rendered = self.delta_choice(part, self._shared(index, part), first=first)
        options = self.generation.asked.stream_options
        usage = (
            self.generation.usage_so_far(num_to_come)
            if options is not None and options.continuous_usage_stats
            else None
        )
        return self._body(self.chunk_body, [rendered], foundry=self.generation.info() if first else None, usage=usage)

    def last(self) -> BaseModel:
        """The chunk that carries the usage."""
        return self._body(self.chunk_body, [], usage=self.generation.usage(), foundry=self.generation.info())

    def _shared(self, index: int, part: Choice) -> dict[str, Any]:
        asked = self.generation.asked
        return {
            "index": index,
            "logprobs": self.logprobs(part)
            if asked.num_logprobs is not None and asked.spells_logprobs and (part.ids or part.prompt_logprobs.ids)
            else None,
            "finish_reason": part.finish_reason,
            "token_ids": part.ids if asked.return_token_ids and part.ids else None,
        }

    def prompt_logprobs(self, part: Choice) -> PromptLogprobs | None:
        """vLLM's form: nothing for the first token, then the token and the alternatives, by their ids."""
        wanted, scores = self.generation.asked.prompt_logprobs, part.prompt_logprobs
        if wanted is None or not scores.ids:
            return None
        # There may be more of them, for `logprobs`.
        num = len(scores.top_ids) // len(scores.ids)
        rendered: PromptLogprobs = [None]
        for place in range(1, len(scores.ids)):
            top = slice(place * num, place * num + wanted)
            ranked = enumerate(zip(scores.top_ids[top], scores.top_logprobs[top], strict=True), start=1)
            found = {str(token): self._prompt_logprob(token, logprob, rank) for rank, (token, logprob) in ranked}
            token = scores.ids[place]
            own = self._prompt_logprob(token, scores.logprobs[place], scores.ranks[place])
            rendered.append({str(token): own} | found)
        return rendered

    def _prompt_logprob(self, token_id: int, logprob: float, rank: int) -> PromptLogprob:
        return PromptLogprob(logprob=finite(logprob), rank=rank, decoded_token=self.spelling.spell(token_id)[0])

    def _body(self, kind: type[BaseModel], choices: Sequence[BaseModel], **rest: Any) -> BaseModel:
        generation = self.generation
        return kind(
            id=generation.id,
            created=generation.created,
            model=generation.asked.model,
            system_fingerprint=f"fp_{generation.target.model.fingerprint.removeprefix('blake3:')[:12]}",
            choices=choices,
            **rest,
        )
