"""What a run says of itself: metrics, a line in the log, and an event for those who follow it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import structlog

from foundry.store import RunSpec
from services.trainer import metrics
from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Progress
from services.trainer.lookahead import StepBatch
from services.trainer.policy import Policy
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
    attempt: Attempt, made: Policy, batch: StepBatch, update: Update, seconds: Mapping[str, float]
) -> None:
    """`made` is what `update` made of the policy."""
    samples, policy = batch.samples, made.id
    guards = Guards.of(samples)
    mismatch = _mismatch(update.proof)
    staleness = made.step - 1 - batch.policy.step if update.proof else None
    _observe(made.step, samples, update, guards)
    if staleness is not None:
        metrics.STALENESS.set(staleness)
    log.info(
        "step",
        step=made.step,
        loss=update.loss,
        policy_mismatch_kl=mismatch["policy_mismatch_kl"],
        version=policy.version,
        digest=policy.digest,
        seconds=seconds["total"],
    )
    await attempt.tell(
        {
            "type": "step",
            "step": made.step,
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
            "version": policy.version,
            "digest": policy.digest,
            "sampled_digest": samples[0].digest,
            "staleness": staleness,
            "importance_weight": update.importance.mean_weight if update.importance else None,
            "importance_truncated": update.importance.truncated if update.importance else None,
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


def _observe(step: int, samples: Sequence[Sample], update: Update, guards: Guards) -> None:
    metrics.STEP.set(step)
    metrics.LAST_STEP_TIMESTAMP.set_to_current_time()
    metrics.LOSS.set(update.loss)
    metrics.GRAD_NORM.set(update.grad_norm)
    if update.proof is not None:
        metrics.POLICY_MISMATCH_KL.set(update.proof.total.kl)
        # What was not weighted counts 1.
        metrics.IMPORTANCE_WEIGHT.set(update.importance.mean_weight if update.importance else 1.0)
        metrics.IMPORTANCE_TRUNCATED.set(update.importance.truncated if update.importance else 0.0)
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
