"""Where a version comes from: its chain of parents."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from foundry.store.manifest import Manifest

MAX_ANCESTORS = 64


@dataclass(frozen=True, slots=True)
class Ancestor:
    """`version` is None where the parent is no version of that name that is still known."""

    version: int | None
    digest: str


def lineage(manifest: Manifest, versions: Iterable[Manifest]) -> list[Ancestor]:
    """Parents of `manifest` among the `versions` of its name, the nearest first, at most MAX_ANCESTORS.

    The chain ends with a version that has no parent, or with the first parent that is not known any more.
    """
    by_digest: dict[str, list[Manifest]] = {}
    for known in versions:
        by_digest.setdefault(known.digest, []).append(known)
    ancestors: list[Ancestor] = []
    child = manifest
    while child.parent is not None and len(ancestors) < MAX_ANCESTORS:
        # Equal bytes may have been published again since; a parent is older than its child.
        older = [known for known in by_digest.get(child.parent, []) if known.version < child.version]
        if not older:
            ancestors.append(Ancestor(None, child.parent))
            break
        child = max(older, key=lambda known: known.version)
        ancestors.append(Ancestor(child.version, child.digest))
    return ancestors
