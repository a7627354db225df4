"""Cartridges in repositories of the Hugging Face hub: a commit is read, or made."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundry.errors import (
    CartridgeNotFound,
    CartridgeUnreadable,
    InvalidArgument,
    PermissionDenied,
    Unavailable,
)
from foundry.formats import peft, tokasaurus
from foundry.formats.reading import MAX_BYTES

PREFIX = "hf:"
_REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_MAX_FILES = 10_000


@dataclass(frozen=True, slots=True)
class Repository:
    """`revision` is a branch, a tag or a commit; None: the main branch."""

    id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Repository:
        """hf:OWNER/NAME or hf:OWNER/NAME@REVISION. Raises InvalidArgument."""
        found = _REPOSITORY.fullmatch(text.removeprefix(PREFIX))
        if found is None:
            raise InvalidArgument(
                f"{text!r:.200} is not {PREFIX}OWNER/NAME or {PREFIX}OWNER/NAME@REVISION", field="path"
            )
        return cls(found["id"], found["revision"])

    def __str__(self) -> str:
        return f"{PREFIX}{self.id}@{self.revision}" if self.revision else f"{PREFIX}{self.id}"


def pull(repository: Repository, file: str = "") -> tuple[Path, Repository]:
    """The file or directory that holds the cartridge, in the hub's cache, and the repository at the commit it is of.

    `file` chooses among several. With HF_HUB_OFFLINE what the cache has of the revision is taken. Raises
    CartridgeNotFound, CartridgeUnreadable, PermissionDenied, Unavailable.
    """
    from huggingface_hub import constants

    hub = _hub()
    with _typed(repository):
        if constants.HF_HUB_OFFLINE:
            snapshot = Path(hub.snapshot_download(repository.id, revision=repository.revision, local_files_only=True))
            chosen = _chosen(repository, [each.name for each in snapshot.iterdir()], file)
        else:
            info = hub.model_info(repository.id, revision=repository.revision, files_metadata=True)
            siblings = info.siblings or []
            if len(siblings) > _MAX_FILES:
                raise CartridgeUnreadable(
                    f"{repository} has {len(siblings)} files, at most {_MAX_FILES} are looked at", field="path"
                )
            sizes = {each.rfilename: each.size or 0 for each in siblings}
            chosen = _chosen(repository, list(sizes), file)
            if (num_bytes := sum(sizes[name] for name in chosen)) > MAX_BYTES:
                raise CartridgeUnreadable(
                    f"{repository} has {num_bytes} bytes, at most {MAX_BYTES} are read", field="path"
                )
            # By its name, so that the cache knows the name without the hub.
            snapshot = Path(hub.snapshot_download(repository.id, revision=repository.revision, allow_patterns=chosen))
            if snapshot.name != info.sha:
                raise Unavailable(f"{repository} got another commit while it was read: ask again")
    # The hub's cache names it by its commit.
    pinned = Repository(repository.id, snapshot.name)
    return (snapshot / chosen[0] if len(chosen) == 1 else snapshot), pinned


def push(path: Path, repository: Repository, *, message: str, public: bool = False) -> Repository:
    """Commit a file, or a directory's files; the repository is made if it is not there. Raises as `pull`."""
    from huggingface_hub import CommitOperationAdd

    files = [path] if path.is_file() else sorted(each for each in path.iterdir() if each.is_file())
    added = [CommitOperationAdd(each.name, each) for each in files]
    with _typed(repository):
        hub = _hub()
        hub.create_repo(repository.id, private=not public, exist_ok=True)
        commit = hub.create_commit(repository.id, added, commit_message=message, revision=repository.revision)
    return Repository(repository.id, commit.oid)


def _hub() -> Any:
    from huggingface_hub import HfApi

    # It looks there too, but once, when it is loaded.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"))


def _chosen(repository: Repository, names: list[str], file: str) -> list[str]:
    """The files of one cartridge."""
    if file:
        if file not in names:
            raise CartridgeNotFound(f"{repository} has no file {file!r:.200}", field="file")
        return [file]
    for files in ([peft.CONFIG, peft.WEIGHTS], [tokasaurus.CONFIG, tokasaurus.WEIGHTS]):
        if set(files) <= set(names):
            return files
    found = [name for name in names if "/" not in name and Path(name).suffix in (".safetensors", ".pt", ".pth")]
    if len(found) != 1:
        said = ", ".join(sorted(found)[:10]) or "none"
        raise CartridgeUnreadable(
            f"{repository} should have one file of a cartridge, it has {said}: choose by --file", field="path"
        )
    return found


@contextmanager
def _typed(repository: Repository) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CartridgeNotFound(
            f"the hub has no {repository}, or it is private: check it, or run 'hf auth login'", field="path"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise Unavailable(f"{repository} is not in the local cache, and the hub can't be asked") from error
    except errors.HfHubHTTPError as error:
        response: Any = error.response
        status = getattr(response, "status_code", None)
        if status in (401, 403):
            raise PermissionDenied(
                f"the hub refuses {repository} with {status}: run 'hf auth login' with a token that may"
            ) from error
        raise Unavailable(f"the hub answers {status} about {repository}") from error
    except _failures() as error:
        raise Unavailable(f"the hub can't be asked about {repository}: {type(error).__name__}") from error


def _failures() -> tuple[type[Exception], ...]:
    """What the hub's HTTP library raises, whichever that is, and the system."""
    from huggingface_hub.errors import HfHubHTTPError

    return tuple(each for each in HfHubHTTPError.__bases__ if issubclass(each, Exception))
