"""Documents whose KV had to leave the teacher's device: they come back, are put again, or are refused for good."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY

from foundry.errors import ContextNotFound, ResourceExhausted
from foundry.model.lm import FrozenLM
from foundry.rpc.channel import open_channel
from foundry.v1 import teacher_pb2, teacher_pb2_grpc
from services.teacher.contexts import Contexts
from services.teacher.pages import PAGE_BYTES
from services.teacher.settings import TeacherSettings
from services.trainer.signals import signals_of
from tests.contract.test_teacher import DOCUMENTS, FORWARD, SAMPLES, connect, put, score, serving
from tests.tiny import build_tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def lm(directory: Path) -> FrozenLM:
    return FrozenLM.load(directory)


async def test_a_context_that_is_never_there_is_put_once_and_no_more(
    lm: FrozenLM, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(lm, TeacherSettings(model=directory, reserve_tokens=64)) as address:
        teacher = await connect(lm, address, DOCUMENTS[0])
        puts: list[object] = []
        honest = Contexts.put

        def counted(contexts: Contexts, *arguments: object) -> None:
            puts.append(arguments)
            honest(contexts, *arguments)  # type: ignore[arg-type]

        def gone(contexts: Contexts, keys: object) -> None:
            raise ContextNotFound("it left again")

        monkeypatch.setattr(Contexts, "put", counted)
        monkeypatch.setattr(Contexts, "get", gone)
        with pytest.raises(ContextNotFound, match="left again"):
            await signals_of(teacher, SAMPLES, FORWARD)
        assert len(puts) == 1
        await teacher.close()


async def test_evicted_context_is_put_again(lm: FrozenLM, directory: Path) -> None:
    token_bytes = lm.spec.num_layers * 2 * lm.spec.num_kv_heads * lm.spec.head_dim * 4
    settings = TeacherSettings(model=directory, reserve_tokens=64, context_budget_bytes=30 * token_bytes)
    async with serving(lm, settings) as address:
        first = await connect(lm, address, DOCUMENTS[0])
        before = await signals_of(first, SAMPLES, FORWARD)
        second = await connect(lm, address, DOCUMENTS[1])
        assert REGISTRY.get_sample_value("foundry_teacher_resident_contexts", {"tier": "device"}) == 1
        after = await signals_of(first, SAMPLES, FORWARD)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # type: ignore[arg-type]
        with pytest.raises(ResourceExhausted, match="budget"):
            await connect(lm, address, DOCUMENTS[1] * 2)
        await first.close()
        await second.close()


@pytest.mark.parametrize("tiers", ["host", "disk", "both"])
async def test_evicted_context_is_scored_without_being_computed_again(
    lm: FrozenLM, directory: Path, tmp_path: Path, tiers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two documents where one has room, evicted twice each: by turns, and both in one call."""
    token_bytes = lm.spec.kv_bytes_per_token(lm.dtype)
    settings = TeacherSettings(
        model=directory,
        reserve_tokens=64,
        context_budget_bytes=30 * token_bytes,
        host_context_budget_bytes=2 * PAGE_BYTES if tiers != "disk" else 0,
        disk_context_budget_bytes=0 if tiers == "host" else 100 * token_bytes,
        disk_context_directory=None if tiers == "host" else tmp_path / "contexts",
    )
    prefills, evictions = (
        partial(REGISTRY.get_sample_value, f"foundry_teacher_{name}", labels)
        for name, labels in (("prefill_seconds_count", {}), ("context_evictions_total", {"tier": "device"}))
    )
    want = teacher_pb2.Want(hidden=True)
    async with serving(lm, settings) as address, open_channel(address) as channel:
        stub: teacher_pb2_grpc.TeacherAsyncStub = teacher_pb2_grpc.TeacherStub(channel)
        items, fresh = [], []
        for document in DOCUMENTS:
            items.append((await put(stub, lm, document), SAMPLES[1]))
            fresh += await score(stub, lm, items[-1:], want)
        computed, evicted = prefills(), evictions()
        by_turns = [part for item in (*items, *items) for part in await score(stub, lm, [item], want)]
        together = await score(stub, lm, items, want)
        assert [part.hidden for part in by_turns] == [part.hidden for part in (*fresh, *fresh)]
        assert [part.hidden for part in together] == [part.hidden for part in fresh]
        assert [part.context_digest for part in together] == [digest for digest, _ in items]
        assert prefills() == computed
        assert (evictions() or 0) - (evicted or 0) == 6
