"""A run as it stands: its state, what is wanted of it, and the record that people read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import Field

from foundry.store.names import check_tenant_of
from foundry.store.objects.runs import ArchivedRun
from foundry.store.redis.keys import key
from foundry.store.spec import RunSpec
from foundry.store.unreadable import reading
from foundry.untrusted import parse_count, parse_json
from foundry.validation import Checked


class RunState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    # By a person's wish.
    PAUSED = "paused"
    # For a service to come back.
    WAITING = "waiting"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def over(self) -> bool:
        return self in (RunState.SUCCEEDED, RunState.FAILED, RunState.CANCELLED)


class Desired(StrEnum):
    """What a person wants of a run; workers learn it from their heartbeats."""

    CONTINUE = "continue"
    PAUSE = "pause"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimedRun:
    run_id: str
    attempt: int
    spec: RunSpec
    desired: Desired
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class ActiveRuns:
    """Ids of the runs that a worker holds now, and of those that wait for one."""

    held: frozenset[str]
    waiting: frozenset[str]


class RunRecord(Checked):
    """A run as it stands. Times are RFC 3339, UTC."""

    run_id: str = Field(serialization_alias="id")
    """The run's id."""

    spec: RunSpec
    """What was asked for."""

    tenant: str = Field(default="", exclude_if=lambda value: not value)
    """Whose documents and data sets it uses; not shown where it is nobody's."""

    state: RunState
    """`paused` by a person's wish, held by no worker; `waiting` for a service to come back."""

    attempt: int
    """How often a worker took it up: the fencing token."""

    desired: Desired
    """What a person wants of it."""

    worker: str = ""
    """Who has it."""

    waiting_for: str = ""
    """The service that it waits for."""

    created_at: str
    """When it was asked for."""

    started_at: str | None = None
    """When a worker first took it up, as far as Redis knows."""

    finished_at: str | None = None
    """When it succeeded, failed or was cancelled."""

    error: str | None = None
    """Why it failed."""

    result: Mapping[str, Any] | None = None
    """The last version and what was measured."""

    last_event: Mapping[str, Any] | None = None
    """The worker's last report."""


def record_of(run_id: str, fields: Mapping[str, str]) -> RunRecord:
    """What Redis holds of a run. Raises DigestMismatch if that is damaged."""
    with reading(f"{key('run', run_id)} in Redis"):
        spec = RunSpec.from_json(fields["spec"])
        return RunRecord(
            run_id=run_id,
            spec=spec,
            tenant=check_tenant_of(fields.get("tenant", ""), spec.name),
            state=RunState(fields["state"]),
            attempt=parse_count(fields["attempt"]),
            desired=desired_of(fields["desired"]),
            worker=fields.get("worker", ""),
            waiting_for=fields.get("waiting_for", ""),
            created_at=_time(parse_count(fields["created"])),
            started_at=_time(parse_count(fields["started"])) if "started" in fields else None,
            finished_at=_time(parse_count(fields["finished"])) if "finished" in fields else None,
            error=parse_json(fields.get("error", "null")),
            result=parse_json(fields.get("result", "null")),
            last_event=parse_json(fields.get("last_event", "null")),
        )


def archived_record(run: ArchivedRun) -> RunRecord:
    final = run.final
    # Whether its worker lives is not known without Redis.
    state = RunState(final.state) if final else RunState.RUNNING if run.attempt else RunState.QUEUED
    return RunRecord(
        run_id=run.run_id,
        spec=RunSpec.from_json(run.spec),
        tenant=run.tenant,
        state=state,
        attempt=run.attempt,
        desired=desired_of(run.desired),
        created_at=_time(run.created_ms),
        finished_at=_time(final.finished_ms) if final else None,
        error=final.error if final else None,
        result=final.result if final else None,
    )


def desired_of(text: str) -> Desired:
    return Desired(text) if text else Desired.CONTINUE


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds")
