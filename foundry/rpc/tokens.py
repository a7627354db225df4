"""Makes the tokens of an installation: `python -m foundry.rpc.tokens DIRECTORY`. Those that are there stay.

Each of DIRECTORY's folders is somebody's rpc_tokens_directory: `servers` holds the tokens of all roles, `gateway` and
`trainer` their own.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from foundry.rpc.access import Role

HOLDERS: Mapping[str, Sequence[Role]] = {
    "servers": ("gateway", "trainer", "operator"),
    "gateway": ("gateway",),
    "trainer": ("trainer",),
}


def holder_of(service: str) -> str:
    """The folder that is this service's."""
    return service if service in HOLDERS else "servers"


def make_tokens(directory: Path) -> None:
    """Raises OSError."""
    tokens: dict[Role, str] = {}
    for holder, roles in HOLDERS.items():
        directory.joinpath(holder).mkdir(parents=True, exist_ok=True, mode=0o700)
        for role in roles:
            path = directory / holder / role
            if not path.exists():
                _write(path, tokens.get(role) or secrets.token_urlsafe(32))
            tokens.setdefault(role, path.read_text())


def _write(path: Path, token: str) -> None:
    """Whole or not at all: a file that is there is never written again."""
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(token)
    temporary.rename(path)


if __name__ == "__main__":
    make_tokens(Path(sys.argv[1]))
