"""Keeps one Kubernetes Job for every run that needs a worker, and runs in step with their Jobs.

Every gateway does so by itself: a Job's name follows from its run, and a run is ended only under a claim of its own,
so that gateways need not know of each other. What is true is looked at anew every time; nothing is remembered that
could be wrong.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import suppress

import structlog
from kubernetes.utils.quantity import parse_quantity

from foundry.errors import Fenced, FoundryError, InvalidArgument, RunNotFound, RunOver
from foundry.store import ActiveRuns, Desired, Resources, RunRecord, RunState, RunStore
from foundry.tasks import end
from services.gateway import metrics
from services.gateway.errors import ClusterRefused
from services.gateway.kubernetes.cluster import Cluster
from services.gateway.kubernetes.job import Job, JobTemplate
from services.gateway.settings import JobSettings

log = structlog.get_logger(__name__)

# Long enough to write a run's end.
_LEASE_SECONDS = 30.0


class Jobs:
    def __init__(self, settings: JobSettings, runs: RunStore) -> None:
        """Raises InvalidArgument if there is no cluster to reach."""
        self._settings = settings
        self._runs = runs
        self._cluster = Cluster(settings)
        # As last seen, by run.
        self._jobs: dict[str, Job] = {}
        self._template: JobTemplate | None = None
        # Since when a Job is to end by itself, by run, in `time.monotonic()`.
        self._ending: dict[str, float] = {}
        self._woken = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._watcher is not None:
            await end(self._watcher)
        self._cluster.close()

    def wake(self) -> None:
        """Look now: a run was made or cancelled."""
        self._woken.set()

    def name_of(self, run_id: str) -> str | None:
        """The run's Job, if there was one at the last look."""
        job = self._jobs.get(run_id)
        return job.name if job is not None else None

    def check(self, resources: Resources) -> None:
        """Raises InvalidArgument, naming the field, if it is more than a run may ask for."""
        settings, nodes = self._settings, resources.nodes
        if nodes > settings.max_nodes:
            raise InvalidArgument(
                f"resources.nodes is {nodes}, at most {settings.max_nodes} may be asked for", field="resources.nodes"
            )
        for name, asked, most in (
            ("cpu", resources.cpu, settings.max_cpus),
            ("memory", resources.memory, settings.max_memory_bytes),
            ("gpus", resources.gpus, settings.max_gpus),
        ):
            if parse_quantity(asked or 0) * nodes > most:  # type: ignore[no-untyped-call]
                each = f" in each of {nodes} pods" if nodes > 1 else ""
                raise InvalidArgument(
                    f"resources.{name} is {asked}{each}, at most {most} may be asked for", field=f"resources.{name}"
                )

    async def _watch(self) -> None:
        wait_seconds = self._settings.poll_seconds
        while True:
            self._woken.clear()
            if await self.reconcile():
                wait_seconds = self._settings.poll_seconds
            else:
                wait_seconds = min(2 * wait_seconds, self._settings.max_backoff_seconds)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), wait_seconds * random.uniform(0.8, 1.0))

    async def reconcile(self) -> bool:
        """One look at all runs and Jobs; False if something failed and is to be tried again. Raises nothing."""
        try:
            # Jobs before runs: a Job that is made in between is asked for again, and found to exist.
            self._jobs = {job.run_id: job for job in await self._cluster.jobs()}
            active = await self._runs.active()
        except Exception as error:
            return self._failed(error)
        self._template = None
        self._ending = {run_id: since for run_id, since in self._ending.items() if run_id in self._jobs}
        settled = [await self._settle(run_id, active) for run_id in sorted(active.waiting | self._jobs.keys())]
        return all(settled)

    async def _settle(self, run_id: str, active: ActiveRuns) -> bool:
        job = self._jobs.get(run_id)
        try:
            record = await self._runs.get(run_id)
            if record.state.over:
                await self._clear_away(record, job)
            elif record.desired is Desired.CANCEL:
                await self._cancel(record, job, held=run_id in active.held)
            elif job is None:
                await self._make(record)
            elif job.failure:
                await self._end(run_id, f"JOB_FAILED: job {job.name} failed: {job.failure}")
            elif run_id in active.waiting:
                await self._wait_for(record, job)
        except RunNotFound:
            # Another release's, or Redis was emptied and does not know its runs yet.
            pass
        except Exception as error:
            return self._failed(error, run_id)
        return True

    async def _make(self, record: RunRecord) -> None:
        try:
            if self._template is None:
                self._template = await self._cluster.template()
            manifest = self._template.job(record.run_id, record.spec.resources)
            created = await self._cluster.create(manifest)
        except FoundryError as error:
            await self._runs.explain_queued(record.run_id, f"a job, which can't be made: {error.message}")
            raise
        job = self._jobs[record.run_id] = Job.of(manifest)
        metrics.JOBS.labels("created" if created else "existed").inc()
        log.info("job created" if created else "job exists", run=record.run_id, job=job.name)

    async def _wait_for(self, record: RunRecord, job: Job) -> None:
        """The run's Job is there, but no worker."""
        if job.complete:
            # It saw the run's end, and Redis was lost before that was written down: another goes on.
            await self._delete(job)
        else:
            await self._runs.explain_queued(record.run_id, job.waiting_for())

    async def _cancel(self, record: RunRecord, job: Job | None, *, held: bool) -> None:
        """Its worker ends the run after the step in hand; without a worker, or if that takes too long, we do."""
        if not held:
            await self._end(record.run_id, "")
        elif job is not None and self._has_had_its_time(record.run_id):
            await self._delete(job)

    async def _clear_away(self, record: RunRecord, job: Job | None) -> None:
        """The Job of a cancelled run goes at once. Others end by themselves and stay for their logs, until their TTL;
        but one whose pod never came up would wait for ever."""
        if job is not None and (
            record.state is RunState.CANCELLED or (not job.finished and self._has_had_its_time(record.run_id))
        ):
            await self._delete(job)

    async def _end(self, run_id: str, error: str) -> None:
        """End a run that nobody holds: as cancelled if that is wished, else as failed. Nothing if a worker has it."""
        with suppress(RunOver, Fenced):
            claimed = await self._runs.claim_run(run_id, "gateway", _LEASE_SECONDS)
            if claimed is not None:
                await self._runs.finish(run_id, claimed.attempt, RunState.FAILED, error=error)
                metrics.JOBS.labels("failed").inc()
                log.warning("run failed with its job", run=run_id, error=error)

    async def _delete(self, job: Job) -> None:
        if not job.deleting:
            await self._cluster.delete(job.name)
            metrics.JOBS.labels("deleted").inc()
            log.info("job deleted", run=job.run_id, job=job.name)

    def _has_had_its_time(self, run_id: str) -> bool:
        since = self._ending.setdefault(run_id, time.monotonic())
        return time.monotonic() - since >= self._settings.cancel_grace_seconds

    def _failed(self, error: Exception, run_id: str | None = None) -> bool:
        """Say so; the next look tries again."""
        refused = isinstance(error, ClusterRefused | InvalidArgument)
        metrics.JOBS.labels("refused" if refused else "error").inc()
        if isinstance(error, FoundryError):
            log.warning("jobs not settled", run=run_id, reason=error.reason, error=error.message)
        else:
            log.error("jobs not settled", run=run_id, exc_info=error)
        return False
