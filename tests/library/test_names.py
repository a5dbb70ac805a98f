"""What names may look like, and what references mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.library.made import made, read_made
from veneer.errors import ConfigError
from veneer.library.library import open_library
from veneer.library.names import Reference, check_file_name, check_tag, parse_reference

NOT_NAMES = ["", "A", "../x", "a/b", "a..b", ".a", "a.", "-a", "a:1", "con", "ü", "a" * 101, "a\n", "a b", "~"]


@pytest.mark.parametrize("name", NOT_NAMES)
def test_names_that_are_no_names(name: str) -> None:
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
    ],
)
def test_references(text: str, means: Reference) -> None:
    assert parse_reference(text) == means


@pytest.mark.parametrize("text", ["a@-1", "a@Prod", "a@1x", "a@b@c", "a@٣", "sha256:xyz0", "sha256:00FF"])
def test_texts_that_are_no_references(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_reference(text)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", ".hidden", "a\0", "c:x", "x" * 201, "a.", "\ud800"])
def test_file_names_that_lead_elsewhere(name: str) -> None:
    with pytest.raises(ConfigError, match="no plain file name"):
        check_file_name(name)


def test_tags_may_hold_what_people_write() -> None:
    check_tag("team/routing:v2=x")
    with pytest.raises(ConfigError, match="cannot be a tag"):
        check_tag("a\tb")


def test_a_bad_name_leaves_nothing_and_a_likely_one_is_offered(tmp_path: Path) -> None:
    with open_library(tmp_path / "l") as library:
        with pytest.raises(ConfigError, match="for example studio-style-v2"):
            library.add(made(tmp_path, 1), "Studio Style v2", describe=read_made)
        assert list(library.store.walk("names")) == list(library.store.walk("blobs")) == []
