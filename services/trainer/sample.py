"""What is trained on, and the signs that it degenerates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from foundry.rpc.rollout import Answer, Prompt
from foundry.store import CartridgeId


@dataclass(frozen=True, slots=True)
class Sample:
    """A turn and its answer. `digest` names what it was decoded with: the policy's bytes, or the document's tokens."""

    turn_ids: Sequence[int]
    answer_ids: Sequence[int]
    # Of the answer's tokens, as the rollout server computed them: untempered, natural log. None if it is no policy's.
    rollout_logprobs: Sequence[float]
    digest: str
    version: int
    truncated: bool
    # Address of the rollout server that answered, and the prompt's place: whom to look at when the proof fails.
    server: str = ""
    place: str = ""

    @classmethod
    def of(cls, prompt: Prompt, answer: Answer, policy: CartridgeId) -> Sample:
        """`answer` is what the policy gave to `prompt`."""
        return cls(
            prompt.ids,
            answer.ids,
            answer.logprobs,
            policy.digest,
            policy.version,
            answer.truncated,
            server=answer.server,
            place=prompt.place,
        )

    @property
    def ids(self) -> list[int]:
        return [*self.turn_ids, *self.answer_ids]

    @property
    def score_from(self) -> int:
        return len(self.turn_ids)


@dataclass(frozen=True, slots=True)
class Guards:
    """Signs that answers degenerate: shares are of samples, lengths in tokens."""

    truncated: float
    mean_length: float
    # Share of 4-grams that occurred before in the same answer.
    repetition: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Guards:
        lengths = [len(sample.answer_ids) for sample in samples]
        return cls(
            truncated=sum(sample.truncated for sample in samples) / len(samples),
            mean_length=sum(lengths) / len(lengths),
            repetition=sum(_repetition(sample.answer_ids) for sample in samples) / len(samples),
        )


def _repetition(ids: Sequence[int]) -> float:
    grams = Counter(tuple(ids[start : start + 4]) for start in range(len(ids) - 3))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0
