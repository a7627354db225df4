"""Everything that one run needs, real but for the links and seams between its parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from foundry.errors import StoreUnavailable
from foundry.identity import CartridgeBytes, ids_digest
from foundry.model.cartridge import Cartridge, TrainableCartridge
from foundry.model.initialise import cut_context
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from foundry.rpc.pods import Pods
from foundry.rpc.retry import Retry
from foundry.rpc.rollout import RolloutClient
from foundry.rpc.teacher import TeacherClient
from foundry.store import (
    CartridgeId,
    CartridgeStore,
    ClaimedRun,
    DocumentPrompts,
    Manifest,
    ManifestDraft,
    RunSpec,
    StoreSettings,
)
from foundry.store.redis.keys import key
from foundry.tasks import end
from services.trainer import checkpoint
from services.trainer.attempt import Attempt
from services.trainer.checkpoint import Progress
from services.trainer.control import Control
from services.trainer.data.curriculum import Curriculum
from services.trainer.measurements import Measurements
from services.trainer.prepare import objective_of
from services.trainer.publish import PolicyPublisher
from services.trainer.run import Run
from services.trainer.sample import Sample
from services.trainer.signals import Teachers
from services.trainer.sources.on_policy import OnPolicy
from services.trainer.update.gradient import Signal
from services.trainer.update.heldout import HeldOutSet
from services.trainer.update.step import TrainingStep, Update
from tests.chaos.faults.link import Link
from tests.chaos.faults.observer import Observer
from tests.chaos.faults.servers import CallSeam, RolloutHost, TeacherHost
from tests.chaos.faults.storage import ObjectsSeam
from tests.conversations import conversation
from tests.tiny import CLOCK
from tests.valkey import Valkey

NAME = "chaos"
DOCUMENT = "The harbour is open again. The treaty was signed in the spring. The price of grain is twelve."
QUESTIONS = ("What is open?", "When was it signed?", "What is the price?", "Who signed?", "Why?")
HELD_OUT_ANSWER = [40, 41, 42, 43]
NUM_TOKENS = 16
MICRO_BATCH_TOKENS = 4096
# Measured: at most 2e-12 between equal bytes, at least 9e-5 between a version and the one before it.
MISMATCH_THRESHOLD = 1e-6
# Small enough that a fault costs little, large enough for a machine that is busy.
REDIS_TIMEOUT_SECONDS = 0.3
CALL_TIMEOUT_SECONDS = 1.0
PATIENCE_SECONDS = 15.0
# Of a rollout server, in cartridges: the version in use and two before it.
RESIDENT_CARTRIDGES = 3


class ObservedStore(CartridgeStore):
    """A publisher's store, with the observer before and behind it."""

    observer: Observer

    async def publish(self, stored: CartridgeBytes, draft: ManifestDraft, *, durable: bool) -> Manifest:
        digest = self.observer.offer(stored)
        manifest = await super().publish(stored, draft, durable=durable)
        self.observer.published(digest, manifest)
        return manifest


class ObservedStep(TrainingStep):
    """The training step, with the observer behind its optimiser."""

    observer: Observer

    def run(
        self, samples: Sequence[Sample], signals: Sequence[Signal], *, claimed: Cartridge | None = None, **how: Any
    ) -> Update:
        before = self.cartridge.snapshot().kv_L2GPD
        moved = False
        try:
            update = super().run(samples, signals, claimed=claimed, **how)
            moved = True
        finally:
            if not moved and not self.cartridge.snapshot().kv_L2GPD.equal(before):
                self.observer.violation("a step failed and left the cartridge changed")
        proved = before if claimed is None else claimed.kv_L2GPD
        self.observer.trained(proved, samples, signals, MISMATCH_THRESHOLD)
        return update


class World:
    """One run's surroundings: Redis and objects are its own, servers are fresh."""

    def __init__(self, lm: FrozenLM, model: Path, valkey: Valkey, directory: Path) -> None:
        self.lm, self.valkey, self.directory = lm, valkey, directory
        self.template = ChatTemplate(lm.tokenizer, CLOCK)
        self.context = self.template.context(DOCUMENT)
        self.observer = Observer(lm, self.context)
        self.objects = ObjectsSeam()
        self.rollout_calls, self.teacher_calls = CallSeam(), CallSeam()
        port = int(valkey.url.rpartition(":")[2])
        self.trainer_redis, self.rollout_redis = Link(("127.0.0.1", port)), Link(("127.0.0.1", port))
        self.redis: Redis = Redis.from_url(valkey.url)
        start = cut_context(self.context, self.template.closing, NUM_TOKENS)
        self._start_kv = lm.prefill(start)
        self.start = TrainableCartridge(lm, self._start_kv).snapshot()
        self._model = model
        self.mismatch_threshold = MISMATCH_THRESHOLD
        # Versions up to this one may be gone with Redis, and `latest` lie below them until the next one.
        self._lost_up_to = 0

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[World]:
        await self.redis.flushall()
        await self.trainer_redis.start()
        await self.rollout_redis.start()
        # Beside all links and seams: what is read through it is what is there.
        self.direct = await self._store(self.valkey.url, tampered=False)
        self.store = await self._store(f"redis://{self.trainer_redis.address}", tampered=True)
        settings = self._settings(f"redis://{self.rollout_redis.address}")
        self.rollouts = [
            RolloutHost(
                self.lm,
                self._model,
                lambda: self._store(f"redis://{self.rollout_redis.address}", tampered=True),
                settings,
                self.rollout_calls,
                self.observer,
                budget_bytes=self._start_kv.nbytes * RESIDENT_CARTRIDGES,
            )
            for _ in range(2)
        ]
        self.teacher = TeacherHost(self.lm, self._model, self.teacher_calls)
        hosts = [*self.rollouts, self.teacher]
        for host in hosts:
            await host.start()
        follower = asyncio.create_task(self._follow())
        try:
            yield self
        finally:
            # While there is a Redis: without one it would not come to wait, where it can be cancelled.
            await end(follower)
            self.disarm()
            for host in hosts:
                await host.close()
            await self.objects.settle()
            await self.store.close()
            await self.direct.close()
            await self.trainer_redis.close()
            await self.rollout_redis.close()
            await self.redis.aclose()

    def disarm(self) -> None:
        """Nothing that is armed and has not fired will."""
        for link in (self.trainer_redis, self.rollout_redis, self.teacher.link, *(each.link for each in self.rollouts)):
            link.disarm()
        for calls in (self.rollout_calls, self.teacher_calls):
            calls.disarm()
        self.objects.disarm()

    async def empty_redis(self) -> None:
        # At once: a version may be on its way, and its number is handed out by now or will be a higher one.
        async with self.redis.pipeline(transaction=True) as both:
            both.hget(key("name", NAME), "counter")
            both.flushall()
            counter, _ = await both.execute()
        self._lost_up_to = max(self._lost_up_to, int(counter or 0))

    # The run

    async def create_run(self, seed: int, max_staleness: int) -> str:
        document = await self.direct.documents.put(DOCUMENT)
        spec = RunSpec(
            name=NAME,
            document=document,
            num_tokens=NUM_TOKENS,
            num_steps=10**6,
            batch_size=4,
            max_new_tokens=3,
            prompts=DocumentPrompts(digest=document),
            learning_rate=0.02,
            seed=seed,
            heldout_every=0,
            durable_every=2,
            checkpoint_every=2,
            policy_mismatch_threshold=MISMATCH_THRESHOLD,
            max_staleness=max_staleness,
        )
        return await self.direct.runs.create(spec)

    @asynccontextmanager
    async def prepared(self, claimed: ClaimedRun, control: Control) -> AsyncIterator[Run]:
        """The run, at its start or at its last checkpoint, with clients of its own."""
        spec, fingerprint = claimed.spec, self.lm.spec.fingerprint
        retry = Retry(PATIENCE_SECONDS, max_wait_seconds=0.02)
        attempt = Attempt(claimed, self.store, retry)
        addresses = [host.link.address for host in self.rollouts]
        rollouts = RolloutClient(Pods("rollout", addresses), fingerprint, self.template.digest, CALL_TIMEOUT_SECONDS)
        teacher = TeacherClient(
            Pods("teacher", [self.teacher.link.address]),
            fingerprint,
            DOCUMENT,
            timeout_seconds=CALL_TIMEOUT_SECONDS,
            template_digest=self.template.digest,
            context_digest=ids_digest(self.context),
        )
        training = ObservedStep(
            self.lm,
            TrainableCartridge(self.lm, self._start_kv),
            objective_of(spec),
            learning_rate=spec.learning_rate,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            policy_mismatch_threshold=self.mismatch_threshold,
        )
        training.observer = self.observer
        try:
            await retry.call("teacher", teacher.put_context)
            kept = await attempt.load_checkpoint()
            curriculum = self._curriculum()
            if kept is None:
                progress = Progress(0, CartridgeId(NAME, 0, ""), 0, NAME, self.template.digest, curriculum.digest)
            else:
                progress = checkpoint.read(kept, training, config=NAME, template=self.template.digest)
            older = checkpoint.read_older(kept, training) if kept else []
            publisher = PolicyPublisher(attempt, training.cartridge, progress, older)
            teachers = Teachers({ids_digest(self.context): teacher})
            heldout = [Sample.written(each, "heldout") for each in curriculum.heldout]
            yield Run(
                attempt,
                progress,
                training,
                source=OnPolicy(attempt, curriculum, rollouts, teachers, training.objective, publisher),
                publisher=publisher,
                measurements=Measurements(
                    *(attempt, progress, training, teachers, publisher),
                    heldout=HeldOutSet(heldout, MICRO_BATCH_TOKENS),
                    general=HeldOutSet([], MICRO_BATCH_TOKENS),
                ),
                control=control,
            )
        finally:
            await rollouts.close()
            await teacher.close()

    def _curriculum(self) -> Curriculum:
        turns = [self.template.turn([{"role": "user", "content": question}]) for question in QUESTIONS]
        context = ids_digest(self.context)
        asked = [conversation(turn, context=context) for turn in turns]
        return Curriculum("", asked, [], [conversation(turns[0], HELD_OUT_ANSWER, context=context)])

    # What is read behind the run's back

    async def check_pointers(self) -> None:
        """What the store says of the name now agrees with everything that was seen before."""
        observer, newest = self.observer, self.observer.newest(NAME)
        if not newest:
            return
        manifests = await self.direct.versions(NAME)
        for manifest in manifests:
            observer.seen(NAME, manifest.version, manifest.digest)
        latest = await self.direct.resolve(NAME)
        observer.seen(NAME, latest.version, latest.digest)
        if latest.version < newest and newest > self._lost_up_to:
            observer.violation(f"latest is {latest}, and version {newest} was published")

    async def _follow(self) -> None:
        while True:
            with suppress(StoreUnavailable):
                async for event in self.direct.subscribe():
                    self.observer.seen(event.cartridge.name, event.cartridge.version, event.cartridge.digest)

    def _settings(self, redis_url: str) -> StoreSettings:
        return StoreSettings.model_validate(
            {
                "redis_url": redis_url,
                "objects_url": f"file://{self.directory}/objects",
                "keep_hot": 2,
                "redis_timeout_seconds": REDIS_TIMEOUT_SECONDS,
            }
        )

    async def _store(self, redis_url: str, *, tampered: bool) -> ObservedStore:
        with pytest.MonkeyPatch.context() as patch:
            if tampered:
                patch.setattr("foundry.store.cartridges.Objects", self.objects)
            store = ObservedStore(self._settings(redis_url))
        store.observer = self.observer
        with suppress(StoreUnavailable):
            await store.rebuild()
        return store
