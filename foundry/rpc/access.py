"""Who may call what: three roles of callers, each of which proves itself with a token of its own."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from foundry.errors import FoundryError, InvalidArgument, PermissionDenied, Unauthenticated

Role = Literal["gateway", "trainer", "operator"]

# What is not here, such as reflection, is for operators.
MAY_CALL: dict[str, tuple[Role, ...]] = {
    "/foundry.v1.Rollout/Generate": ("gateway", "trainer", "operator"),
    "/foundry.v1.Rollout/GenerateBatch": ("trainer", "operator"),
    "/foundry.v1.Rollout/Tokenize": ("gateway", "operator"),
    "/foundry.v1.Rollout/Detokenize": ("gateway", "operator"),
    "/foundry.v1.Rollout/Resident": ("gateway", "trainer", "operator"),
    "/foundry.v1.Rollout/Drain": ("operator",),
    "/foundry.v1.Teacher/PutContext": ("gateway", "trainer", "operator"),
    "/foundry.v1.Teacher/Score": ("trainer", "operator"),
}
# Probes have no token.
_OPEN = "/grpc.health.v1.Health/"
_HEADER, _SCHEME = "authorization", "Bearer "
# What a header can carry, and nobody guesses.
_TOKEN = re.compile(r"[!-~]{32,}")


class Access:
    """What a server asks of its callers."""

    def __init__(self, directory: Path) -> None:
        """Raises InvalidArgument, which names the file that can't be used."""
        self._tokens: dict[Role, list[str]] = {role: _read(directory, role) for role in get_args(Role)}
        every = [token for tokens in self._tokens.values() for token in tokens]
        if len(set(every)) < len(every):
            raise InvalidArgument(
                f"rpc_tokens_directory: two files in {directory} have one token: give each role its own",
                field="rpc_tokens_directory",
            )

    def refusal(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> FoundryError | None:
        """Why a call of `method` (/package.Service/Method) with this metadata is refused; None if it is not."""
        if method.startswith(_OPEN):
            return None
        given = next((value for key, value in metadata if key == _HEADER), "")
        if not isinstance(given, str) or not given.startswith(_SCHEME):
            return Unauthenticated("the call has no token: give its caller an rpc_tokens_directory")
        role = self._role_of(given.removeprefix(_SCHEME))
        if role is None:
            return Unauthenticated("the call's token is none of this server's: both need the same rpc_tokens_directory")
        if role not in (allowed := MAY_CALL.get(method, ("operator",))):
            return PermissionDenied(f"the token of role {role} may not call {method}: {', '.join(allowed)} may")
        return None

    def _role_of(self, given: str) -> Role | None:
        """Compares with all of them, so that the time taken says nothing about any."""
        found: Role | None = None
        for role, tokens in self._tokens.items():
            for token in tokens:
                if hmac.compare_digest(given.encode(), token.encode()):
                    found = role
        return found


def token_of(role: Role, directory: Path) -> str:
    """What `role` sends. Raises InvalidArgument, which names the file that can't be used."""
    return _read(directory, role)[0]


def authorization(token: str) -> tuple[str, str]:
    """The metadata that shows a token."""
    return _HEADER, _SCHEME + token


def _read(directory: Path, role: Role) -> list[str]:
    """The role's tokens: while one replaces another, a server takes both and a client sends the first."""
    path = directory / role
    try:
        tokens = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(
            f"rpc_tokens_directory: {path} can't be read: {error}", field="rpc_tokens_directory"
        ) from None
    if not tokens or not all(map(_TOKEN.fullmatch, tokens)):
        raise InvalidArgument(
            f"rpc_tokens_directory: {path} must hold a token of 32 or more printable ASCII characters",
            field="rpc_tokens_directory",
        )
    return tokens
