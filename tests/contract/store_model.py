"""What a store must hold, by the plainest means: dictionaries, nothing that can be lost by halves.

Contents are small numbers that stand for bytes. Runs are pseudo-runs: nobody remembers them when Redis is lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

KEEP_HOT = 2


@dataclass(slots=True)
class Version:
    content: int
    run: str
    step: int
    durable: bool
    hot: bool = True


@dataclass(slots=True)
class Name:
    """One cartridge name. `highest` outlives everything: numbers are not used twice."""

    versions: dict[int, Version] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    # (run, step) -> the version that this step was published as last.
    steps: dict[tuple[str, int], int] = field(default_factory=dict)
    latest: int = 0
    owner: tuple[str, int] | None = None
    released: bool = False
    highest: int = 0


class StoreModel:
    def __init__(self, names: list[str]) -> None:
        self.names = {name: Name() for name in names}
        self.blobs: set[int] = set()
        self.leased: set[int] = set()
        # Bytes without a version that a lease kept at deletion: they may be gone at any time.
        self.lingering: set[int] = set()

    # What may be done. Each answers the name of the error that must be raised, or None.

    def acquire(self, name: str, run: str, attempt: int) -> str | None:
        state = self.names[name]
        if state.owner is not None:
            if state.owner[0] == run and attempt < state.owner[1]:
                return "Fenced"
            if state.owner[0] != run and not state.released:
                return "Conflict"
        state.owner, state.released = (run, attempt), False
        return None

    def release(self, name: str, run: str, attempt: int) -> str | None:
        if self.names[name].owner != (run, attempt):
            return "Fenced"
        self.names[name].released = True
        return None

    def may_publish(self, name: str, run: str, attempt: int) -> str | None:
        state = self.names[name]
        return None if state.owner == (run, attempt) and not state.released else "Fenced"

    def published_before(self, name: str, run: str, step: int, content: int) -> int | None:
        state = self.names[name]
        number = state.steps.get((run, step), 0)
        version = state.versions.get(number)
        return number if version is not None and version.content == content else None

    def published(self, name: str, number: int, version: Version) -> None:
        state = self.names[name]
        assert number > state.highest, "a number was used twice"
        state.highest = state.latest = number
        state.versions[number] = version
        state.steps[version.run, version.step] = number
        if version.durable:
            self.blobs.add(version.content)
        self.lingering.discard(version.content)
        self._trim(name)

    def make_durable(self, name: str, number: int) -> None:
        version = self.names[name].versions[number]
        if not version.durable:
            version.durable = True
            self.blobs.add(version.content)

    def resolve(self, name: str, selector: int | str) -> int | None:
        """`selector`: a number, latest, a tag, or content:N for a digest."""
        state = self.names[name]
        if isinstance(selector, int):
            return selector if selector in state.versions else None
        if selector == "latest":
            return state.latest or None
        if selector.startswith("content:"):
            content = int(selector.removeprefix("content:"))
            return min((number for number, each in state.versions.items() if each.content == content), default=None)
        return state.tags.get(selector)

    def tag(self, name: str, tag: str, number: int) -> str | None:
        if number not in self.names[name].versions:
            return "CartridgeNotFound"
        self.make_durable(name, number)
        self.names[name].tags[tag] = number
        return None

    def untag(self, name: str, tag: str) -> str | None:
        return None if self.names[name].tags.pop(tag, None) else "CartridgeNotFound"

    def delete(self, name: str, number: int | None) -> str | None:
        state = self.names[name]
        if number is None:
            if state.versions and state.owner is not None and not state.released:
                return "Conflict"
            if not state.versions:
                return "CartridgeNotFound"
            for each in list(state.versions):
                self._drop(state, each)
            state.tags, state.latest = {}, 0
            return None
        if number not in state.versions:
            return "CartridgeNotFound"
        if number == state.latest or number in state.tags.values():
            return "Conflict"
        self._drop(state, number)
        return None

    def lose_redis(self) -> None:
        self.leased, self.lingering = set(), set()
        for state in self.names.values():
            state.versions = {number: each for number, each in sorted(state.versions.items()) if each.durable}
            for each in state.versions.values():
                each.hot = False
            state.steps = {(each.run, each.step): number for number, each in state.versions.items()}
            state.latest = max(state.versions, default=0)
            state.owner, state.released = None, False

    def gc(self, keep_last: int | None) -> set[tuple[str, str]]:
        """(kind, key) of what goes; contents in place of digests."""
        gone: set[tuple[str, str]] = set()
        for name, state in self.names.items():
            gone |= {("hot", f"{name}@{number}") for number in self._trim(name)}
            durable = sorted((number for number, each in state.versions.items() if each.durable), reverse=True)
            for number in durable[keep_last:] if keep_last else ():
                version = state.versions[number]
                held = state.owner is not None and state.owner[0] == version.run and not state.released
                if number == state.latest or number in state.tags.values() or version.content in self.leased or held:
                    continue
                gone |= {("version", f"{name}@{number}")} | ({("hot", f"{name}@{number}")} if version.hot else set())
                self._drop(state, number)
        needed = {each.content for state in self.names.values() for each in state.versions.values()}
        for content in self.blobs - needed - self.leased:
            gone.add(("blob", str(content)))
            self.blobs.discard(content)
        return gone

    # What must be there

    def hot_contents(self) -> set[int]:
        return {each.content for state in self.names.values() for each in state.versions.values() if each.hot}

    def readable(self, content: int) -> bool | None:
        """None: it may be or not."""
        if content in self.hot_contents() | self.blobs:
            return True
        return None if content in self.lingering else False

    def _trim(self, name: str) -> list[int]:
        state = self.names[name]
        hot = sorted((number for number, each in state.versions.items() if each.hot), reverse=True)
        trimmed = []
        for number in hot[KEEP_HOT:]:
            version = state.versions[number]
            if number == state.latest or number in state.tags.values() or version.content in self.leased:
                continue
            trimmed.append(number)
            version.hot = False
            if not version.durable:
                self._drop(state, number)
        return trimmed

    def _drop(self, state: Name, number: int) -> None:
        version = state.versions.pop(number)
        if state.steps.get((version.run, version.step)) == number:
            del state.steps[version.run, version.step]
        if version.hot and version.content in self.leased and version.content not in self.hot_contents():
            self.lingering.add(version.content)
