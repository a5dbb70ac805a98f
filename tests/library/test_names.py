"""Valid names, and the meaning of references."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.library.made import made, read_made
from veneer.errors import AdapterError, ConfigError
from veneer.library.library import Library, open_library
from veneer.library.maintenance import rebuild, verify_library
from veneer.library.names import (
    Reference,
    check_file_name,
    check_tag,
    name_of,
    new_tuned,
    parse_reference,
    parse_tuned,
    tuned_of,
)

NOT_NAMES = ["", "A", "../x", "a/b/c", "/a", "a/", "a//b", "./a", "a/.b", "A/b", "x.json/a", "con/a", "a..b/c"]
NOT_NAMES += ["a..b", ".a", "a.", "-a", "a:1", "con", "ü", "a" * 101, "a\n", "a b", "~"]


@pytest.mark.parametrize("name", NOT_NAMES)
def test_invalid_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name an adapter"):
        parse_reference(name)


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("a", Reference("a")),
        ("a.b-c_1@latest", Reference("a.b-c_1")),
        ("a@12", Reference("a", version=12)),
        ("a@prod", Reference("a", alias="prod")),
        ("sha256:00ff", Reference(prefix="sha256:00ff")),
        ("acme/support", Reference("acme/support")),
        ("acme/support@4", Reference("acme/support", version=4)),
        ("acme.eu/support@prod", Reference("acme.eu/support", alias="prod")),
    ],
)
def test_references(text: str, means: Reference) -> None:
    assert parse_reference(text) == means


def test_loaded_names_can_have_capitals() -> None:
    assert parse_reference("Acme/SQL-Lora@2", cased=True) == Reference("Acme/SQL-Lora", version=2)
    for name in (*NOT_NAMES, "Ünit", "A..b", "CON"):
        if name not in ("A", "A/b"):
            with pytest.raises(ConfigError, match="cannot name an adapter"):
                parse_reference(name, cased=True)


@pytest.mark.parametrize("text", ["a@-1", "a@Prod", "a@1x", "a@b@c", "a@٣", "sha256:xyz0", "sha256:00FF"])
def test_invalid_references_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_reference(text)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", ".hidden", "a\0", "c:x", "x" * 201, "a.", "\ud800"])
def test_unsafe_file_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="not a plain file name"):
        check_file_name(name)


def test_tags_allow_common_characters() -> None:
    check_tag("team/routing:v2=x")
    with pytest.raises(ConfigError, match="cannot be a tag"):
        check_tag("a\tb")


def test_an_invalid_name_stores_nothing_and_suggests_another(tmp_path: Path) -> None:
    with open_library(tmp_path / "l") as library:
        with pytest.raises(ConfigError, match="for example studio-style-v2"):
            library.add(made(tmp_path, 1), "Studio Style v2", describe=read_made)
        assert list(library.store.walk("names")) == list(library.store.walk("blobs")) == []


def test_names_in_namespaces_are_separate_names(library: Library, tmp_path: Path) -> None:
    """A name in a namespace does not affect the same name without a namespace.

    Covers adding, aliases, search, rebuilding the index, and removal."""
    for number, name in enumerate(("support", "acme/support", "acme/support", "globex/support")):
        library.add(made(tmp_path, number), name, describe=read_made)
    library.alias("acme/support@1", "prod")
    assert [v.reference for v in library.search()] == ["acme/support@2", "globex/support@1", "support@1"]
    assert [v.reference for v in library.search(name="acme/")] == ["acme/support@2"]
    entries = {r: library.find(r).entry for r in ("support", "acme/support", "acme/support@prod", "globex/support@1")}
    assert len(set(entries.values())) == 4
    assert library.resolve("acme/support@prod").exists()
    with pytest.raises(AdapterError, match="no acme/support@9") as lost:
        library.find("acme/support@9")
    assert "acme/support@prod" in str(lost.value.fix)
    with pytest.raises(AdapterError, match="no adapter 'acne/support'") as near:
        library.find("acne/support")
    assert "acme/support" in str(near.value.fix)
    assert verify_library(library).ok
    rebuild(library.location, str(library.engine.url.render_as_string(hide_password=False)))
    assert {r: library.find(r).entry for r in entries} == entries
    assert library.remove("acme/support", with_aliases=True) == [
        "acme/support@prod",
        "acme/support@1",
        "acme/support@2",
    ]
    assert library.find("support").entry == entries["support"]


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("ft:smollm2-135m:acme:support:kq7vz2mh", "acme/support-kq7vz2mh"),
        ("ft:smollm2-135m:acme::kq7vz2mh", "acme/kq7vz2mh"),
        ("ft:smollm2-135m::support:kq7vz2mh:ckpt-step-40", "support-kq7vz2mh@ckpt-step-40"),
    ],
)
def test_openais_tuned_names_are_library_names(text: str, reference: str) -> None:
    found = parse_tuned(text)
    assert (str(found), found.reference) == (text, reference)
    assert parse_reference(text) == parse_reference(reference)
    assert name_of(text) == name_of(reference)


@pytest.mark.parametrize(
    "text",
    [
        "ft:", "ft:base", "ft:base:acme:support", "ft:base:acme:support:", "ft::acme:support:id", "ft:base:a/b:c:id",
        "ft:base:acme:support:id:ckpt-step-x", "ft:base:acme:support:id:more", "ft:base:acme:support:id@prod",
        "ft:base:..:support:id", "ft:base:acme:SUPPORT:id", "ft:base:acme:..:id",
    ],
)  # fmt: skip
def test_malformed_tuned_names_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_reference(text)


@given(st.sampled_from(["", "acme"]), st.from_regex(r"([a-z0-9]{1,9}(-[a-z0-9]{1,9})?)?", fullmatch=True))
def test_tuned_names_round_trip(organisation: str, suffix: str) -> None:
    made = new_tuned("smollm2-135m", organisation, suffix)
    assert tuned_of("smollm2-135m", made.reference) == made
    assert parse_tuned(str(made)) == made


@pytest.mark.parametrize(
    "name", ["support", "acme/support", "support-12345678", "support-abcdefgh", "a/b-kq7vz2mh9", ""]
)
def test_other_names_are_not_tuned_names(name: str) -> None:
    assert tuned_of("base", name) is None
