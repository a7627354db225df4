"""A workload, and what `foundry.sizing.estimator` says that it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Bound = Literal["memory", "bandwidth", "FLOP/s", "host"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Requests, spread evenly over documents."""

    num_documents: int = 100
    document_tokens: int = 12_000
    cartridge_tokens: int = 2048
    requests_per_second: float = 1.0
    prompt_tokens: int = 128
    answer_tokens: int = 256
    user_tokens_per_second: float = 10.0
    """What each user must get while answers of others are decoded beside theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Runs at the same time, each on-policy for one document."""

    num_runs: int = 1
    batch_size: int = 32
    turn_tokens: int = 128
    answer_tokens: int = 512
    num_steps: int = 500

    @property
    def sample_tokens(self) -> int:
        return self.turn_tokens + self.answer_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """What the store keeps for each name."""

    keep_hot: int = 4
    durable_versions: int = 10


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of one decode step, by what they are spent on."""

    bandwidth: float
    flops: float
    host: float

    @property
    def seconds(self) -> float:
        return self.bandwidth + self.flops + self.host

    @property
    def bound_by(self) -> Bound:
        parts: dict[Bound, float] = {"bandwidth": self.bandwidth, "FLOP/s": self.flops, "host": self.host}
        return max(parts, key=parts.__getitem__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """GPUs of one service, and why not fewer. `load` is the share of their time that the workload takes."""

    gpus: int
    load: float
    bound_by: Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout(Fleet):
    batch: int
    """Sequences that one replica may decode at once: so many that memory holds them and users get their speed."""
    step_seconds: float
    tokens_per_second: float
    prefill_seconds: float
    requests_per_second: float
    """Capacity of one replica, before `foundry.sizing.estimator.UTILISATION`."""
    resident_cartridges: int
    """Of one replica, beside a full batch; what does not fit comes from host memory, or the store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher(Fleet):
    document_seconds: float
    score_seconds: float
    resident_documents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer(Fleet):
    rollout_seconds: float
    update_seconds: float
    step_seconds: float
    """Rollout, teacher, update and version, one after the other."""
    run_hours: float
    memory_bytes: float
    micro_batch_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Store:
    redis_bytes: float
    objects_bytes: float
    version_seconds: float
    """One version over the network once, at `foundry.sizing.estimator.LINK_GBIT_PER_S`."""
    network_bytes_per_version: float
    """The trainer publishes it once and every rollout replica fetches it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizing:
    cartridge_bytes: int
    kv_bytes_per_token: int
    document_kv_bytes: int
    weight_bytes: int
    rollout: Rollout
    teacher: Teacher | None
    trainer: Trainer | None
    store: Store

    @property
    def gpus(self) -> int:
        return sum(fleet.gpus for fleet in (self.rollout, self.teacher, self.trainer) if fleet is not None)
