"""Cartridges that come from files and go to files: by REST, by the client and by the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foundry.errors import CartridgeUnreadable, Conflict, FingerprintMismatch, InvalidArgument
from foundry.formats import peft, research
from foundry.identity import CartridgeBytes
from foundry.model.cartridge import Cartridge
from foundry.store import CartridgeStore
from tests.contract.gateway_routes.site import DOCUMENT, Guarded, Site
from tests.contract.gateway_routes.test_command_line import Foundry, foundry
from tests.store_data import cartridge

__all__ = ["foundry"]
VERSIONS = "/v1/cartridges/{}/versions"
SAFETENSORS = {"content-type": "application/vnd.safetensors"}


def file_of(made: Cartridge) -> bytes:
    return b"".join(bytes(part) for part in made.to_bytes().file_parts())


def greedy(site: Site, model: str) -> str:
    return site.client.chat(model, "Where?", max_tokens=8, temperature=0).text


def test_an_uploaded_version_is_one_like_any_other(site: Site) -> None:
    made = site.stack.cartridge(21)
    (published,) = site.stack.publish("from-a-run", made)
    client = site.client.cartridges
    manifest = client.upload("acme/uploaded", file_of(made), origin="a test", document=None)
    assert (manifest["name"], manifest["version"], manifest["digest"]) == ("acme/uploaded", 1, published.digest)
    assert (manifest["init"], manifest["step"], manifest["document"]) == ("import of a test", 0, None)
    assert manifest["run"].startswith("import-")
    assert client.get("acme/uploaded")["durable"]
    assert greedy(site, "acme/uploaded") == greedy(site, "from-a-run") != greedy(site, "tiny")
    assert client.download("acme/uploaded", 1) == client.download("from-a-run", 1) == file_of(made)
    # Another one is the next version, and nobody's place stays taken.
    again = client.upload("acme/uploaded", file_of(site.stack.cartridge(22)))
    assert (again["version"], client.get("acme/uploaded")["version"]["version"]) == (2, 2)
    (continued,) = site.stack.publish("acme/uploaded", site.stack.cartridge(23))
    assert continued.version == 3


def test_what_is_no_cartridge_of_this_model_is_refused(site: Site) -> None:
    good = file_of(site.stack.cartridge(24))

    def refused(content: bytes, **headers: str) -> tuple[int, str, str | None]:
        path = VERSIONS.format("refused")
        answer = site.http("POST", path, content=content, headers=SAFETENSORS | headers)
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["param"]

    unreadable = (400, CartridgeUnreadable.reason, "body")
    assert refused(b"") == refused(b"\xff" * 100) == refused(good[:-1]) == refused(good + b"x") == unreadable
    other = b"".join(bytes(part) for part in cartridge(1).file_parts())
    assert refused(other)[:2] == (409, FingerprintMismatch.reason)
    wrong = {"x-foundry-digest": "blake3:" + "0" * 64}
    assert refused(good, **wrong) == (400, CartridgeUnreadable.reason, "x-foundry-digest")
    assert refused(good, **{"x-foundry-digest": "0"})[::2] == (400, "x-foundry-digest")
    assert refused(good, **{"content-type": "application/json"})[0] == 415
    assert site.http("GET", VERSIONS.format("refused")).status_code == 404, "something of it was kept"
    with pytest.raises(Conflict):
        site.client.cartridges.upload("tiny", good)
    with pytest.raises(InvalidArgument):
        site.client.cartridges.upload("refused", good, document="blake3:0")


def test_a_name_that_a_run_publishes_takes_no_other(site: Site) -> None:
    async def hold(store: CartridgeStore) -> None:
        await store.acquire("taken", "run-that-trains", 1)

    site.stack.with_store(hold)
    with pytest.raises(Conflict, match="run-that-trains"):
        site.client.cartridges.upload("taken", file_of(site.stack.cartridge(25)))


def test_uploading_is_for_who_may_train(guarded: Guarded) -> None:
    content = file_of(guarded.stack.cartridge(26))
    for scope, name, status in (("query", "own", 403), ("train", "other/theirs", 404), ("train", "own", 201)):
        _, key = guarded.key(scope, tenant="uploader")  # type: ignore[arg-type]
        answer = guarded.http("POST", VERSIONS.format(name), key, content=content, headers=SAFETENSORS)
        assert answer.status_code == status, answer.text
    assert answer.json()["name"] == "uploader/own"


@pytest.mark.parametrize("kind", ["safetensors", "peft", "research", "research-fixed", "tokasaurus"])
def test_what_is_exported_is_imported_to_the_bit(site: Site, foundry: Foundry, kind: str, tmp_path: Path) -> None:
    name = f"exported-{kind}"
    (published,) = site.stack.publish(name, site.stack.cartridge(27))
    path = tmp_path / {"safetensors": "a.safetensors", "research": "a.pt", "research-fixed": "a.pt"}.get(kind, "a")
    said = json.loads(foundry("cartridges", "export", name, str(path), "--format", kind, "--json").stdout)
    assert (said["version"], said["digest"]) == (1, published.digest)
    foundry("cartridges", "export", name, str(path), "--format", kind, status=2)
    arguments = ["cartridges", "import", str(path), f"back-{kind}", "--json"]
    # Theirs do not say of which model they are.
    if kind in ("research", "research-fixed", "tokasaurus"):
        assert "--model" in foundry(*arguments, status=2).stderr
        arguments += ["--model", str(site.stack.model)]
    made = json.loads(foundry(*arguments).stdout)
    assert made["digest"] == published.digest
    assert made["init"].startswith("import of ")


def test_an_adapter_of_peft_itself_is_served(site: Site, foundry: Foundry, tmp_path: Path) -> None:
    made = site.stack.cartridge(28)
    peft.write(made, tmp_path / "adapter")
    # As PEFT would have written it: without what we add.
    from safetensors.torch import load_file, save_file

    save_file(load_file(tmp_path / "adapter" / peft.WEIGHTS), tmp_path / "adapter" / peft.WEIGHTS)
    foundry("cartridges", "import", str(tmp_path / "adapter"), "adapted", "--model", str(site.stack.model))
    assert site.client.cartridges.get("adapted")["version"]["digest"] == made.to_bytes().digest()
    assert greedy(site, "adapted") != greedy(site, "tiny")


def test_a_cartridge_behind_which_the_model_says_nothing_is_refused(
    site: Site, foundry: Foundry, tmp_path: Path
) -> None:
    made: Any = site.stack.cartridge(29)
    made.kv_L2GPD[0, 0, 0, 0, 0] = torch.nan
    research.write(made, tmp_path / "a.pt")
    arguments = ("cartridges", "import", str(tmp_path / "a.pt"), "damaged-import", "--model", str(site.stack.model))
    assert "not finite" in foundry(*arguments, status=2).output
    assert site.http("GET", VERSIONS.format("damaged-import")).status_code == 404


def test_a_run_goes_on_from_an_imported_version(site: Site) -> None:
    manifest = site.client.cartridges.upload("warm", file_of(site.stack.cartridge(30, num_tokens=16)))
    run = site.client.runs.create(
        name="warmed",
        text=DOCUMENT,
        num_tokens=16,
        num_steps=1,
        init="version",
        init_version=f"warm@{manifest['version']}",
    )
    assert run["spec"]["init_version"] == "warm@1"
    site.client.runs.cancel(run["id"])


def test_the_client_says_what_is_no_file_before_it_sends_it(site: Site) -> None:
    with pytest.raises(InvalidArgument):
        site.client.cartridges.upload("unsent", b"no file")
    assert CartridgeBytes.from_file(file_of(site.stack.cartridge(31))).header.num_tokens == 12
