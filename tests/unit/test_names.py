"""Names and references: what is accepted, what it means, what is refused."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundry.errors import InvalidArgument
from foundry.store.names import LATEST, MAX_VERSION, Reference, check_name, check_run, check_tag

_part = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)
names = st.one_of(_part, st.builds("{}/{}".format, _part, _part))
digests = st.from_regex(r"blake3:[0-9a-f]{64}", fullmatch=True)
tags = _part.filter(lambda tag: not tag.isdigit() and tag != LATEST)


@given(names, st.one_of(st.integers(1, MAX_VERSION), digests, tags, st.just(LATEST)))
def test_reference_is_read_as_it_was_written(name: str, selector: int | str) -> None:
    assert Reference.parse(f"{name}@{selector}") == Reference(name, selector)


@given(names)
def test_bare_name_means_latest(name: str) -> None:
    assert Reference.parse(name) == Reference(name, LATEST)


@given(st.text(alphabet=string.printable, max_size=80))
def test_any_text_is_a_reference_or_names_the_field(text: str) -> None:
    try:
        reference = Reference.parse(text, field="model")
    except InvalidArgument as error:
        field = error.field
    else:
        field = "model"
        assert Reference.parse(str(reference)) == reference
    assert field == "model"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "name@",
        "@latest",
        "Name",
        "-name",
        "a" * 64,
        "a/b/c",
        "/a",
        "a/",
        "../etc",
        "a/../b",
        "name@0",
        "name@-1",
        "name@1.5x y",
        "name@99999999999999999",
        "name@9007199254740992",
        "name@blake3:12",
        "name@blake3:" + "G" * 64,
        "name@sha256:" + "0" * 64,
        "name@Best",
        "name@a/b",
        "name@best@1",
        "name\n",
        "name@١٢",
    ],
)
def test_bad_references_are_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Reference.parse(text)
    assert caught.value.field == "model"


def test_versions_and_digests_are_immutable_pointers_are_not() -> None:
    assert Reference.parse("a@7").immutable
    assert Reference.parse("a@blake3:" + "0" * 64).immutable
    assert not Reference.parse("a").immutable
    assert not Reference.parse("a@best").immutable


def test_leading_zeros_are_the_same_version() -> None:
    assert Reference.parse("a@0017") == Reference("a", 17)


@pytest.mark.parametrize("tag", ["latest", "17", "", "Best", "a/b", "a" * 64, "blake3:" + "0" * 64, "a b"])
def test_tags_that_could_be_something_else_are_refused(tag: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_tag(tag)
    assert caught.value.field == "tag"


def test_names_of_63_characters_and_tenants_are_accepted() -> None:
    assert check_name("a" * 63) == "a" * 63
    assert check_name("acme/q3-report.v2") == "acme/q3-report.v2"


@pytest.mark.parametrize("run", ["", "run a", "run\n", "run/1", "-run", "a" * 129])
def test_run_ids_that_would_break_keys_are_refused(run: str) -> None:
    with pytest.raises(InvalidArgument):
        check_run(run)
