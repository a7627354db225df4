"""Cartridges that go to repositories of the hub and come from there, by its own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from foundry.errors import (
    CartridgeNotFound,
    CartridgeUnreadable,
    FoundryError,
    InvalidArgument,
    PermissionDenied,
    Unavailable,
)
from foundry.formats.hub import Repository, pull
from tests.contract.gateway_routes.site import Site
from tests.contract.gateway_routes.test_command_line import Foundry, foundry
from tests.fake_hub import FakeHub, sha

__all__ = ["foundry"]
TOKEN = "hf_test"
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    served = FakeHub(TOKEN)
    yield served
    served.close()


@pytest.fixture(autouse=True)
def here(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_what_is_pushed_is_pulled_to_the_bit_at_its_commit(
    site: Site, hub: FakeHub, foundry: Foundry, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = site.stack.publish("hubbed", site.stack.cartridge(41), site.stack.cartridge(42))
    for version, kind in ((1, "peft"), (2, "peft")):
        done = foundry("cartridges", "export", f"hubbed@{version}", "hf:acme/notes", "--format", kind, "--json")
        assert json.loads(done.stdout)["path"] == f"hf:acme/notes@{sha('acme/notes', version)}"
    assert hub.private["acme/notes"]
    # The newest one, and the one before by its commit.
    for place, published in (("hf:acme/notes", second), (f"hf:acme/notes@{sha('acme/notes', 1)}", first)):
        done = foundry("cartridges", "import", place, "from-the-hub", "--json")
        made = json.loads(done.stdout)
        assert made["digest"] == published.digest
        commit = sha("acme/notes", 2 if published is second else 1)
        assert made["init"] == f"import of peft hf:acme/notes@{commit}"
    # What was pulled once is there without the hub.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    done = foundry("cartridges", "import", "hf:acme/notes", "offline", "--json")
    assert json.loads(done.stdout)["digest"] == second.digest


def test_one_file_of_several_is_chosen(site: Site, hub: FakeHub, foundry: Foundry) -> None:
    made = site.stack.cartridge(43)
    content = b"".join(bytes(part) for part in made.to_bytes().file_parts())
    hub.commit("acme/several", {"a.safetensors": content, "b.safetensors": b"no cartridge", "README.md": b"# Two"})
    said = foundry("cartridges", "import", "hf:acme/several", "chosen", status=2).stderr
    assert "it has a.safetensors, b.safetensors: choose by --file" in said
    done = foundry("cartridges", "import", "hf:acme/several", "chosen", "--file", "a.safetensors", "--json")
    assert json.loads(done.stdout)["digest"] == made.to_bytes().digest()
    for file in ("c.pt", "../a.safetensors"):
        said = foundry("cartridges", "import", "hf:acme/several", "chosen", "--file", file, status=3).stderr
        assert f"has no file '{file}'" in said


@pytest.mark.parametrize(
    ("place", "token", "endpoint", "offline", "expected"),
    [
        ("hf:acme/nobody", TOKEN, "", False, CartridgeNotFound),
        ("hf:acme/several@no-branch", TOKEN, "", False, CartridgeNotFound),
        ("hf:acme/several", "hf_other", "", False, PermissionDenied),
        ("hf:acme/several", TOKEN, NOBODY, False, Unavailable),
        ("hf:acme/several", TOKEN, "", True, Unavailable),
        ("hf:acme/empty", TOKEN, "", False, CartridgeUnreadable),
    ],
)
def test_what_can_not_be_pulled_is_said(
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    token: str,
    endpoint: str,
    offline: bool,
    expected: type[FoundryError],
) -> None:
    hub.commit("acme/several", {"a.safetensors": b"a"})
    hub.commit("acme/empty", {"README.md": b"# Nothing"})
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HF_ENDPOINT", endpoint or hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(expected):
        pull(Repository.parse(place))


def test_of_a_repository_with_too_many_files_none_is_read(hub: FakeHub) -> None:
    hub.commit("acme/crowded", {f"{number}.md": b"" for number in range(10_000)} | {"z.safetensors": b"z"})
    with pytest.raises(CartridgeUnreadable, match="10001 files"):
        pull(Repository.parse("hf:acme/crowded"))


@pytest.mark.parametrize("place", ["hf:acme", "hf:../../etc", "hf:a/b@", "hf:a/b c", "hf:a/b/c"])
def test_what_is_no_repository_is_refused(place: str) -> None:
    with pytest.raises(InvalidArgument):
        Repository.parse(place)
