"""A run's data set: what is in it, what never is, and that a writer killed anywhere is taken up where it was."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from foundry.errors import DigestMismatch, InvalidArgument
from foundry.identity import content_digest, ids_digest
from foundry.model.lm import FrozenLM
from foundry.model.template import ChatTemplate
from foundry.rpc.answers import Answer, Prompt
from foundry.rpc.rollout import RolloutClient
from foundry.selfstudy.passages import num_tokens, pieces
from foundry.selfstudy.questions import EVIDENCE_TOKENS
from foundry.selfstudy.wording import normalised
from foundry.store import DatasetStore, DatasetSummary, DocumentPrompts, Objects, RunSpec, SelfStudyPrompts
from foundry.store.conversations import KEYS, ContentDigest, ConversationRow, parts_of
from services.trainer.attempt import Attempt
from services.trainer.contexts import Context
from services.trainer.data.conversation import Conversation
from services.trainer.data.curriculum import Curriculum
from services.trainer.data.writer import DatasetWriter
from tests.store_data import run_spec
from tests.tiny import CLOCK, build_tiny_model

T = TypeVar("T")
DOCUMENT = "".join(f"The price of the grain of kind {number} is {3 * number} pennies a sack. " for number in range(20))
FILE = DocumentPrompts(digest="blake3:" + "11" * 32)
HELDOUT = DocumentPrompts(digest="blake3:" + "22" * 32)
EVERYTHING: dict[str, Any] = {
    "mode": "hybrid",
    "num_steps": 20,
    "batch_size": 16,
    "max_new_tokens": 12,
    "prompts": SelfStudyPrompts(num_prompts=40),
    "families": ("recite", "cloze", "evidence", "question", "summary"),
    "general_share": 0.1,
}


class Killed(Exception):
    """In the middle of something."""


class Calls:
    """Counts what is asked and written, and kills at one of these calls."""

    def __init__(self, kill_at: int = 0) -> None:
        self.kill_at, self.num = kill_at, 0

    def __call__(self) -> None:
        self.num += 1
        if self.num == self.kill_at:
            raise Killed


class Retrying:
    async def call(self, peer: str, attempt: Callable[[], Awaitable[T]]) -> T:
        return await attempt()


class OneAttempt:
    """What the writer needs of an attempt, on a real store of data sets."""

    def __init__(self, spec: RunSpec, store: DatasetStore, files: Mapping[str, str], calls: Calls) -> None:
        self.spec, self.retry = spec, Retrying()
        self._store, self._files, self._calls = store, files, calls
        self.events: list[Mapping[str, Any]] = []

    async def tell(self, event: Mapping[str, Any]) -> None:
        self.events.append(event)

    async def document(self, digest: str) -> str:
        return self._files[digest]

    async def read_shard(self, dataset: str, family: str, number: int) -> list[dict[str, Any]] | None:
        return await self._store.shard(dataset, family, number)

    async def append_shard(
        self, dataset: str, family: str, number: int, rows: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        self._calls()
        written = await self._store.append(dataset, family, number, rows)
        self._calls()
        return written

    async def finish_dataset(self, dataset: str, summary: DatasetSummary) -> DatasetSummary:
        self._calls()
        return await self._store.finish(dataset, summary)


class Rollouts:
    """Answers by seed alone."""

    def __init__(self, lm: FrozenLM, calls: Calls, wordings: Sequence[str] = ()) -> None:
        self._lm, self._calls, self._wordings = lm, calls, wordings
        self.asked: list[Prompt] = []

    async def ask_base(
        self, prompts: Sequence[Prompt], *, temperature: float, max_new_tokens: int, stop: Sequence[str] = ()
    ) -> list[Answer]:
        self._calls()
        self.asked += prompts
        return [self._answer(prompt, max_new_tokens) for prompt in prompts]

    def _answer(self, prompt: Prompt, max_new_tokens: int) -> Answer:
        draw = random.Random(prompt.seed)
        name = hashlib.sha256(str(prompt.seed).encode()).hexdigest()[:8]
        text = draw.choice(self._wordings) if self._wordings else f"What is the price of {name}?"
        ids = [draw.randrange(3, 250) for _ in range(draw.randint(1, max_new_tokens))]
        return Answer(ids, [-draw.random() for _ in ids], text, len(ids) == max_new_tokens)


class Place:
    """A model, a store and the files of a run."""

    def __init__(self, lm: FrozenLM, directory: Path, files: Mapping[str, str] | None = None) -> None:
        self.lm, self.template = lm, ChatTemplate(lm.tokenizer, CLOCK)
        self.store = DatasetStore(Objects.open(f"file://{directory}", retry_seconds=1))
        self.files = files or {}
        self.events: list[Mapping[str, Any]] = []
        self.asked: list[Prompt] = []
        self.dataset = ""

    async def write(
        self, kill_at: int = 0, wordings: Sequence[str] = (), documents: Sequence[str] = (DOCUMENT,), **values: Any
    ) -> Curriculum:
        calls = Calls(kill_at)
        attempt = OneAttempt(run_spec(**EVERYTHING | values), self.store, self.files, calls)
        rollouts = Rollouts(self.lm, calls, wordings)
        self.events, self.asked, self.calls = attempt.events, rollouts.asked, calls
        writer = DatasetWriter(
            cast(Attempt, attempt),
            self.lm,
            self.template,
            cast(RolloutClient, rollouts),
            contexts=[Context(content_digest(text.encode()), text, self.template.context(text)) for text in documents],
            bare=Context("", "", self.template.bare()),
            passage_tokens=40,
        )
        self.dataset = writer.dataset
        return await writer.write()


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    """With room for a document and an exercise of each kind: the tiny tokenizer takes many tokens."""
    directory = build_tiny_model(tmp_path_factory.mktemp("model"))
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"max_position_embeddings": 512', '"max_position_embeddings": 4096'))
    return FrozenLM.load(directory)


@pytest.fixture
def place(lm: FrozenLM, tmp_path: Path) -> Place:
    return Place(lm, tmp_path)


def everything(written: Curriculum) -> list[Conversation]:
    return [*written.asked, *written.written, *written.heldout, *written.general, *written.general_heldout]


async def test_what_is_in_it(place: Place) -> None:
    written = await place.write()
    assert len(written.asked) == 40
    families = Counter(each.family for each in written.written)
    # A fifth of 10 steps of 16 each, where the document gives so many.
    assert families["cloze"] == families["evidence"] == families["question"] == 32
    assert 0 < families["recite"] <= 32
    assert 0 < families["summary"] <= 32
    assert (len(written.general), len(written.general_heldout)) == (32, 8)
    context, bare = ids_digest(place.template.context(DOCUMENT)), ids_digest(place.template.bare())
    for each in written.written:
        assert each.context == context
        own_words = each.family in ("recite", "evidence")
        assert each.author == ("document" if own_words else "model")
        assert len(each.logprobs) == (0 if own_words else len(each.answer_ids)) <= 12
        assert each.passage_tokens > 0
    assert {each.context for each in (*written.general, *written.general_heldout)} == {bare}
    assert all(each.answer_ids and each.author == "model" for each in written.heldout)
    assert not any(each.answer_ids or each.author for each in written.asked)
    for family in ("recite", "evidence"):
        said = place.lm.tokenizer.decode(
            list(next(each.answer_ids for each in written.written if each.family == family))
        )
        assert str(said).strip()[:20] in DOCUMENT


@pytest.mark.parametrize("family", ["blank", "evidence"])
async def test_what_the_model_has_no_room_for_is_not_written(place: Place, family: str) -> None:
    wordings = [f"What is the price{' of a sack' * (number % 3)} of kind {number}?" for number in range(2000)]
    asked: dict[str, Any] = {"wordings": wordings, "families": [family], "num_steps": 40}
    turns = sorted(len(each.turn_ids) for each in (await place.write(**asked)).written)
    longest = turns[len(turns) // 2]
    assert longest < turns[-1]
    room = place.lm.spec.max_tokens - len(place.template.context(DOCUMENT))
    written = (await place.write(**asked, max_new_tokens=room - longest)).written
    assert len(written) == sum(turn <= longest for turn in turns)
    assert max(len(each.turn_ids) for each in written) == longest


async def test_no_conversation_is_written_twice(place: Place) -> None:
    """Sentences of the length of a piece are recited in several lengths of pieces."""
    written = await place.write()
    assert max(Counter((tuple(each.turn_ids), tuple(each.answer_ids)) for each in written.written).values()) == 1


async def test_counts_and_coverage_are_said(place: Place) -> None:
    written = await place.write()
    (event,) = [event for event in place.events if event["type"] == "dataset"]
    summary = await place.store.summary(place.dataset)
    assert event == {
        "type": "dataset",
        "dataset": place.dataset,
        "digest": written.digest,
        "families": summary.families,
        "model_fingerprint": place.lm.spec.fingerprint,
    }
    total = num_tokens(DOCUMENT, place.lm.tokenizer)
    for family in ("recite", "cloze", "evidence", "summary"):
        rows = [each for each in written.written if each.family == family]
        assert summary.families[family]["conversations"] == len(rows)
        assert summary.families[family]["answer_tokens"] == sum(len(each.answer_ids) for each in rows)
        assert summary.families[family]["coverage"] == pytest.approx(sum(each.passage_tokens for each in rows) / total)
    # Every passage of the document is recited and completed.
    assert {each.passage for each in written.written if each.family == "cloze"} == set(range(20))


async def test_a_writer_killed_anywhere_is_taken_up(lm: FrozenLM, place: Place, tmp_path: Path) -> None:
    whole = await place.write()
    num_calls = place.calls.num
    draw = random.Random(5)
    for attempt, kill_at in enumerate(sorted(draw.sample(range(1, num_calls + 1), 12))):
        killed = Place(lm, tmp_path / str(attempt))
        with pytest.raises(Killed):
            await killed.write(kill_at)
        # And once more, wherever the second one comes to.
        if draw.random() < 0.5:
            with pytest.raises(Killed):
                await killed.write(draw.randint(1, max(1, num_calls - kill_at - 1)))
        assert await killed.write() == whole
    for same in (whole.asked, [*whole.general, *whole.general_heldout], [*whole.written, *whole.heldout]):
        prompts = Counter(
            each.prompt for each in same if each.family in ("evidence", "question", "summary", "general", "heldout")
        )
        assert max(prompts.values()) == 1


async def test_what_stands_is_not_asked_again(place: Place) -> None:
    first = await place.write()
    assert place.asked
    assert await place.write() == first
    assert not place.asked
    # Another learning rate is the same data; another seed is not.
    assert await place.write(learning_rate=0.5) == first
    assert not place.asked
    assert (await place.write(seed=1)).digest != first.digest


async def test_it_is_read_again_in_the_order_of_its_digest(place: Place) -> None:
    written = await place.write()
    families = run_spec(**EVERYTHING).families
    content, after, found = ContentDigest(), None, list[dict[str, Any]]()
    while (shard := await place.store.following(place.dataset, parts_of(families), after)) is not None:
        family, number, rows = shard
        after = (family, number)
        content.add(ConversationRow.model_validate(row).model_dump() for row in rows)
        found += rows
    assert content.value == written.digest
    assert len(found) == len(everything(written))
    assert tuple(field.name for field in fields(Conversation)) == KEYS
    (event,) = (event for event in place.events if event["type"] == "dataset")
    assert (event["dataset"], event["model_fingerprint"]) == (place.dataset, place.lm.spec.fingerprint)


async def test_of_two_writers_one_is_believed(lm: FrozenLM, place: Place) -> None:
    first = await place.write()
    shard = await place.store.shard(place.dataset, "cloze", 0)
    assert shard is not None
    other = [row | {"answer_ids": [1]} for row in shard]
    assert await place.store.append(place.dataset, "cloze", 0, other) == shard
    with pytest.raises(DigestMismatch, match="its record says"):
        await place.store.finish(place.dataset, DatasetSummary(digest="blake3:" + "0" * 64, families={}))
    assert await place.write() == first


def damage(directory: Path, pattern: str) -> None:
    (file,) = directory.glob(pattern)
    file.write_bytes(file.read_bytes().replace(b"1", b"2", 1))


async def test_a_damaged_shard_is_not_believed(place: Place, tmp_path: Path) -> None:
    await place.write()
    damage(tmp_path, "datasets/*/cloze-000000.json")
    with pytest.raises(DigestMismatch, match="cloze-000000"):
        await place.write()


HELD_OUT_WORDINGS = (
    "what is the price of the GRAIN of kind 3",
    "  “What is the price of the grain, of kind 3?”  ",
    "Complete this sentence from the text - the price of the grain of kind",
)


async def test_what_is_held_out_is_asked_in_no_wording(lm: FrozenLM, tmp_path: Path) -> None:
    lines = [f'{{"prompt": "{wording}"}}' for wording in HELD_OUT_WORDINGS]
    file = ['{"prompt": "What is the price of the grain of kind 3?"}', '{"prompt": "What is the price of kind 4?"}']
    files = {HELDOUT.digest: "\n".join(lines), FILE.digest: "\n".join(file)}
    held = {normalised(wording) for wording in HELD_OUT_WORDINGS}
    place = Place(lm, tmp_path, files)
    written = await place.write(heldout=HELDOUT, prompts=FILE)
    # Two of the three are one, in other spelling.
    assert len(written.heldout) == 2
    assert [each.prompt for each in written.asked] == ["What is the price of kind 4?"]
    trained = [each for each in everything(written) if each not in written.heldout]
    assert not held & {normalised(each.prompt) for each in trained}
    # The model's own questions too: it asks a held-out one and three others.
    others = [f"What is kind {number} good for?" for number in range(6)]
    written = await place.write(
        heldout=HELDOUT,
        prompts=SelfStudyPrompts(num_prompts=3),
        wordings=["What is the price of the grain of KIND 3?", *others],
    )
    assert {each.prompt for each in written.asked} <= set(others)
    # Of what an answer stands beside there are as many as come, none of them held out.
    evidence = {each.prompt for each in written.written if each.family == "evidence"}
    assert evidence
    assert evidence <= set(others)


async def test_evidence_is_the_passage_that_was_asked_about(place: Place) -> None:
    written = await place.write(families=["evidence"], num_steps=40, max_new_tokens=64)
    passages = pieces(DOCUMENT, place.lm.tokenizer, EVIDENCE_TOKENS)
    assert {each.passage for each in written.written} == set(range(len(passages)))
    for each in written.written:
        said = place.lm.tokenizer.decode(list(each.answer_ids))
        assert passages[each.passage].startswith(str(said).strip())


async def test_near_duplicates_are_dropped(place: Place) -> None:
    wordings = [
        "What is the price of grain?",
        "The price of grain is what?",
        "what is the Price of the grain, of grain?",
    ]
    with pytest.raises(InvalidArgument, match=r"wrote 1 different questions .* 4 were asked for"):
        await place.write(wordings=wordings, prompts=SelfStudyPrompts(num_prompts=4))


async def test_a_single_prompt_can_not_be_held_out(lm: FrozenLM, tmp_path: Path) -> None:
    place = Place(lm, tmp_path, {FILE.digest: '{"prompt": "What is the price?"}'})
    with pytest.raises(InvalidArgument, match="too few to hold one out") as caught:
        await place.write(prompts=FILE)
    assert caught.value.field == "heldout"


async def test_of_a_long_file_as_much_is_taken_as_the_steps_can_use(lm: FrozenLM, tmp_path: Path) -> None:
    file = "\n".join(f'{{"prompt": "What is the price of kind {number}?"}}' for number in range(5000))
    place = Place(lm, tmp_path, {FILE.digest: file})
    written = await place.write(prompts=FILE, families=("recite",))
    assert len(written.heldout) == 48, "one in eight of what is taken"
    assert len(written.asked) == 20 * 16
    kinds = sorted(int(each.prompt.rstrip("?").rpartition(" ")[2]) for each in written.asked)
    assert kinds[0] < 1000
    assert kinds[-1] > 4900, "not from all over the file"


OTHER = "".join(f"The ship number {number} has {5 * number} sailors and a dog. " for number in range(40))


async def test_each_conversation_is_about_one_of_several_documents(lm: FrozenLM, tmp_path: Path) -> None:
    place = Place(lm, tmp_path)
    written = await place.write(documents=(DOCUMENT, OTHER))
    lengths = {ids_digest(ids := place.template.context(text)): len(ids) for text in (DOCUMENT, OTHER)}
    for rows in (written.asked, [each for each in written.written if each.family == "cloze"]):
        shares = Counter(each.context for each in rows)
        for context, length in lengths.items():
            assert abs(shares[context] - len(rows) * length / sum(lengths.values())) <= 1
    for each in written.written:
        if each.family in ("recite", "cloze"):
            about = OTHER if "ship" in each.prompt else DOCUMENT
            assert each.context == ids_digest(place.template.context(about))
    assert {each.context for each in written.heldout} == set(lengths)


async def test_of_several_documents_a_line_says_which(lm: FrozenLM, tmp_path: Path) -> None:
    lines = [
        f'{{"prompt": "What is {number}?", "document": "{content_digest((DOCUMENT, OTHER)[number % 2].encode())}"}}'
        for number in range(8)
    ]
    place = Place(lm, tmp_path, {FILE.digest: "\n".join(lines)})
    written = await place.write(documents=(DOCUMENT, OTHER), prompts=FILE)
    contexts = [ids_digest(place.template.context(text)) for text in (DOCUMENT, OTHER)]
    for each in (*written.asked, *written.heldout):
        assert each.context == contexts[int(each.prompt[8]) % 2]
    place.files = {FILE.digest: '{"prompt": "What?"}\n{"prompt": "Why?"}'}
    with pytest.raises(InvalidArgument, match=r'prompts, line 1: "document" is None'):
        await place.write(documents=(DOCUMENT, OTHER), prompts=FILE, seed=1)
