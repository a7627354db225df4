"""Making a run ready: document, curriculum, cartridge at its start or at its last checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from foundry.errors import FingerprintMismatch, InvalidArgument
from foundry.identity import content_digest, ids_digest
from foundry.model.cartridge import TrainableCartridge
from foundry.model.initialise import cut_context
from foundry.model.lm import FrozenLM
from foundry.model.objectives import Objective
from foundry.model.template import ChatTemplate
from foundry.rpc.pods import Pods
from foundry.rpc.retry import Retry
from foundry.rpc.rollout import Answer, Prompt, RolloutClient
from foundry.rpc.teacher import TeacherClient
from foundry.seeds import derive_seed
from foundry.selfstudy.prompts import read_prompts
from foundry.selfstudy.questions import write_prompts
from foundry.store import CartridgeId, CartridgeStore, ClaimedRun, DocumentPrompts, Prompts, RunSpec
from services.trainer import checkpoint
from services.trainer.checkpoint import Progress
from services.trainer.control import Control
from services.trainer.curriculum import Curriculum, HeldOut
from services.trainer.ranks.leader import Leader
from services.trainer.run import Run
from services.trainer.settings import TrainerSettings
from services.trainer.update.step import TrainingStep

# Where no held-out file is given one prompt in eight is held out, at least four, at most half.
HELDOUT_SHARE = 8
MIN_HELDOUT = 4


class Preparation:
    """What one claimed run needs before its first step. `close` the clients it opened when the run has ended."""

    def __init__(
        self,
        claimed: ClaimedRun,
        lm: FrozenLM,
        settings: TrainerSettings,
        *,
        store: CartridgeStore,
        retry: Retry,
        leader: Leader | None = None,
    ) -> None:
        self._claimed, self._spec, self._lm, self._settings = claimed, claimed.spec, lm, settings
        self._store, self._retry, self._leader = store, retry, leader
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
        spec, lm = self._spec, self._lm
        if spec.model_fingerprint and spec.model_fingerprint != lm.spec.fingerprint:
            raise FingerprintMismatch(
                f"the run is for model {spec.model_fingerprint}, this trainer has {lm.spec.fingerprint}"
            )
        document = await self._retry.call("store", lambda: self._store.documents.get(spec.document))
        context = self._template.context(document, max_tokens=lm.spec.max_tokens)
        start = cut_context(context, self._template.closing, spec.num_tokens)
        self._teacher = TeacherClient(
            Pods("teacher", [self._settings.teacher_address], self._settings.tls),
            lm.spec.fingerprint,
            document,
            timeout_seconds=self._settings.teacher_timeout_seconds,
            template_digest=self._template.digest,
            context_digest=ids_digest(context),
        )
        await self._retry.call("teacher", self._teacher.put_context)
        training = TrainingStep(
            lm,
            TrainableCartridge(lm, await asyncio.to_thread(lm.prefill, start), num_frozen=spec.num_frozen),
            Objective(spec.objective, beta=spec.jsd_beta, k=spec.topk),
            learning_rate=spec.learning_rate,
            micro_batch_tokens=self._settings.micro_batch_tokens,
            policy_mismatch_threshold=spec.policy_mismatch_threshold,
            leader=self._leader,
        )
        progress, curriculum = await self._resume(training) or await self._start(document, context)
        return Run(
            self._claimed,
            lm,
            training,
            curriculum,
            progress,
            store=self._store,
            rollouts=self._rollouts,
            teacher=self._teacher,
            control=control,
            retry=self._retry,
        )

    async def close(self) -> None:
        await self._rollouts.close()
        if self._teacher is not None:
            await self._teacher.close()

    async def _resume(self, training: TrainingStep) -> tuple[Progress, Curriculum] | None:
        kept = await self._retry.call("store", lambda: self._store.runs.load_checkpoint(self._claimed.run_id))
        if kept is None:
            return None
        progress, curriculum = checkpoint.read(
            kept[1], training, config=config_digest(self._spec), template=self._template.digest
        )
        await self._tell({"type": "resumed", "step": progress.step, "attempt": self._claimed.attempt})
        return progress, curriculum

    async def _start(self, document: str, context: Sequence[int]) -> tuple[Progress, Curriculum]:
        curriculum = await self._curriculum(document, context)
        policy = CartridgeId(self._spec.name, 0, "")
        return Progress(0, policy, 0, config_digest(self._spec), self._template.digest, 0.0, 0.0), curriculum

    async def _curriculum(self, document: str, context: Sequence[int]) -> Curriculum:
        heldout_spec, seed = self._spec.heldout, self._spec.seed
        turns = await self._turns(document, self._spec.prompts, "prompts")
        if heldout_spec is not None:
            heldout = await self._turns(document, heldout_spec, "heldout")
            # A prompt that is held out is never trained on, whoever wrote it.
            turns = [turn for turn in turns if turn not in heldout]
        else:
            num_heldout = min(max(MIN_HELDOUT, len(turns) // HELDOUT_SHARE), len(turns) // 2)
            turns, heldout = turns[num_heldout:], turns[:num_heldout]
        if not turns:
            raise InvalidArgument("no training prompts are left beside the held-out ones: bring more", field="prompts")
        prompts = [Prompt([*context, *turn], derive_seed(seed, "heldout", place)) for place, turn in enumerate(heldout)]
        await self._tell({"type": "progress", "stage": "teacher answers", "done": 0, "total": len(prompts)})
        answers = await self._retry.call(
            "rollout",
            lambda: self._rollouts.ask_base(prompts, temperature=0.0, max_new_tokens=self._spec.max_new_tokens),
        )
        await self._tell({"type": "progress", "stage": "teacher answers", "done": len(prompts), "total": len(prompts)})
        return Curriculum(turns, [HeldOut(turn, answer.ids) for turn, answer in zip(heldout, answers, strict=True)])

    async def _turns(self, document: str, source: Prompts, field: str) -> list[list[int]]:
        if isinstance(source, DocumentPrompts):
            digest = source.digest
            text = await self._retry.call("store", lambda: self._store.documents.get(digest))
            return [self._template.turn(messages) for messages in read_prompts(text, field=field)]

        async def ask(prompts: Sequence[Prompt]) -> list[Answer]:
            return await self._retry.call(
                "rollout",
                lambda: self._rollouts.ask_base(
                    prompts, temperature=0.8, max_new_tokens=source.max_prompt_tokens, stop=["\n"]
                ),
            )

        async def progress(done: int) -> None:
            total = source.num_prompts
            await self._tell({"type": "progress", "stage": "self-study", "done": min(done, total), "total": total})

        await progress(0)
        questions = await write_prompts(
            document,
            self._template,
            self._lm.tokenizer,
            ask,
            num_prompts=source.num_prompts,
            chunk_tokens=self._settings.selfstudy_chunk_tokens,
            seed=derive_seed(self._spec.seed, field),
            progress=progress,
        )
        return [self._template.turn([{"role": "user", "content": question}]) for question in questions]

    async def _tell(self, event: dict[str, Any]) -> None:
        run_id, attempt = self._claimed.run_id, self._claimed.attempt
        await self._retry.call("store", lambda: self._store.runs.report(run_id, attempt, event))


def config_digest(spec: RunSpec) -> str:
    """Digest of all that a run's specification says; the template of its contexts has a digest of its own."""
    return content_digest(spec.to_json().encode())
