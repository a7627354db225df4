"""A data set while it is written: whatever shard stands is read, and not made again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial

from foundry.store import DatasetSummary
from foundry.store.conversations import ContentDigest
from services.trainer.attempt import Attempt
from services.trainer.data.asked import Asked
from services.trainer.data.conversation import Conversation

# Conversations of a shard, which are asked for together.
ROUND = 32

Make = Callable[[Sequence[Asked]], Awaitable[list[Conversation]]]


class Shards:
    def __init__(self, attempt: Attempt, dataset: str, model_fingerprint: str) -> None:
        self._attempt, self._dataset, self._model_fingerprint = attempt, dataset, model_fingerprint
        self._rows: list[Conversation] = []

    async def family(self, family: str, asked: Sequence[Asked], make: Make) -> list[Conversation]:
        """All of a family, a shard at a time; they are of the data set then."""
        rows: list[Conversation] = []
        for number, begin in enumerate(range(0, len(asked), ROUND)):
            await self.tell(family, begin, len(asked))
            rows += await self.one(family, number, partial(make, asked[begin : begin + ROUND]))
        if asked:
            await self.tell(family, len(asked), len(asked))
        self._rows += rows
        return rows

    async def one(
        self, family: str, number: int, make: Callable[[], Awaitable[list[Conversation]]]
    ) -> list[Conversation]:
        """The shard that stands; else what is made, or what another attempt wrote meanwhile."""
        rows = await self._attempt.read_shard(self._dataset, family, number)
        if rows is None:
            made = [asdict(each) for each in await make()]
            rows = await self._attempt.append_shard(self._dataset, family, number, made)
        return [Conversation(**row) for row in rows]

    async def finish(self, document_tokens: int) -> DatasetSummary:
        """Counts by family, and coverage: in how many passages that are asked about each token is, on average."""
        families: dict[str, dict[str, float]] = {}
        for row in self._rows:
            counts = families.setdefault(row.family, {"conversations": 0, "answer_tokens": 0, "coverage": 0.0})
            counts["conversations"] += 1
            counts["answer_tokens"] += len(row.answer_ids)
            counts["coverage"] += row.passage_tokens / document_tokens
        content = ContentDigest()
        content.add(map(asdict, self._rows))
        summary = DatasetSummary(digest=content.value, families=families)
        summary = await self._attempt.finish_dataset(self._dataset, summary)
        await self._attempt.tell(
            {
                "type": "dataset",
                "dataset": self._dataset,
                "digest": summary.digest,
                "families": summary.families,
                # Whose tokens they are.
                "model_fingerprint": self._model_fingerprint,
            }
        )
        return summary

    async def tell(self, stage: str, done: int, total: int) -> None:
        await self._attempt.tell({"type": "progress", "stage": stage, "done": done, "total": total})
