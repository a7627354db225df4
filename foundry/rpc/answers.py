"""What the rollout service is asked and what comes back. No gRPC in here: whoever decodes by itself says it so too."""

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
    # One per id, natural log, untempered.
    logprobs: Sequence[float]
    text: str
    truncated: bool
    # Address of the rollout server, of the pod where a name stands for several.
    server: str = ""
