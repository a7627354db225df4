"""Making a run ready: document, data set, cartridge at its start or at its last checkpoint."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import structlog
import torch
from torch import Tensor

from foundry.errors import DigestMismatch, FingerprintMismatch
from foundry.model.cartridge import TrainableCartridge
from foundry.model.initialise import check_num_tokens
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.model.template import ChatTemplate
from foundry.rpc.pods import Pods
from foundry.rpc.rollout import RolloutClient
from foundry.rpc.teacher import TeacherClient
from foundry.store import CartridgeId, RunSpec
from foundry.tasks import end
from services.trainer import checkpoint
from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Progress
from services.trainer.contexts import Context, read_contexts
from services.trainer.control import Control
from services.trainer.data.conversation import Conversation
from services.trainer.data.curriculum import Curriculum
from services.trainer.data.writer import DatasetWriter
from services.trainer.measurements import Measurements
from services.trainer.publish import PolicyPublisher
from services.trainer.ranks.leader import Leader
from services.trainer.run import Run
from services.trainer.sample import Sample
from services.trainer.settings import TrainerSettings
from services.trainer.signal_cache import SignalCache
from services.trainer.signals import Teachers
from services.trainer.sources.hybrid import Hybrid
from services.trainer.sources.off_policy import OffPolicy
from services.trainer.sources.on_policy import OnPolicy
from services.trainer.start import plan_start
from services.trainer.update.heldout import HeldOutSet
from services.trainer.update.step import TrainingStep

log = structlog.get_logger(__name__)
# Of most turns less: they are not known yet.
_TURN_TOKENS = 256


class Preparation:
    """What one attempt needs before its first step. `close` the clients it opened when the attempt has ended."""

    def __init__(
        self, attempt: Attempt, lm: FrozenLM, settings: TrainerSettings, *, leader: Leader | None = None
    ) -> None:
        self._attempt, self._spec, self._lm, self._settings = attempt, attempt.spec, lm, settings
        self._leader = leader
        self._template = ChatTemplate(lm.tokenizer, settings.template_clock)
        self._rollouts = RolloutClient(
            Pods("rollout", settings.rollout_addresses, settings.tls, token=settings.token_of("trainer")),
            lm.spec.fingerprint,
            self._template.digest,
            settings.rollout_timeout_seconds,
            caller=attempt.caller,
        )
        self._cache = SignalCache(settings.signal_memory_bytes, settings.signal_disk_bytes)
        self._teachers: Teachers | None = None

    async def run(self, control: Control) -> Run:
        """The run, ready to train. Raises what makes it impossible, e.g. DocumentTooLong or CartridgeTooLong."""
        attempt, spec, lm = self._attempt, self._spec, self._lm
        if spec.model_fingerprint and spec.model_fingerprint != lm.spec.fingerprint:
            raise FingerprintMismatch(
                f"the run is for model {spec.model_fingerprint}, this trainer has {lm.spec.fingerprint}"
            )
        contexts = await read_contexts(attempt, self._template, lm.spec.max_tokens)
        check_num_tokens(spec.num_tokens, sum(len(each.ids) for each in contexts), len(self._template.closing))
        bare = Context("", "", self._template.bare() if spec.general_share else ())
        self._teachers = teachers = await self._teach([*contexts, bare] if spec.general_share else contexts)
        kept = await attempt.load_checkpoint()
        start = self._nothing if kept else await plan_start(attempt, lm, self._template, contexts)
        writer = DatasetWriter(
            *(attempt, lm, self._template, self._rollouts),
            contexts=contexts,
            bare=bare,
            passage_tokens=self._settings.selfstudy_chunk_tokens,
        )
        # The one is computed here, and what it is trained with compiled; the other is asked of the rollout servers.
        writing = asyncio.create_task(writer.write())
        try:
            kv = await start()
            training = self._training_step(TrainableCartridge(lm, kv, num_frozen=spec.num_frozen))
            if lm.device.type == "cuda":
                await self._compile(training)
            curriculum = await writing
        finally:
            await end(writing)
        progress = await self._resume(kept, training, curriculum) if kept else self._begin(curriculum)
        older = checkpoint.read_older(kept, training) if kept else []
        publisher = PolicyPublisher(attempt, training.cartridge, progress, older)
        objective = training.objective
        return Run(
            attempt,
            progress,
            training,
            source=Hybrid(
                OffPolicy(attempt, lm, contexts, curriculum, teachers, self._cache, objective),
                OnPolicy(attempt, curriculum, self._rollouts, teachers, objective, publisher),
                num_first_steps=spec.num_off_policy_steps,
            ),
            publisher=publisher,
            measurements=Measurements(
                *(attempt, progress, training, teachers, publisher),
                heldout=self._heldout(curriculum.heldout),
                general=self._heldout(curriculum.general_heldout),
            ),
            control=control,
        )

    async def _compile(self, training: TrainingStep) -> None:
        spec, began = self._spec, time.perf_counter()
        num_tokens = spec.batch_size * spec.samples_per_prompt * (_TURN_TOKENS + spec.max_new_tokens)
        await asyncio.to_thread(training.warm_up, num_tokens, stale=spec.max_staleness > 0)
        log.info("compiled", seconds=round(time.perf_counter() - began, 1))

    async def close(self) -> None:
        await self._rollouts.close()
        self._cache.close()
        if self._teachers is not None:
            await self._teachers.close()

    async def _teach(self, contexts: Sequence[Context]) -> Teachers:
        """Each document's KV is computed, or found, where it will be asked for."""
        settings = self._settings
        teachers = {
            context.digest: TeacherClient(
                Pods("teacher", [settings.teacher_address], settings.tls, token=settings.token_of("trainer")),
                self._lm.spec.fingerprint,
                context.text or None,
                timeout_seconds=settings.teacher_timeout_seconds,
                caller=self._attempt.caller,
                template_digest=self._template.digest,
                context_digest=context.digest,
            )
            for context in contexts
        }
        try:
            for teacher in teachers.values():
                await self._attempt.retry.call("teacher", teacher.put_context)
        except BaseException:
            await Teachers(teachers).close()
            raise
        return Teachers(teachers)

    def _training_step(self, cartridge: TrainableCartridge) -> TrainingStep:
        spec = self._spec
        return TrainingStep(
            self._lm,
            cartridge,
            objective_of(spec),
            learning_rate=spec.learning_rate,
            micro_batch_tokens=self._settings.micro_batch_tokens,
            policy_mismatch_threshold=spec.policy_mismatch_threshold,
            max_grad_norm=spec.max_grad_norm,
            leader=self._leader,
        )

    def _heldout(self, conversations: Sequence[Conversation]) -> HeldOutSet:
        samples = [Sample.written(each, each.family) for each in conversations]
        return HeldOutSet(samples, self._settings.micro_batch_tokens)

    async def _nothing(self) -> Tensor:
        """For a checkpoint to be read into."""
        lm = self._lm
        return torch.zeros(lm.spec.kv_shape(self._spec.num_tokens), dtype=lm.dtype, device=lm.device)

    async def _resume(self, content: bytes, training: TrainingStep, curriculum: Curriculum) -> Progress:
        progress = checkpoint.read(content, training, config=self._spec.digest, template=self._template.digest)
        if progress.dataset != curriculum.digest:
            raise DigestMismatch(
                f"the checkpoint at step {progress.step} went through the data set {progress.dataset}, the one that "
                f"stands is {curriculum.digest}: it was damaged or deleted; start the run anew"
            )
        await self._attempt.tell({"type": "resumed", "step": progress.step, "attempt": self._attempt.claimed.attempt})
        return progress

    def _begin(self, curriculum: Curriculum) -> Progress:
        policy = CartridgeId(self._spec.name, 0, "")
        return Progress(0, policy, 0, self._spec.digest, self._template.digest, curriculum.digest)


def objective_of(spec: RunSpec) -> Objective:
    return Objective(spec.objective, spec.jsd_beta, spec.topk, spec.hard_label_weight, spec.importance_ratio_max)
