"""What a run says of itself: metrics, a line in the log, and an event for those who follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from foundry.store import RunSpec
from services.trainer import metrics
from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Progress
from services.trainer.sample import Guards, Sample
from services.trainer.update.heldout import Distance
from services.trainer.update.proof import Proof
from services.trainer.update.step import Update

log = structlog.get_logger(__name__)

# Of a step; "evaluate" and "checkpoint" stand between steps.
_STAGES = ("rollout", "teacher", "update", "publish", "total")


def report_begin(progress: Progress, spec: RunSpec) -> None:
    metrics.STEP.set(progress.step)
    metrics.NUM_STEPS.set(spec.num_steps)
    metrics.POLICY_MISMATCH_THRESHOLD.set(spec.policy_mismatch_threshold)


async def report_step(
    attempt: Attempt, progress: Progress, samples: Sequence[Sample], update: Update, seconds: Mapping[str, float]
) -> None:
    guards = Guards.of(samples)
    mismatch = _mismatch(update.proof)
    _observe(progress, samples, update, guards)
    log.info(
        "step",
        step=progress.step,
        loss=update.loss,
        policy_mismatch_kl=mismatch["policy_mismatch_kl"],
        version=progress.policy.version,
        digest=progress.policy.digest,
        seconds=seconds["total"],
    )
    await attempt.tell(
        {
            "type": "step",
            "step": progress.step,
            "attempt": attempt.claimed.attempt,
            "num_steps": attempt.spec.num_steps,
            "objective": attempt.spec.loss,
            "loss": update.loss,
            **mismatch,
            "grad_norm": update.grad_norm,
            "entropy": update.entropy,
            "tokens": update.num_tokens,
            "mean_length": guards.mean_length,
            "truncated": guards.truncated,
            "repetition": guards.repetition,
            "version": progress.policy.version,
            "digest": progress.policy.digest,
            "sampled_digest": samples[0].digest,
            "seconds": {stage: seconds[stage] for stage in _STAGES if stage in seconds},
        }
    )


async def report_heldout(
    attempt: Attempt, progress: Progress, num_tokens: int, heldout: Distance, general: Distance | None
) -> None:
    metrics.HELDOUT_KL.set(heldout.kl)
    if general is not None:
        metrics.GENERAL_KL.set(general.kl)
    await attempt.tell(
        {
            "type": "heldout",
            "step": progress.step,
            "kl": heldout.kl,
            "nll": heldout.nll,
            "num_tokens": num_tokens,
            "general_kl": general.kl if general else None,
            "tokens_seen": progress.tokens_seen,
            "best_step": progress.best.step if progress.best else None,
        }
    )


def _observe(progress: Progress, samples: Sequence[Sample], update: Update, guards: Guards) -> None:
    metrics.STEP.set(progress.step)
    metrics.LAST_STEP_TIMESTAMP.set_to_current_time()
    metrics.LOSS.set(update.loss)
    metrics.GRAD_NORM.set(update.grad_norm)
    if update.proof is not None:
        metrics.POLICY_MISMATCH_KL.set(update.proof.total.kl)
    metrics.ENTROPY.set(update.entropy)
    metrics.TRUNCATED.set(guards.truncated)
    metrics.REPETITION.set(guards.repetition)
    metrics.MEAN_LENGTH.set(guards.mean_length)
    metrics.TRAINED_TOKENS.inc(update.num_tokens)
    metrics.ANSWERS.inc(len(samples))
    metrics.TRUNCATED_ANSWERS.inc(sum(sample.truncated for sample in samples))


def _mismatch(proof: Proof | None) -> dict[str, Any]:
    """Nothing is known of answers that were not proved, which is not the same as 0."""
    return {
        "policy_mismatch_kl": proof.total.kl if proof else None,
        "policy_mismatch_max": proof.total.largest if proof else None,
        "policy_mismatch_by_server": {
            server: {"tokens": each.num_tokens, "kl": each.kl, "max": each.largest}
            for server, each in (proof.by_server if proof else {}).items()
        },
    }
