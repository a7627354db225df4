"""One run, from prompts to the last version: the loop of on-policy context distillation."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import structlog
from opentelemetry import trace
from opentelemetry.context import Context

from foundry.errors import CartridgeNotFound, DigestMismatch, PolicyMismatch, Unavailable
from foundry.identity import Buffer
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.rpc.retry import Retry
from foundry.rpc.rollout import Prompt, RolloutClient
from foundry.rpc.teacher import TeacherClient
from foundry.seeds import derive_seed
from foundry.store import CartridgeId, CartridgeStore, ClaimedRun, ManifestDraft
from foundry.telemetry.traces import links_to
from services.trainer import checkpoint, metrics
from services.trainer.checkpoint import Progress
from services.trainer.control import Control
from services.trainer.curriculum import Curriculum
from services.trainer.sample import Guards, Sample
from services.trainer.signals import signals_of
from services.trainer.update.gradient import Signal
from services.trainer.update.heldout import MEASURE, HeldOutSet
from services.trainer.update.step import TrainingStep, Update

log = structlog.get_logger(__name__)
_tracer = trace.get_tracer(__name__)

# A version is published again so often while it is asked for; a server that reads another store never finds it.
_MAX_LOSSES = 5


class Run:
    """A claimed run with everything it trains with; `services.trainer.prepare` makes one."""

    def __init__(
        self,
        claimed: ClaimedRun,
        lm: FrozenLM,
        training: TrainingStep,
        curriculum: Curriculum,
        progress: Progress,
        *,
        store: CartridgeStore,
        rollouts: RolloutClient,
        teacher: TeacherClient,
        control: Control,
        retry: Retry,
    ) -> None:
        self.claimed, self.spec = claimed, claimed.spec
        self.progress = progress
        self._lm, self._training, self._curriculum = lm, training, curriculum
        self._heldout = HeldOutSet(curriculum.heldout)
        self._objective = Objective(self.spec.objective, beta=self.spec.jsd_beta, k=self.spec.topk)
        self._store, self._rollouts, self._teacher = store, rollouts, teacher
        self._control, self._retry = control, retry
        self._seconds: dict[str, float] = {}
        self._links: Sequence[trace.Link] = ()

    async def train(self) -> Progress:
        """Train to the last step, or until cancelled; the policy at the end is durable."""
        await self._begin()
        while self.progress.step < self.spec.num_steps and await self._may_go_on():
            with self._traced_step():
                with self._timed("total"):
                    samples = await self._sample()
                    signals = await self._score(samples)
                    update = await self._update(samples, signals)
                    await self._publish(update)
                await self._report(samples, update)
                await self._evaluate_and_keep()
        await self._end()
        return self.progress

    # The stages of one step

    async def _sample(self) -> list[Sample]:
        with _tracer.start_as_current_span("prompts"):
            turns = self._curriculum.batch(self.progress.step, self.spec.batch_size, self.spec.seed)
            prompts = [
                Prompt(
                    turn,
                    derive_seed(self.spec.seed, self.progress.step, place, copy),
                    f"step {self.progress.step + 1}, prompt {place + 1} of {len(turns)}, answer {copy + 1}",
                )
                for place, turn in enumerate(turns)
                for copy in range(self.spec.samples_per_prompt)
            ]

        losses = itertools.count(1)

        async def attempt() -> list[Sample]:
            policy = self.progress.policy
            try:
                answers = await self._rollouts.sample(
                    prompts, policy, temperature=self.spec.temperature, max_new_tokens=self.spec.max_new_tokens
                )
            except (CartridgeNotFound, DigestMismatch) as error:
                if next(losses) > _MAX_LOSSES:
                    raise
                # Redis was emptied and this version was not durable, or all copies are damaged: the bytes are here.
                await self._publish_policy(durable=True)
                raise Unavailable(f"{error.message}; it was published again") from error
            return [Sample.of(prompt, answer, policy) for prompt, answer in zip(prompts, answers, strict=True)]

        with self._timed("rollout"):
            return await self._retry.call("rollout", attempt)

    async def _score(self, samples: Sequence[Sample], objective: Objective | None = None) -> list[Signal]:
        with self._timed("teacher"):
            return await self._retry.call(
                "teacher", lambda: signals_of(self._teacher, samples, objective or self._objective)
            )

    async def _update(self, samples: Sequence[Sample], signals: Sequence[Signal]) -> Update:
        metrics.STALENESS.set(self.progress.policy.version - min(sample.version for sample in samples))
        try:
            with self._timed("update"):
                update = await asyncio.to_thread(self._training.run, samples, signals)
        except PolicyMismatch as error:
            metrics.REFUSED.labels(error.reason).inc()
            raise
        self.progress = replace(
            self.progress, step=self.progress.step + 1, tokens_seen=self.progress.tokens_seen + update.num_tokens
        )
        return update

    async def _publish(self, update: Update) -> None:
        with self._timed("publish"):
            measured = {"loss": update.loss, "policy_mismatch_kl": update.policy_mismatch_kl}
            await self._publish_policy(measured, parent=self.progress.policy.digest)

    async def _report(self, samples: Sequence[Sample], update: Update) -> None:
        progress, guards = self.progress, Guards.of(samples)
        metrics.STEP.set(progress.step)
        metrics.LAST_STEP_TIMESTAMP.set_to_current_time()
        metrics.LOSS.set(update.loss)
        metrics.GRAD_NORM.set(update.grad_norm)
        metrics.POLICY_MISMATCH_KL.set(update.policy_mismatch_kl)
        metrics.ENTROPY.set(update.entropy)
        metrics.TRUNCATED.set(guards.truncated)
        metrics.REPETITION.set(guards.repetition)
        metrics.MEAN_LENGTH.set(guards.mean_length)
        metrics.TRAINED_TOKENS.inc(update.num_tokens)
        metrics.ANSWERS.inc(len(samples))
        metrics.TRUNCATED_ANSWERS.inc(sum(sample.truncated for sample in samples))
        log.info(
            "step",
            step=progress.step,
            loss=update.loss,
            policy_mismatch_kl=update.policy_mismatch_kl,
            version=progress.policy.version,
            digest=progress.policy.digest,
            seconds=self._seconds["total"],
        )
        await self._tell(
            {
                "type": "step",
                "step": progress.step,
                "attempt": self.claimed.attempt,
                "num_steps": self.spec.num_steps,
                "objective": self.spec.objective,
                "loss": update.loss,
                "policy_mismatch_kl": update.policy_mismatch_kl,
                "policy_mismatch_max": update.policy_mismatch_max,
                "policy_mismatch_by_server": {
                    server: {"tokens": each.num_tokens, "kl": each.kl, "max": each.largest}
                    for server, each in update.mismatch_by_server.items()
                },
                "grad_norm": update.grad_norm,
                "entropy": update.entropy,
                "tokens": update.num_tokens,
                "mean_length": guards.mean_length,
                "truncated": guards.truncated,
                "repetition": guards.repetition,
                "version": progress.policy.version,
                "digest": progress.policy.digest,
                "sampled_digest": samples[0].digest,
                "seconds": dict(self._seconds),
            }
        )

    # Around the steps

    async def _begin(self) -> None:
        metrics.STEP.set(self.progress.step)
        metrics.NUM_STEPS.set(self.spec.num_steps)
        metrics.POLICY_MISMATCH_THRESHOLD.set(self.spec.policy_mismatch_threshold)
        await self._retry.call(
            "store", lambda: self._store.acquire(self.spec.name, self.claimed.run_id, self.claimed.attempt)
        )
        self._links = links_to(
            await self._retry.call("store", lambda: self._store.runs.traceparent(self.claimed.run_id))
        )
        # Before the first step: version of step 0. After a resume: the same bytes, hence the same version, again.
        await self._publish_policy()
        self._heldout.signals = await self._score(self._heldout.samples, MEASURE)
        if self.progress.step == 0:
            await self._evaluate()
            await self._keep()

    async def _may_go_on(self) -> bool:
        await self._control.wait_until_running()
        return not self._control.cancelled

    async def _evaluate_and_keep(self) -> None:
        step, spec = self.progress.step, self.spec
        last = step == spec.num_steps
        if last or (spec.heldout_every and step % spec.heldout_every == 0):
            await self._evaluate()
        if last or step % spec.checkpoint_every == 0:
            await self._keep()

    async def _end(self) -> None:
        if self._control.cancelled:
            await self._keep()
        # The same version again, unless Redis lost it.
        await self._publish_policy(durable=True)
        await self._retry.call(
            "store", lambda: self._store.release(self.spec.name, self.claimed.run_id, self.claimed.attempt)
        )

    async def _evaluate(self) -> None:
        with _tracer.start_as_current_span("evaluate"), metrics.STAGE_SECONDS.labels("evaluate").time():
            kl = await asyncio.to_thread(self._heldout.kl, self._lm, self._training.cartridge)
        first = kl if self.progress.step == 0 else self.progress.heldout_kl_first
        self.progress = replace(self.progress, heldout_kl_first=first, heldout_kl_last=kl)
        metrics.HELDOUT_KL.set(kl)
        await self._tell(
            {"type": "heldout", "step": self.progress.step, "kl": kl, "num_tokens": self._heldout.num_tokens}
        )

    async def _keep(self) -> None:
        parts: list[Buffer] = [checkpoint.write(self.progress, self._curriculum, self._training)]
        run_id, attempt, step = self.claimed.run_id, self.claimed.attempt, self.progress.step
        with _tracer.start_as_current_span("checkpoint"), metrics.STAGE_SECONDS.labels("checkpoint").time():
            await self._retry.call("store", lambda: self._store.runs.save_checkpoint(run_id, attempt, step, parts))

    async def _publish_policy(
        self, measured: Mapping[str, float] | None = None, *, parent: str | None = None, durable: bool = False
    ) -> None:
        """`parent` is known to the step that made the version; what is published again has none to tell."""
        progress, spec = self.progress, self.spec
        stored = self._training.cartridge.snapshot().to_bytes()
        draft = ManifestDraft(
            name=spec.name,
            run=self.claimed.run_id,
            attempt=self.claimed.attempt,
            step=progress.step,
            parent=parent,
            document=spec.document,
            init="first-tokens",
            objective=spec.objective,
            tokens_seen=progress.tokens_seen,
            metrics=measured or {},
        )
        durable = durable or progress.step in (0, spec.num_steps) or progress.step % spec.durable_every == 0
        manifest = await self._retry.call("store", lambda: self._store.publish(stored, draft, durable=durable))
        self.progress = replace(progress, policy=CartridgeId(spec.name, manifest.version, manifest.digest))
        metrics.VERSION.set(manifest.version)

    async def _tell(self, event: dict[str, Any]) -> None:
        run_id, attempt = self.claimed.run_id, self.claimed.attempt
        await self._retry.call("store", lambda: self._store.runs.report(run_id, attempt, event))

    def _traced_step(self) -> AbstractContextManager[trace.Span]:
        """The root of one step's trace, with a link to the request that made the run."""
        return _tracer.start_as_current_span(
            "step",
            context=Context(),
            links=self._links,
            attributes={
                "foundry.run": self.claimed.run_id,
                "foundry.attempt": self.claimed.attempt,
                "foundry.step": self.progress.step + 1,
                "foundry.version": self.progress.policy.version,
                "foundry.digest": self.progress.policy.digest,
            },
        )

    @contextmanager
    def _timed(self, stage: str) -> Any:
        began = time.perf_counter()
        # The whole step has its span already.
        with _tracer.start_as_current_span(stage) if stage != "total" else nullcontext():
            yield
        self._seconds[stage] = time.perf_counter() - began
        metrics.STAGE_SECONDS.labels(stage).observe(self._seconds[stage])
