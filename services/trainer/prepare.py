"""Making a run ready: document, curriculum, cartridge at its start or at its last checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor

from foundry.errors import FingerprintMismatch
from foundry.identity import ids_digest
from foundry.model.attention.compacting import Compaction
from foundry.model.cartridge import TrainableCartridge
from foundry.model.initialise import check_num_tokens, compact, cut_context
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.model.template import ChatTemplate
from foundry.rpc.pods import Pods
from foundry.rpc.rollout import RolloutClient
from foundry.rpc.teacher import TeacherClient
from foundry.seeds import derive_seed
from foundry.selfstudy.references import references
from foundry.store import CartridgeId
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
from services.trainer.sources.hybrid import Hybrid
from services.trainer.sources.off_policy import OffPolicy
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
        check_num_tokens(self._spec.num_tokens, len(context), len(self._template.closing))
        self._teacher = teacher = await self._teach(document, context)
        kept = await attempt.load_checkpoint()
        kv = await self._initial_kv(document, context) if kept is None else self._empty_kv()
        training = self._training_step(TrainableCartridge(lm, kv, num_frozen=self._spec.num_frozen))
        progress, curriculum = (
            await self._start(document, context) if kept is None else await self._resume(kept, training)
        )
        publisher, stages = PolicyPublisher(attempt, training.cartridge, progress), Stages()
        return Run(
            attempt,
            progress,
            training,
            source=Hybrid(
                OffPolicy(self._spec, curriculum, ids_digest(context)),
                OnPolicy(attempt, curriculum, self._rollouts, publisher, stages),
                num_first_steps=self._spec.num_off_policy_steps,
            ),
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

    async def _initial_kv(self, document: str, context: Sequence[int]) -> Tensor:
        spec, lm, template = self._spec, self._lm, self._template
        if spec.init == "first_tokens":
            return await asyncio.to_thread(lm.prefill, cut_context(context, template.closing, spec.num_tokens))
        await self._attempt.tell({"type": "progress", "stage": "compaction", "done": 0, "total": 1})
        seed, max_tokens = derive_seed(spec.seed, "references"), spec.reference_tokens
        shown = await asyncio.to_thread(references, document, template, lm.tokenizer, max_tokens=max_tokens, seed=seed)
        compaction = Compaction(spec.num_tokens, num_first=1, num_last=len(template.closing))
        kv_L2GPD = await asyncio.to_thread(compact, lm, context, shown, compaction)
        await self._attempt.tell({"type": "progress", "stage": "compaction", "done": 1, "total": 1})
        return kv_L2GPD

    def _empty_kv(self) -> Tensor:
        """For a checkpoint to be read into."""
        lm = self._lm
        return torch.zeros(lm.spec.kv_shape(self._spec.num_tokens), dtype=lm.dtype, device=lm.device)

    async def _resume(self, content: bytes, training: TrainingStep) -> tuple[Progress, Curriculum]:
        progress = checkpoint.read(content, training, config=self._spec.digest, template=self._template.digest)
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
        return Progress(0, policy, 0, self._spec.digest, self._template.digest, digest), curriculum
