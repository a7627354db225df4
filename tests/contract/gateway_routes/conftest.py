"""One site for all tests of the routes: it takes seconds to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from foundry.client import FoundryClient
from tests.contract.gateway_routes.site import ADMIN_KEY, Guarded, Site
from tests.services import open_stack, wait_ready, wait_serving
from tests.tiny import TOOLS_CHATML

# Batches are begun where they are created, and nowhere else.
_OPTIONS = ("--retry-timeout-seconds", "2", "--batches.poll-seconds", "3600")


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_stack(tmp_path_factory.mktemp("gateway"), chat_template=TOOLS_CHATML) as stack:
        rollout = stack.rollout()
        teacher = stack.spawn("teacher", "--model", str(stack.model), "--reserve-tokens", "128")
        gateway = stack.gateway([rollout], "--teacher-address", teacher.address, *_OPTIONS)
        wait_serving(rollout)
        wait_serving(teacher)
        wait_ready(gateway)
        with FoundryClient(f"http://{gateway.address}") as client:
            yield Site(stack, rollout, gateway, client)


@pytest.fixture(scope="package")
def guarded(site: Site) -> Guarded:
    """A gateway of the same site that asks for keys."""
    path = site.stack.directory / "admin-key"
    path.write_text(f"{ADMIN_KEY}\n")
    options = ("--api-keys", "--admin-key-file", str(path), "--api-keys-refresh-seconds", "0.5", *_OPTIONS[2:])
    gateway = site.stack.gateway([site.rollout], *options)
    wait_ready(gateway)
    return Guarded(site.stack, gateway)
