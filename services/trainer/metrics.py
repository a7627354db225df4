"""What the trainer reports on /metrics. One worker trains one run at a time, so nothing is labelled by run."""

from collections.abc import Callable
from functools import partial

from prometheus_client import Counter, Gauge, Histogram

from foundry.errors import AlignmentError, DigestMismatch, FoundryError, IdentityMismatch, PolicyMismatch, Unavailable
from foundry.rpc.retry import passes
from foundry.store import RunState

RUN_STATE = Gauge(
    "foundry_trainer_run_state",
    "1 at what the worker does: idle (it has no run), running, waiting.",
    ["state"],
)
RUNS = Counter(
    "foundry_trainer_runs",
    "Runs that this worker let go of: succeeded, failed, cancelled, or another worker's (fenced) or given back "
    "(requeued).",
    ["end"],
)
STEP = Gauge("foundry_trainer_step", "Steps finished in the active run, or the last one.")
NUM_STEPS = Gauge("foundry_trainer_num_steps", "Steps that the active run is to take.")
LAST_STEP_TIMESTAMP = Gauge(
    "foundry_trainer_last_step_timestamp_seconds",
    "When the last step ended, in Unix time; before the first one, when the run was taken up.",
)
VERSION = Gauge("foundry_trainer_version", "Latest version that the active run published.")
STALENESS = Gauge(
    "foundry_trainer_staleness_versions", "How many versions the oldest answer of the last step was behind its policy."
)
IMPORTANCE_WEIGHT = Gauge(
    "foundry_trainer_importance_weight",
    "Mean weight of the last step's answer tokens: below 1 where an older version said what the policy seldom would.",
)
IMPORTANCE_TRUNCATED = Gauge(
    "foundry_trainer_importance_truncated_ratio", "Share of the last step's answer tokens at importance_ratio_max."
)
LOSS = Gauge("foundry_trainer_loss", "Mean loss per token of the last step, in nats.")
GRAD_NORM = Gauge("foundry_trainer_grad_norm", "Norm of the last step's gradient.")
HELDOUT_KL = Gauge("foundry_trainer_heldout_kl", "Mean forward KL to the teacher on held-out answers, in nats.")
GENERAL_KL = Gauge(
    "foundry_trainer_general_kl",
    "Mean forward KL to the model without document or cartridge on held-out answers to general prompts, in nats.",
)
POLICY_MISMATCH_KL = Gauge(
    "foundry_trainer_policy_mismatch_kl", "KL between the rollout's and the trainer's logprobs of the sampled tokens."
)
POLICY_MISMATCH_THRESHOLD = Gauge(
    "foundry_trainer_policy_mismatch_threshold", "That KL beyond which the active run stops, in nats."
)
ENTROPY = Gauge("foundry_trainer_entropy", "Mean entropy of the student at the scored positions, in nats.")
TRUNCATED = Gauge("foundry_trainer_truncated_ratio", "Share of answers cut at the token limit.")
REPETITION = Gauge("foundry_trainer_repetition_ratio", "Share of 4-grams seen before in the same answer.")
MEAN_LENGTH = Gauge("foundry_trainer_answer_tokens", "Mean answer length of the last step.")
TRAINED_TOKENS = Counter("foundry_trainer_tokens", "Answer tokens trained on.")
ANSWERS = Counter("foundry_trainer_answers", "Answers trained on.")
TRUNCATED_ANSWERS = Counter("foundry_trainer_truncated_answers", "Of these, answers cut at the token limit.")
REFUSED = Counter(
    "foundry_trainer_refused",
    "Answers, scores and versions that a guard refused: nothing was trained on them. POLICY_MISMATCH ends the run.",
    ["reason"],
)
STAGE_SECONDS = Histogram(
    "foundry_trainer_stage_seconds",
    "Time of one stage of a step: rollout, teacher, update, publish, all of them (total; with max_staleness only what "
    "the run waited for); and between steps evaluate and checkpoint.",
    ["stage"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000),
)
TRACKER_FAILURES = Counter(
    "foundry_trainer_tracker_failures",
    "Events that a tracker failed to take, or was too slow to; and trackers that could not be opened or closed.",
    ["tracker"],
)
RETRIES = Counter("foundry_trainer_retries", "Calls that had to be repeated.", ["call", "reason"])

# What says that bytes, ids or a model are not what was asked for.
GUARDS: tuple[type[FoundryError], ...] = (PolicyMismatch, AlignmentError, DigestMismatch, IdentityMismatch)
IDLE = "idle"

for _stage in ("rollout", "teacher", "update", "publish", "total", "evaluate", "checkpoint"):
    STAGE_SECONDS.labels(_stage)
for _guard in (*GUARDS, *IdentityMismatch.__subclasses__()):
    REFUSED.labels(_guard.reason)
for _tracker in ("json", "tensorboard", "wandb", "trackio"):
    TRACKER_FAILURES.labels(_tracker)
for _call in ("rollout", "teacher", "store"):
    RETRIES.labels(_call, Unavailable.reason)
for _end in ("succeeded", "failed", "cancelled", "fenced", "requeued"):
    RUNS.labels(_end)


def count_failure(call: str, error: FoundryError) -> None:
    """Of one attempt of a call."""
    if isinstance(error, GUARDS):
        REFUSED.labels(error.reason).inc()
    if passes(error):
        RETRIES.labels(call, error.reason).inc()


def observe_state(state: Callable[[], str]) -> None:
    """Report the state that `state` says when /metrics is scraped."""
    for each in (IDLE, RunState.RUNNING, RunState.WAITING):
        RUN_STATE.labels(each).set_function(partial(_is, state, each))


def _is(state: Callable[[], str], wanted: str) -> float:
    return float(state() == wanted)
