"""Documents' KV in tiers: what comes back has the bits that it had, and no tier ever takes more than its budget."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from prometheus_client import REGISTRY
from torch import Tensor

from foundry.errors import ContextNotFound, InvalidArgument, ResourceExhausted
from foundry.identity import ids_digest
from foundry.model.lm import FrozenLM
from services.teacher import disk, host, pages
from services.teacher.contexts import Contexts
from services.teacher.disk import DiskContexts
from services.teacher.pages import Key
from tests.tiny import build_tiny_model

# Of a context's KV several, the last one shorter.
PAGE_BYTES = 1000
NUM_TOKENS = 6
TENANT = "acme"


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLM:
    return FrozenLM.load(build_tiny_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: list[ModuleType] = [pages, host, disk]
    for module in modules:
        monkeypatch.setattr(module, "PAGE_BYTES", PAGE_BYTES)


def ids_of(document: int, num_tokens: int = NUM_TOKENS) -> list[int]:
    return list(range(3 + document, 3 + document + num_tokens))


def key_of(document: int, num_tokens: int = NUM_TOKENS, tenant: str = TENANT) -> Key:
    return Key(tenant, ids_digest(ids_of(document, num_tokens)))


class Site:
    """A teacher's contexts, with tiers for so many documents each."""

    def __init__(self, lm: FrozenLM, directory: Path, on_device: int, in_host: int, on_disk: int) -> None:
        self.lm, self.directory = lm, directory
        self.kv_bytes = NUM_TOKENS * lm.spec.kv_bytes_per_token(lm.dtype)
        self.device_bytes = on_device * self.kv_bytes
        self.host_bytes = in_host * -(-self.kv_bytes // PAGE_BYTES) * PAGE_BYTES
        self.disk_bytes = on_disk * (self.kv_bytes + 32)
        self.start()

    def start(self, model: str = "model") -> None:
        files = DiskContexts(self.directory, self.disk_bytes, model) if self.disk_bytes else None
        self.contexts = Contexts(self.lm, self.device_bytes, self.host_bytes, files)

    def restart(self, model: str = "model") -> None:
        self.written()
        self.contexts.close()
        self.start(model)

    def written(self) -> None:
        if (files := self.contexts._disk) is not None:
            for key in list(files._writes):
                files.wait(key)

    def put(self, document: int, num_tokens: int = NUM_TOKENS, go_on: Callable[[], None] = lambda: None) -> None:
        self.contexts.put(key_of(document, num_tokens), ids_of(document, num_tokens), go_on)

    def get(self, document: int) -> Tensor:
        return self.contexts.get([key_of(document)])[0]

    def files(self) -> list[Path]:
        return sorted(self.directory.glob("*"), key=lambda path: path.stat().st_mtime)

    def check_budgets(self) -> None:
        assert self.contexts.num_bytes() <= self.device_bytes
        tier = self.contexts._host
        copies = [page for (_, pages), _ in tier._tier._entries.values() for page in pages]
        assert sum(page.nbytes for page in [*copies, *tier._free]) <= self.host_bytes
        assert sum(path.stat().st_size for path in self.files()) <= self.disk_bytes
        # Whose memory is still read has not been given to another.
        if (files := self.contexts._disk) is not None:
            assert all(key in self.contexts._device for key in files._writes)


@pytest.fixture
def site(lm: FrozenLM, tmp_path: Path) -> Iterator[Callable[[int, int, int], Site]]:
    made: list[Site] = []

    def make(on_device: int, in_host: int, on_disk: int) -> Site:
        made.append(Site(lm, tmp_path / "contexts", on_device, in_host, on_disk))
        return made[-1]

    yield make
    for each in made:
        each.contexts.close()


Make = Callable[[int, int, int], Site]


def counted(name: str, **labels: str) -> Callable[[], float]:
    return partial(REGISTRY.get_sample_value, f"foundry_teacher_{name}", labels)  # type: ignore[return-value]


prefills = counted("prefill_seconds_count")


@pytest.mark.parametrize(("in_host", "on_disk"), [(2, 0), (0, 3), (1, 3), (3, 3)])
def test_what_was_evicted_comes_back_bit_for_bit(site: Make, lm: FrozenLM, in_host: int, on_disk: int) -> None:
    tiers = site(1, in_host, on_disk)
    documents = range(2 if not on_disk else 3)
    for document in documents:
        tiers.put(document, go_on=tiers.check_budgets)
    before = prefills()
    for document in [*documents, *documents]:
        assert tiers.get(document).equal(lm.prefill(ids_of(document)))
        tiers.check_budgets()
    assert prefills() == before


def test_it_comes_from_the_nearest_tier(site: Make) -> None:
    tiers = site(1, 1, 3)
    hits = {tier: counted("context_hits_total", tier=tier) for tier in ("device", "host", "disk")}
    for document in range(3):
        tiers.put(document)
    # On the device 2, in the host's memory 1.
    for document, tier in ((2, "device"), (1, "host"), (0, "disk")):
        before = {name: hit() for name, hit in hits.items()}
        tiers.get(document)
        assert {name: hit() - before[name] for name, hit in hits.items()} == {
            name: float(name == tier) for name in hits
        }


def test_a_put_finds_it_too(site: Make) -> None:
    tiers = site(1, 2, 0)
    tiers.put(0)
    tiers.put(1)
    before = prefills()
    tiers.put(0)
    assert prefills() == before


def test_without_lower_tiers_it_is_gone(site: Make) -> None:
    tiers = site(1, 0, 0)
    tiers.put(0)
    tiers.put(1)
    with pytest.raises(ContextNotFound, match="put it again"):
        tiers.get(0)
    with pytest.raises(ResourceExhausted, match="raise context_budget_bytes"):
        tiers.put(2, NUM_TOKENS + 1)
    # Nothing had to go for it.
    tiers.get(1)


def test_documents_that_do_not_fit_together_are_scored_one_after_the_other(site: Make, lm: FrozenLM) -> None:
    tiers = site(2, 3, 0)
    for document in range(3):
        tiers.put(document)
    documents = [0, 0, 1, 0, 2, 2]
    keys = [key_of(document) for document in documents]
    parts = list(tiers.contexts.fitting(keys))
    assert parts == [slice(0, 4), slice(4, 6)]
    for part in parts:
        for found, document in zip(tiers.contexts.get(keys[part]), documents[part], strict=True):
            assert found.equal(lm.prefill(ids_of(document)))
    with pytest.raises(ContextNotFound):
        list(tiers.contexts.fitting([*keys, key_of(9)]))


def test_the_disk_outlives_the_teacher(site: Make, lm: FrozenLM) -> None:
    tiers = site(1, 0, 3)
    for document in range(3):
        tiers.put(document)
    tiers.restart()
    before = prefills()
    for document in range(3):
        assert tiers.get(document).equal(lm.prefill(ids_of(document)))
    assert prefills() == before


def test_another_models_files_are_not_used_but_make_room(site: Make) -> None:
    tiers = site(1, 0, 2)
    tiers.put(0)
    tiers.restart("another model")
    with pytest.raises(ContextNotFound):
        tiers.get(0)
    tiers.put(1)
    tiers.put(2)
    tiers.written()
    tiers.check_budgets()
    tiers.restart("model")
    with pytest.raises(ContextNotFound):
        tiers.get(0)


def test_with_a_smaller_budget_the_oldest_go(site: Make) -> None:
    tiers = site(1, 0, 3)
    for document in range(3):
        tiers.put(document)
    tiers.written()
    for age, path in enumerate(tiers.files()):
        os.utime(path, (1000 + age, 1000 + age))
    tiers.get(0)
    tiers.disk_bytes = 2 * (tiers.kv_bytes + 32)
    (tiers.directory / "left.tmp").write_bytes(b"half")
    tiers.restart()
    tiers.check_budgets()
    assert [path.suffix for path in tiers.files()] == [".kv", ".kv"]
    tiers.get(0)
    with pytest.raises(ContextNotFound):
        tiers.get(1)


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: flipped(path, 0),
    "last byte": lambda path: flipped(path, -1),
    "second page": lambda path: flipped(path, 32 + PAGE_BYTES),
    "short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a token short": lambda path: os.truncate(path, (path.stat().st_size - 32) * 5 // 6 + 32),
    "empty": lambda path: os.truncate(path, 0),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_a_miss(
    site: Make, lm: FrozenLM, damage: str, restarted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tiers = site(1, 0, 1)
    tiers.put(0)
    tiers.written()
    (path,) = tiers.files()
    DAMAGES[damage](path)
    errors, before = counted("context_file_errors_total", operation="read"), prefills()
    counted_before = errors()
    if restarted:
        tiers.contexts.close()
        tiers.start()
    else:
        # From here on only the disk has it.
        tiers.contexts._device.remove(key_of(0))
    with pytest.raises(ContextNotFound):
        tiers.get(0)
    # Who is gone when the teacher starts is nobody's fault.
    if not (restarted and damage == "gone"):
        assert errors() == counted_before + 1
        assert path.name in caplog.records[-1].file  # type: ignore[attr-defined]
    tiers.put(0)
    assert prefills() == before + 1
    assert tiers.get(0).equal(lm.prefill(ids_of(0)))


def test_a_file_under_anothers_name_is_a_miss(site: Make) -> None:
    tiers = site(1, 0, 2)
    tiers.put(0)
    tiers.written()
    (first,) = tiers.files()
    content = first.read_bytes()
    tiers.put(1)
    tiers.written()
    (second,) = (path for path in tiers.files() if path != first)
    second.write_bytes(content)
    tiers.contexts._device.remove(key_of(1))
    with pytest.raises(ContextNotFound):
        tiers.get(1)
    tiers.get(0)


def test_tenants_are_apart(site: Make) -> None:
    tiers = site(1, 1, 3)
    tiers.put(0)
    tiers.put(1)
    tiers.put(2)
    for document in range(3):
        with pytest.raises(ContextNotFound):
            tiers.contexts.get([key_of(document, tenant="umbrella")])
    tiers.written()
    for path in tiers.files():
        assert TENANT not in path.name
        assert path.stat().st_mode & 0o077 == 0
        assert not any(key_of(document).digest.removeprefix("blake3:") in path.name for document in range(3))


def test_a_disk_that_fails_costs_the_copy_only(site: Make, lm: FrozenLM) -> None:
    tiers = site(2, 0, 2)
    tiers.directory.rmdir()
    errors = counted("context_file_errors_total", operation="write")
    before = errors()
    tiers.put(0)
    tiers.written()
    assert errors() == before + 1
    assert tiers.get(0).equal(lm.prefill(ids_of(0)))


def test_a_directory_that_cannot_be_used_is_said(lm: FrozenLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="contexts can't be kept in"):
        DiskContexts(tmp_path / "file", 1000, "model")


class GivenUp(Exception):
    pass


class Tiers(RuleBasedStateMachine):
    """Documents of three sizes, in tiers that hold a few of them, against what a forward says."""

    lm: FrozenLM

    def __init__(self) -> None:
        super().__init__()
        self._temporary = tempfile.TemporaryDirectory()
        self.site = Site(self.lm, Path(self._temporary.name) / "contexts", 2, 2, 3)

    @rule(document=st.integers(0, 4), num_tokens=st.sampled_from([2, 6, 11, 13]))
    def put(self, document: int, num_tokens: int) -> None:
        if num_tokens * self.site.kv_bytes // NUM_TOKENS > self.site.device_bytes:
            with pytest.raises(ResourceExhausted):
                self.site.put(document, num_tokens)
            return
        self.site.put(document, num_tokens, self.site.check_budgets)
        self.read(document, num_tokens)

    @rule(document=st.integers(0, 4))
    def give_up(self, document: int) -> None:
        def go_on() -> None:
            raise GivenUp

        with suppress(GivenUp):
            self.site.put(document, 7, go_on)

    @rule(document=st.integers(0, 4), num_tokens=st.sampled_from([2, 6, 7, 11]))
    def get(self, document: int, num_tokens: int) -> None:
        with suppress(ContextNotFound):
            self.read(document, num_tokens)

    def read(self, document: int, num_tokens: int) -> None:
        (found,) = self.site.contexts.get([key_of(document, num_tokens)])
        assert found.equal(self.lm.prefill(ids_of(document, num_tokens)))

    @rule(first=st.integers(0, 4), second=st.integers(0, 4))
    def score(self, first: int, second: int) -> None:
        keys = [key_of(document, 6) for document in (first, second)]
        with suppress(ContextNotFound):
            for part in self.site.contexts.fitting(keys):
                self.site.contexts.get(keys[part])

    @rule()
    def restart(self) -> None:
        self.site.restart()

    @precondition(lambda self: self.site.files())
    @rule(place=st.integers(0, 40))
    def damage(self, place: int) -> None:
        self.site.written()
        if files := self.site.files():
            flipped(files[0], place)

    @invariant()
    def budgets(self) -> None:
        self.site.written()
        self.site.check_budgets()

    def teardown(self) -> None:
        self.site.contexts.close()
        self._temporary.cleanup()


def test_random_operations(lm: FrozenLM) -> None:
    machine = type("TiersOfLlama", (Tiers,), {"lm": lm})
    run_state_machine_as_test(machine, settings=hypothesis_settings(max_examples=40, stateful_step_count=25))
