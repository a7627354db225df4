"""A document's KV that nobody waits for any more: it leaves the device, and is taken up where it was left."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from foundry.identity import ids_digest
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from foundry.v1 import teacher_pb2
from services.teacher.pages import Key
from services.teacher.servicer import TeacherServicer
from services.teacher.settings import TeacherSettings
from tests.tiny import CLOCK, build_tiny_model

DOCUMENT, OTHER = "The treaty was signed in spring, says the president of the congress.", "The harbour is open again."
CHUNK_TOKENS = 4
WAIT_SECONDS = 60.0


class Site:
    """A teacher whose device stops after each chunk, until it may go on for good."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lm = FrozenLM.load(directory)
        self.servicer = TeacherServicer(self.lm, TeacherSettings(model=directory, reserve_tokens=64))
        # Of each chunk: tokens of the context, and how many then have their KV.
        self.computed: list[tuple[int, int]] = []
        self._begun, self._let_go = threading.Event(), threading.Event()
        fill = FrozenLM.fill

        def stopping(lm: FrozenLM, kv_L2GPD: Tensor, ids: Sequence[int], begin: int = 0) -> Iterator[int]:
            for num_tokens in fill(lm, kv_L2GPD, ids, begin, chunk_tokens=CHUNK_TOKENS):
                self.computed.append((len(ids), num_tokens))
                yield num_tokens
                self._begun.set()
                self._let_go.wait(WAIT_SECONDS)

        monkeypatch.setattr(self.lm, "fill", stopping.__get__(self.lm))

    def ids(self, document: str) -> list[int]:
        return ChatTemplate(self.lm.tokenizer, CLOCK).context(document)

    async def put(self, document: str) -> str:
        request = teacher_pb2.PutContextRequest(model_fingerprint=self.lm.spec.fingerprint, document=document)
        return (await self.servicer.PutContext(request, None)).context_digest  # type: ignore[arg-type]

    async def give_up(self, document: str) -> None:
        """As a caller whose time is over while the device is at the first chunk."""
        asking = asyncio.create_task(self.put(document))
        assert await asyncio.to_thread(self._begun.wait, WAIT_SECONDS)
        asking.cancel()
        await asyncio.wait({asking})
        self._let_go.set()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(build_tiny_model(tmp_path), monkeypatch)
    yield site
    site.servicer.close()


async def test_it_is_taken_up_where_it_was_left(site: Site, tmp_path: Path) -> None:
    ids = site.ids(DOCUMENT)
    whole = FrozenLM.load(tmp_path).prefill(ids, chunk_tokens=CHUNK_TOKENS)
    await site.give_up(DOCUMENT)
    assert await site.put(DOCUMENT) == ids_digest(ids)
    # Each chunk once.
    ends = [min(end, len(ids)) for end in range(CHUNK_TOKENS, len(ids) + CHUNK_TOKENS, CHUNK_TOKENS)]
    assert site.computed == [(len(ids), end) for end in ends]
    assert site.servicer._contexts.get([Key("", ids_digest(ids))])[0].equal(whole)


async def test_another_one_does_not_wait_for_it(site: Site) -> None:
    await site.give_up(DOCUMENT)
    await site.put(OTHER)
    num_left, num_other = len(site.ids(DOCUMENT)), len(site.ids(OTHER))
    assert (num_left, num_left) not in site.computed
    assert site.computed[-1] == (num_other, num_other)
