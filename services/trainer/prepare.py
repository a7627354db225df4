"""Making a run ready: document, curriculum, cartridge at its start or at its last checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from foundry.errors import FingerprintMismatch
from foundry.identity import content_digest, ids_digest
from foundry.model.cartridge import TrainableCartridge
from foundry.model.initialise import cut_context
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.model.template import ChatTemplate
from foundry.rpc.pods import Pods
from foundry.rpc.rollout import RolloutClient
from foundry.rpc.teacher import TeacherClient
from foundry.store import CartridgeId, RunSpec
from services.trainer import checkpoint
from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Progress
from services.trainer.control import Control
from services.trainer.curriculum import Curriculum
from services.trainer.prompts import CurriculumWriter
from services.trainer.publish import PolicyPublisher
from services.trainer.ranks.leader import Leader
from services.trainer.run import Run
from services.trainer.settings import TrainerSettings
from services.trainer.sources.on_policy import OnPolicy
from services.trainer.stages import Stages
from services.trainer.update.heldout import HeldOutSet
from services.trainer.update.step import TrainingStep


class Preparation:
    """What one attempt needs before its first step. `close` the clients it opened when the attempt has ended."""

    def __init__(
        self, attempt: Attempt, lm: FrozenLM, settings: TrainerSettings, *, leader: Leader | None = None
    ) -> None:
        self._attempt, self._spec, self._lm, self._settings = attempt, attempt.spec, lm, settings
        self._leader = leader
        self._template = ChatTemplate(lm.tokenizer, settings.template_clock)
        self._rollouts = RolloutClient(
            Pods("rollout", settings.rollout_addresses, settings.tls),
            lm.spec.fingerprint,
            self._template.digest,
            settings.rollout_timeout_seconds,
        )
        self._teacher: TeacherClient | None = None

    async def run(self, control: Control) -> Run:
        """The run, ready to train. Raises what makes it impossible, e.g. DocumentTooLong or CartridgeTooLong."""
        attempt, lm = self._attempt, self._lm
        if self._spec.model_fingerprint and self._spec.model_fingerprint != lm.spec.fingerprint:
            raise FingerprintMismatch(
                f"the run is for model {self._spec.model_fingerprint}, this trainer has {lm.spec.fingerprint}"
            )
        document = await attempt.document(self._spec.document)
        context = self._template.context(document, max_tokens=lm.spec.max_tokens)
        start = cut_context(context, self._template.closing, self._spec.num_tokens)
        self._teacher = teacher = await self._teach(document, context)
        training = self._training_step(
            TrainableCartridge(lm, await asyncio.to_thread(lm.prefill, start), num_frozen=self._spec.num_frozen)
        )
        progress, curriculum = await self._resume(training) or await self._start(document, context)
        publisher, stages = PolicyPublisher(attempt, training.cartridge, progress), Stages()
        return Run(
            attempt,
            progress,
            training,
            source=OnPolicy(attempt, curriculum, self._rollouts, publisher, stages),
            teacher=teacher,
            publisher=publisher,
            heldout=HeldOutSet(curriculum.heldout, self._settings.micro_batch_tokens),
            stages=stages,
            control=control,
        )

    async def close(self) -> None:
        await self._rollouts.close()
        if self._teacher is not None:
            await self._teacher.close()

    async def _teach(self, document: str, context: Sequence[int]) -> TeacherClient:
        teacher = TeacherClient(
            Pods("teacher", [self._settings.teacher_address], self._settings.tls),
            self._lm.spec.fingerprint,
            document,
            timeout_seconds=self._settings.teacher_timeout_seconds,
            template_digest=self._template.digest,
            context_digest=ids_digest(context),
        )
        await self._attempt.retry.call("teacher", teacher.put_context)
        return teacher

    def _training_step(self, cartridge: TrainableCartridge) -> TrainingStep:
        spec = self._spec
        return TrainingStep(
            self._lm,
            cartridge,
            Objective(spec.objective, beta=spec.jsd_beta, k=spec.topk),
            learning_rate=spec.learning_rate,
            micro_batch_tokens=self._settings.micro_batch_tokens,
            policy_mismatch_threshold=spec.policy_mismatch_threshold,
            leader=self._leader,
        )

    async def _resume(self, training: TrainingStep) -> tuple[Progress, Curriculum] | None:
        content = await self._attempt.load_checkpoint()
        if content is None:
            return None
        progress = checkpoint.read(content, training, config=config_digest(self._spec), template=self._template.digest)
        curriculum = await self._attempt.load_curriculum(progress.curriculum)
        await self._attempt.tell({"type": "resumed", "step": progress.step, "attempt": self._attempt.claimed.attempt})
        return progress, curriculum

    async def _start(self, document: str, context: Sequence[int]) -> tuple[Progress, Curriculum]:
        writer = CurriculumWriter(
            self._attempt, self._lm, self._template, self._rollouts, self._settings.selfstudy_chunk_tokens
        )
        curriculum = await writer.write(document, context)
        digest = await self._attempt.save_curriculum(curriculum)
        policy = CartridgeId(self._spec.name, 0, "")
        return Progress(0, policy, 0, config_digest(self._spec), self._template.digest, digest), curriculum


def config_digest(spec: RunSpec) -> str:
    """Digest of all that a run's specification says; the template of its contexts has a digest of its own."""
    return content_digest(spec.to_json().encode())
