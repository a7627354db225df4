"""What is asked of rollout servers, and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, to a policy or to the plain model."""

    ids: Sequence[int]
    seed: int
    # Where in the run it is asked, for people to read.
    place: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a rollout server returned for one prompt."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    text: str
    truncated: bool
    # Address of the rollout server, of the pod where a name stands for several.
    server: str = ""
