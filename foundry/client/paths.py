"""Paths of the API. What a caller names is checked before it goes into one, so that it can't lead anywhere else."""

from __future__ import annotations

import re

from foundry.errors import InvalidArgument
from foundry.identity import check_digest
from foundry.tenants import TENANT, check_tenant

# foundry.store.names has the same rules; importing the store takes longer than most calls of a client.
_NAME = re.compile(rf"{TENANT}(/{TENANT})?")
_REFERENCE = re.compile(rf"{_NAME.pattern}(@({TENANT}|blake3:[0-9a-f]{{64}}))?")
_TAG = re.compile(TENANT)
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_EVENT_ID = re.compile(r"[0-9]{1,20}(-[0-9]{1,20})?")


def cartridge(name: str) -> str:
    return f"/v1/cartridges/{_checked(_NAME, name, 'name', 'a cartridge name: expected name or tenant/name')}"


def reference(text: str) -> str:
    wanted = "a reference: expected name, name@17, name@latest, name@tag or name@blake3:HEX"
    checked = _checked(_REFERENCE, text, "reference", wanted)
    # Said, because a path that ends in a word of the API, as `team/versions` does, would mean that.
    return f"/v1/cartridges/{checked if '@' in checked else f'{checked}@latest'}"


def version(name: str, number: int) -> str:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise InvalidArgument(f"{number!r:.100} is not a version: expected 1 or more", field="version")
    return f"{cartridge(name)}/versions/{number}"


def tag(name: str, text: str) -> str:
    return f"{cartridge(name)}/tags/{_checked(_TAG, text, 'tag', 'a tag')}"


def grant(name: str, tenant: str) -> str:
    if not tenant:
        raise InvalidArgument("name the tenant", field="tenant")
    return f"{cartridge(name)}/grants/{check_tenant(tenant)}"


def document(digest: str) -> str:
    return f"/v1/documents/{check_digest(digest, field='digest')}"


def run(run_id: str) -> str:
    return f"/v1/runs/{_checked(_RUN, run_id, 'run_id', 'a run id such as run-k3v7q2xa')}"


def event_id(text: str) -> str:
    """What goes into the header `Last-Event-ID`."""
    return _checked(_EVENT_ID, text, "after", "an event id such as 1700000000000-0")


def _checked(pattern: re.Pattern[str], text: str, field: str, wanted: str) -> str:
    if not isinstance(text, str) or not pattern.fullmatch(text):
        raise InvalidArgument(f"{text!r:.100} is not {wanted}", field=field)
    return text
