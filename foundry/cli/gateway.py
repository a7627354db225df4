"""The gateway that commands talk to: FOUNDRY_GATEWAY's where that is set, else the local stack's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from foundry.cli.terminal import note
from foundry.errors import InvalidArgument

if TYPE_CHECKING:
    from foundry.client import Foundry

_SPELT = {"base_url": "FOUNDRY_GATEWAY", "api_key": "FOUNDRY_API_KEY"}


@contextmanager
def connect(*, start: bool) -> Iterator[Foundry]:
    """A client of the gateway. Raises Unavailable where nothing runs and `start` is false."""
    from foundry.client import Foundry
    from foundry.local.stack import LocalStack

    url = os.environ.get("FOUNDRY_GATEWAY")
    if not url:
        stack = LocalStack(say=note)
        url = stack.up().gateway_url if start else stack.url
    try:
        client = Foundry(url)
    except InvalidArgument as error:
        raise InvalidArgument(f"{_SPELT[error.field or '']}: {error.message}", field=error.field) from error
    with client:
        yield client
