"""All kinds of faults, in one table.

A kind arms its fault at a seam, where the next operation that it fits fires it, or does its damage at once. Those are
rare that cost a deadline or a whole attempt.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from services.trainer.run import Run
from tests.chaos.faults import damage, storage, tampering
from tests.chaos.faults.fault import Fault
from tests.chaos.faults.link import Direction, Harm, Link
from tests.chaos.faults.servers import Tamper
from tests.chaos.faults.storage import Tamper as ObjectsTamper
from tests.chaos.faults.world import World


@dataclass(frozen=True)
class Moment:
    """Between two steps of a run: the policy is published, and not yet sampled from."""

    world: World
    run: Run
    rng: random.Random

    @property
    def digest(self) -> str:
        return self.run.progress.policy.digest


Inject = Callable[[Moment, Fault], Awaitable[None]]


@dataclass(frozen=True)
class Kind:
    """`rare` ones are drawn a fifth as often."""

    inject: Inject
    rare: bool = False


def on_redis(harm: Harm, direction: Direction | None = None, *, seconds: float = 0.0) -> Inject:
    """Between a store (the trainer's or the rollout servers') and Redis."""

    async def inject(moment: Moment, fault: Fault) -> None:
        link = moment.rng.choice([moment.world.trainer_redis, moment.world.rollout_redis])
        _arm(link, moment.rng, fault, harm, direction, seconds)

    return inject


def on_rpc(harm: Harm, direction: Direction | None = None, *, seconds: float = 0.0) -> Inject:
    """Between the trainer and a rollout server or the teacher."""

    async def inject(moment: Moment, fault: Fault) -> None:
        host = moment.rng.choice([*moment.world.rollouts, moment.world.teacher])
        _arm(host.link, moment.rng, fault, harm, direction, seconds)

    return inject


def _arm(link: Link, rng: random.Random, fault: Fault, harm: Harm, direction: Direction | None, seconds: float) -> None:
    direction = direction or rng.choice(list(Direction))
    # Half of them among the frames that steer, half anywhere in a step's traffic, most of which is tensors.
    offset = rng.randrange(400 if rng.random() < 0.5 else 8000)
    link.arm(fault, harm, direction, offset=offset, bit=rng.randrange(8), seconds=seconds)


def on_put(tamper: ObjectsTamper) -> Inject:
    async def inject(moment: Moment, fault: Fault) -> None:
        moment.world.objects.arm_put(fault, tamper)

    return inject


async def put_late(moment: Moment, fault: Fault) -> None:
    moment.world.objects.arm_put(fault, storage.overtaken(moment.world.objects))


def on_get(make: Callable[[random.Random], ObjectsTamper]) -> Inject:
    """On the blob of the policy, whose hot copy is lost."""

    async def inject(moment: Moment, fault: Fault) -> None:
        moment.world.objects.arm_get(fault, make(moment.rng), prefix="blobs/")
        await damage.delete_hot(moment.world, moment.rng, moment.digest)

    return inject


def on_checkpoint(make: Callable[[random.Random], ObjectsTamper]) -> Inject:
    """On what the next attempt reads first, after another one has ended this."""

    async def inject(moment: Moment, fault: Fault) -> None:
        prefix = f"runs/{moment.run.claimed.run_id}/checkpoints/"
        moment.world.objects.arm_get(fault, make(moment.rng), prefix=prefix)
        await _take_over(moment)

    return inject


def on_rebuild(make: Callable[[random.Random], ObjectsTamper], prefix: str) -> Inject:
    """On what is read to restore a Redis that was emptied."""

    async def inject(moment: Moment, fault: Fault) -> None:
        moment.world.objects.arm_get(fault, make(moment.rng), prefix=prefix)
        await moment.world.empty_redis()

    return inject


def at_rest(harm: Callable[[World, random.Random, str], Awaitable[bool]]) -> Inject:
    async def inject(moment: Moment, fault: Fault) -> None:
        fault.fired, fault.detail = await harm(moment.world, moment.rng, moment.digest), moment.digest

    return inject


async def emptied(moment: Moment, fault: Fault) -> None:
    await moment.world.empty_redis()
    fault.fired = True


async def events_lost(moment: Moment, fault: Fault) -> None:
    await moment.world.redis.xtrim("foundry:events", maxlen=0, approximate=False)
    fault.fired = True


async def intruder(moment: Moment, fault: Fault) -> None:
    fault.fired = await damage.intrude(moment.world, moment.rng)


async def taken_over(moment: Moment, fault: Fault) -> None:
    await _take_over(moment)
    fault.fired = True


async def _take_over(moment: Moment) -> None:
    run_id, step = moment.run.claimed.run_id, moment.run.progress.step + moment.rng.randrange(2)
    await damage.take_over(moment.world, moment.rng, run_id, step)


async def evicted(moment: Moment, fault: Fault) -> None:
    fault.fired = sum(host.evict() for host in moment.world.rollouts) > 0


def on_rollout(tamper: Tamper | Callable[[random.Random], Tamper], *, seeded: bool = True) -> Inject:
    async def inject(moment: Moment, fault: Fault) -> None:
        moment.world.rollout_calls.arm(fault, _made(tamper, moment.rng, seeded))

    return inject


def on_teacher(tamper: Tamper | Callable[[random.Random], Tamper], *, seeded: bool = True) -> Inject:
    async def inject(moment: Moment, fault: Fault) -> None:
        moment.world.teacher_calls.arm(fault, _made(tamper, moment.rng, seeded))

    return inject


def _made(tamper: Tamper | Callable[[random.Random], Tamper], rng: random.Random, seeded: bool) -> Tamper:
    return tamper(rng) if seeded else tamper  # type: ignore[arg-type,return-value]


_DELAY_SECONDS = 0.02
_DROP_SECONDS = 0.5
_TURNS = 3

KINDS: dict[str, Kind] = {
    # The store's seam: the way to Redis.
    "redis-cut": Kind(on_redis(Harm.CUT)),
    "redis-truncate": Kind(on_redis(Harm.TRUNCATE)),
    "redis-delay": Kind(on_redis(Harm.DELAY, seconds=_DELAY_SECONDS)),
    "redis-drop": Kind(on_redis(Harm.DROP, seconds=_DROP_SECONDS), rare=True),
    "redis-flip-reply": Kind(on_redis(Harm.FLIP, Direction.REPLY)),
    "redis-flip-request": Kind(on_redis(Harm.FLIP, Direction.REQUEST)),
    # The way to object storage.
    "objects-refuse": Kind(on_put(storage.refused)),
    "objects-time-out": Kind(on_put(storage.timed_out)),
    "objects-put-twice": Kind(on_put(storage.repeated)),
    "objects-reply-lost": Kind(on_put(storage.reply_lost)),
    "objects-put-late": Kind(put_late),
    "objects-truncate": Kind(on_get(storage.truncated)),
    "objects-flip": Kind(on_get(storage.flipped)),
    "checkpoint-truncate": Kind(on_checkpoint(storage.truncated), rare=True),
    "checkpoint-flip": Kind(on_checkpoint(storage.flipped), rare=True),
    "manifest-flip": Kind(on_rebuild(storage.flipped, "cartridges/")),
    "manifest-truncate": Kind(on_rebuild(storage.truncated, "cartridges/")),
    "run-flip": Kind(on_rebuild(storage.flipped, "runs/")),
    # What is stored.
    "hot-flip": Kind(at_rest(damage.flip_hot)),
    "hot-delete": Kind(at_rest(damage.delete_hot)),
    "hot-truncate": Kind(at_rest(damage.truncate_hot)),
    "blob-flip": Kind(at_rest(damage.flip_blob)),
    "redis-emptied": Kind(emptied),
    "events-lost": Kind(events_lost),
    "intruder": Kind(intruder),
    "taken-over": Kind(taken_over, rare=True),
    "evicted": Kind(evicted),
    # The RPC seam: connections.
    "rpc-cut": Kind(on_rpc(Harm.CUT)),
    "rpc-truncate": Kind(on_rpc(Harm.TRUNCATE)),
    "rpc-delay": Kind(on_rpc(Harm.DELAY, seconds=_DELAY_SECONDS)),
    "rpc-drop": Kind(on_rpc(Harm.DROP, seconds=_DROP_SECONDS), rare=True),
    "rpc-flip": Kind(on_rpc(Harm.FLIP)),
    # Rollout servers.
    "rollout-kill": Kind(on_rollout(tampering.killed, seeded=False)),
    "rollout-delay": Kind(on_rollout(tampering.delayed, seeded=False)),
    "rollout-drop": Kind(on_rollout(tampering.dropped, seeded=False), rare=True),
    "rollout-truncate": Kind(on_rollout(tampering.truncated, seeded=False)),
    "rollout-double": Kind(on_rollout(tampering.doubled, seeded=False)),
    "rollout-ask-twice": Kind(on_rollout(tampering.asked_twice, seeded=False)),
    "rollout-reorder": Kind(on_rollout(tampering.reordered)),
    "rollout-swap": Kind(on_rollout(tampering.swapped)),
    "rollout-flip-ids": Kind(on_rollout(tampering.flipped_ids)),
    "rollout-flip-logprobs": Kind(on_rollout(tampering.flipped_logprobs)),
    "rollout-flip-digest": Kind(on_rollout(tampering.flipped_digest)),
    "rollout-flip-prompt": Kind(on_rollout(tampering.flipped_prompt)),
    "rollout-other-version": Kind(on_rollout(tampering.other_version)),
    "rollout-lie": Kind(on_rollout(tampering.lying)),
    # The teacher.
    "teacher-kill": Kind(on_teacher(tampering.killed, seeded=False)),
    "teacher-delay": Kind(on_teacher(tampering.delayed, seeded=False)),
    "teacher-drop": Kind(on_teacher(tampering.dropped, seeded=False), rare=True),
    "teacher-truncate": Kind(on_teacher(tampering.truncated, seeded=False)),
    "teacher-double": Kind(on_teacher(tampering.doubled, seeded=False)),
    "teacher-ask-twice": Kind(on_teacher(tampering.asked_twice, seeded=False)),
    "teacher-reorder": Kind(on_teacher(tampering.reordered)),
    "teacher-flip-hidden": Kind(on_teacher(tampering.flipped_hidden)),
    "teacher-flip-shape": Kind(on_teacher(tampering.flipped_shape)),
    "teacher-flip-checksum": Kind(on_teacher(tampering.flipped_checksum)),
    "teacher-flip-ids": Kind(on_teacher(tampering.flipped_scored_ids)),
    "teacher-other-samples": Kind(on_teacher(tampering.other_samples)),
    "teacher-shift": Kind(on_teacher(tampering.shifted)),
    "teacher-other-context": Kind(on_teacher(tampering.other_context)),
}


def turns(seed: int, kinds: dict[str, Kind]) -> list[str]:
    """What an episode begins with: seeds that follow each other go through the whole table."""
    names = list(kinds)
    return [names[(seed * _TURNS + place) % len(names)] for place in range(_TURNS)]


def draw(rng: random.Random, kinds: dict[str, Kind]) -> str:
    names = list(kinds)
    return rng.choices(names, weights=[1 if kinds[name].rare else 5 for name in names])[0]
