"""One experiment of the study: a document, a cartridge's start, who answers, and for how many answer tokens."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from foundry.identity import ObjectiveKind

Start = Literal["compact", "first_tokens", "random"]
# What says which tokens `compact` keeps: the document recited, its sentences completed, the product's references of
# both kinds and blanks, or the model's own questions with its answers besides.
Shown = Literal["recite", "cloze", "both", "questions"]
Mode = Literal["off", "on", "hybrid"]
Asked = Literal["question", "cloze"]
_OF_THE_START = (
    *("document", "compression", "seed", "start", "refit", "sequential", "restore_mass", "matching_steps", "power"),
    *("shown", "reference_tokens"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Equal jobs do the same. What is not said is the product's recipe `standard`."""

    document: str
    # Document tokens for one of the cartridge: n / p.
    compression: int = 4
    seed: int = 0

    start: Start = "compact"
    refit: bool = True
    sequential: bool = True
    restore_mass: bool = True
    matching_steps: int = 200
    power: float = 2.0
    shown: Shown = "both"
    reference_tokens: int = 16384

    # Tokens of answers that are trained on; 0 measures the start alone.
    answer_tokens: int = 0
    mode: Mode = "hybrid"
    # Of the answer tokens of `hybrid`.
    off_policy_share: float = 0.95
    families: tuple[str, ...] = ("recite", "quote", "blank", "evidence", "question")
    # What the cartridge answers on-policy.
    asked: Asked = "question"
    num_questions: int = 256
    max_new_tokens: int = 48
    batch_size: int = 32
    general_share: float = 0.03

    objective: ObjectiveKind = "forward_kl"
    hard_label_weight: float = 0.5
    learning_rate: float = 0.014
    schedule: str = "cosine"
    warmup_steps: int = 5
    max_grad_norm: float = 1.0

    @property
    def id(self) -> str:
        """A digest of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Job:
        hashable: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**hashable)

    @property
    def start_alone(self) -> Job:
        """The job that has the same start and no training."""
        asks = ("num_questions",) if self.shown == "questions" else ()
        return Job(**{name: getattr(self, name) for name in (*_OF_THE_START, *asks)})

    @property
    def off_policy_tokens(self) -> int:
        share = {"on": 0.0, "off": 1.0, "hybrid": self.off_policy_share}[self.mode]
        return round(share * self.answer_tokens)

    def num_tokens(self, num_context_tokens: int) -> int:
        """Length of the cartridge."""
        return round(num_context_tokens / self.compression)


@dataclass(frozen=True, slots=True)
class Course:
    """What the product's curriculum and learning rates read of a run, where a job's length is in answer tokens."""

    job: Job
    num_steps: int

    @classmethod
    def of(cls, job: Job, mean_answer_tokens: float) -> Course:
        return cls(job, max(1, math.ceil(job.answer_tokens / (job.batch_size * mean_answer_tokens))))

    @property
    def num_off_policy_steps(self) -> int:
        return math.ceil(self.num_steps * self.job.off_policy_tokens / max(1, self.job.answer_tokens))

    @property
    def batch_size(self) -> int:
        return self.job.batch_size

    @property
    def samples_per_prompt(self) -> int:
        return 1

    @property
    def general_share(self) -> float:
        return self.job.general_share

    @property
    def seed(self) -> int:
        return self.job.seed

    @property
    def schedule(self) -> str:
        return self.job.schedule

    @property
    def warmup_steps(self) -> int:
        # Of a job of few steps no more than the recipes would have.
        return min(self.job.warmup_steps, self.num_steps // 4)

    def step_at(self, answer_tokens: int) -> int:
        """How far `answer_tokens` are on the way: answers vary in length, and the rate is to end where they do."""
        return min(self.num_steps, int(self.num_steps * answer_tokens / self.job.answer_tokens))
