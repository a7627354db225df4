"""What the API answers, as types: the JSON itself, so that nothing is lost that a newer gateway adds.

`docs/runs.md` says what the fields of a run mean.
"""

from __future__ import annotations

from typing import Any, Required, TypedDict


class ModelJson(TypedDict):
    id: str
    object: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class DocumentJson(TypedDict):
    object: str
    digest: str
    title: str
    num_bytes: int
    created_at: str


class HeaderJson(TypedDict):
    """What a version's bytes are, besides themselves."""

    model_fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    num_frozen: int
    dtype: str
    rope: dict[str, Any]
    position_offset: int
    format: str


class VersionJson(TypedDict, total=False):
    """A version's manifest; `durable` where versions are listed."""

    object: Required[str]
    name: Required[str]
    version: Required[int]
    digest: Required[str]
    header: Required[HeaderJson]
    run: Required[str]
    attempt: Required[int]
    step: Required[int]
    parent: Required[str | None]
    document: Required[str | None]
    init: Required[str]
    objective: Required[str]
    tokens_seen: Required[int]
    metrics: Required[dict[str, float]]
    created_at: Required[str]
    durable: bool


class AncestorJson(TypedDict):
    """`version` is None where the parent's number is not known any more."""

    digest: str
    version: int | None


class CartridgeJson(TypedDict, total=False):
    """The last three are in the answer about one cartridge, and not where they are listed."""

    object: Required[str]
    name: Required[str]
    tags: Required[dict[str, int]]
    version: Required[VersionJson]
    lineage: list[AncestorJson]
    durable: bool
    hot: bool


class TagJson(TypedDict, total=False):
    """`previous` after a move; `history`, newest first, where it was asked for."""

    object: Required[str]
    name: Required[str]
    tag: Required[str]
    version: Required[int]
    previous: int | None
    history: list[int]


class GrantJson(TypedDict):
    object: str
    name: str
    tenant: str
    granted_at: str


class RunJson(TypedDict, total=False):
    id: Required[str]
    object: Required[str]
    spec: Required[dict[str, Any]]
    tenant: str
    state: Required[str]
    attempt: Required[int]
    desired: Required[str]
    worker: Required[str]
    waiting_for: Required[str]
    created_at: Required[str]
    started_at: Required[str | None]
    finished_at: Required[str | None]
    error: Required[str | None]
    result: Required[dict[str, Any] | None]
    last_event: Required[dict[str, Any] | None]
    job: Required[str | None]
    chosen: Required[list[str] | None]


class DatasetJson(TypedDict):
    """A run's data set. `families` counts conversations, `parts` are what its shards are of, in their order."""

    object: str
    dataset: str
    digest: str
    model_fingerprint: str
    families: dict[str, dict[str, float]]
    parts: list[str]


class DatasetRowJson(TypedDict):
    """A conversation of a data set. `answer` is None where nobody answered, or whose tokens they are is not known."""

    part: str
    family: str
    kind: str
    prompt: str
    answer: str | None
    author: str
    turn_ids: list[int]
    answer_ids: list[int]
    logprobs: list[float]
    truncated: bool
    context: str
    passage: int
    passage_tokens: int


class EventJson(TypedDict, total=False):
    """What happens in a run. `type` says which fields there are: `state`, `progress`, `dataset`, `heldout`, `step`,
    `finished`, and others of newer gateways."""

    id: Required[str]
    type: Required[str]
    # state, finished
    state: str
    waiting_for: str
    error: str | None
    result: dict[str, Any] | None
    # progress
    stage: str
    done: int
    total: int
    # dataset
    families: dict[str, dict[str, float]]
    # heldout
    kl: float
    nll: float
    num_tokens: int
    general_kl: float | None
    tokens_seen: int
    best_step: int | None
    # step, and heldout's number of it
    step: int
    attempt: int
    num_steps: int
    objective: str
    loss: float
    policy_mismatch_kl: float | None
    policy_mismatch_max: float | None
    policy_mismatch_by_server: dict[str, dict[str, float]]
    grad_norm: float
    entropy: float
    tokens: int
    mean_length: float
    truncated: float
    repetition: float
    version: int
    digest: str
    sampled_digest: str
    staleness: int | None
    importance_weight: float | None
    importance_truncated: float | None
    seconds: dict[str, float]
