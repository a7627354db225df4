"""The gateway that commands talk to: FOUNDRY_GATEWAY's where that is set, else the local stack's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from foundry.cli.terminal import note

if TYPE_CHECKING:
    from foundry.client import FoundryClient


@contextmanager
def connect(*, start: bool) -> Iterator[FoundryClient]:
    """A client of the gateway. Raises Unavailable where nothing runs and `start` is false."""
    from foundry.client import FoundryClient
    from foundry.local.stack import LocalStack

    url = os.environ.get("FOUNDRY_GATEWAY")
    if not url:
        stack = LocalStack(say=note)
        url = stack.up().gateway_url if start else stack.url
    with FoundryClient(url) as client:
        yield client
