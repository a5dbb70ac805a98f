"""Names, versions, aliases, tags and content, in every kind of store with every kind of index."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from tests.library.made import adapter_bytes, made, read_made
from veneer.errors import AdapterError, ConfigError
from veneer.library.library import Library, open_library
from veneer.library.store import LocalStore, RemoteStore


def test_adding_equal_content_creates_no_version(library: Library, tmp_path: Path) -> None:
    first, second = made(tmp_path / "1", 1, base="org/Base"), made(tmp_path / "2", 2)
    a = library.add(first, "support", tags=["x"], describe=read_made)
    again = library.add(first, "support", tags=["y"], describe=read_made)
    b = library.add(second, "support", describe=read_made)
    assert (a.new, again.new, b.new) == (True, False, True)
    assert [v.version.reference for v in (a, again, b)] == ["support@1", "support@1", "support@2"]
    assert again.version.tags == ["x", "y"]
    assert library.find("support").version == library.find("support@latest").version == 2
    assert library.find("support@1").base == "org/Base"
    # adding the first content again makes a new version with the same content
    back = library.add(first, "support", describe=read_made)
    assert (back.version.reference, back.version.entry) == ("support@3", a.version.entry)


def test_resolve_returns_a_read_only_file_with_its_name(library: Library, tmp_path: Path) -> None:
    source = made(tmp_path / "in", 1, name="Style v2.safetensors")
    library.add(source, "style", describe=read_made)
    source.unlink()
    path = library.resolve("style")
    assert path.name == "Style v2.safetensors"
    assert path.read_bytes() == adapter_bytes(1)
    assert path.stat().st_mode & 0o222 == 0
    assert library.resolve("style") == path
    local = library.store if isinstance(library.store, LocalStore) else library.cache
    blob = next(p for p in local.root.glob("blobs/*/*"))
    assert os.path.samefile(blob, path), "a link, not a copy"
    assert blob.name == hashlib.sha256(adapter_bytes(1)).hexdigest()


def test_equal_bytes_are_stored_once(library: Library, tmp_path: Path) -> None:
    for n in range(3):
        library.add(made(tmp_path / str(n), 7, name=f"{n}.safetensors"), f"name{n}", describe=read_made)
    assert len(list(library.store.walk("blobs"))) == 1
    assert len({library.find(f"name{n}").entry for n in range(3)}) == 3, "the file's own name is part of the entry"
    assert len({library.find(f"name{n}").digest for n in range(3)}) == 1


def test_only_an_adapters_own_files_are_stored(library: Library, tmp_path: Path) -> None:
    run = tmp_path / "run" / "adapter"
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "events.log"):
        made(run, 1, name=name)
    added = library.add(
        tmp_path / "run", "support", describe=lambda folder: read_made(folder / "adapter_model.safetensors")
    )
    assert added.left_out == ["events.log"]
    path = library.resolve("support")
    assert sorted(p.name for p in path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_alias_moves_between_versions(library: Library, tmp_path: Path) -> None:
    for n in (1, 2):
        library.add(made(tmp_path / str(n), n), "support", describe=read_made)
    library.alias("support@1", "prod")
    assert library.find("support@prod").version == 1
    library.alias("support@2", "prod")
    library.alias("support@prod", "stable")
    assert library.find("support@prod").version == 2
    assert library.find("support@2").aliases == ["prod", "stable"]
    assert library.find("support@1").aliases == []


def test_a_digest_prefix_finds_an_adapter(library: Library, tmp_path: Path) -> None:
    a = library.add(made(tmp_path / "1", 1), "a", describe=read_made).version
    b = library.add(made(tmp_path / "2", 1, name="other.safetensors"), "b", describe=read_made).version
    c = library.add(made(tmp_path / "3", 3), "c", describe=read_made).version
    assert a.digest == b.digest != c.digest
    assert library.find(a.digest[:15]).digest == a.digest, "two names of one adapter are no ambiguity"
    assert library.find(c.digest).reference == "c@1"
    assert library.find("sha256:" + c.entry[:12]).reference == "c@1", "the entry's own sha256 serves too"
    with pytest.raises(ConfigError, match="4 to 64"):
        library.find("sha256:abc")
    with pytest.raises(AdapterError, match="no adapter"):
        library.find("sha256:" + "0" * 20)


def test_a_prefix_of_two_adapters_is_refused_with_both(library: Library, tmp_path: Path) -> None:
    from veneer.library.describe_files import AdapterDescription

    for n in "12":
        told = AdapterDescription("sha256:abcd" + n * 60, "made", {})
        library.add(made(tmp_path / n, int(n)), f"n{n}", describe=lambda _, told=told: told)
    with pytest.raises(AdapterError, match=r"matches several[\s\S]*n1@1[\s\S]*n2@1"):
        library.find("sha256:abcd")
    assert library.find("sha256:abcd1").name == "n1"


def test_removal_keeps_content_that_other_names_use(library: Library, tmp_path: Path) -> None:
    from veneer.library.maintenance import gc

    shared = made(tmp_path / "s", 1)
    library.add(shared, "one", describe=read_made)
    library.add(shared, "two", describe=read_made)
    library.alias("two@1", "prod")
    assert library.remove("one") == ["one@1"]
    gc(library, grace=0)
    assert library.resolve("two").read_bytes() == adapter_bytes(1)
    for reference in ("two", "two@1"):
        with pytest.raises(AdapterError, match=r"two@prod -> two@1"):
            library.remove(reference)
    assert library.remove("two@prod") == ["two@prod"]
    assert library.remove("two@1") == ["two@1"]
    gc(library, grace=0)
    assert not list(library.store.walk("blobs"))
    assert library.search() == []


def test_removed_version_number_is_not_reused(library: Library, tmp_path: Path) -> None:
    for n in (1, 2):
        library.add(made(tmp_path / str(n), n), "support", describe=read_made)
    library.remove("support@2")
    assert library.find("support").version == 1
    library.alias("support@1", "prod")
    assert library.remove("support", with_aliases=True) == ["support@prod", "support@1"]
    with pytest.raises(AdapterError, match="no adapter 'support'"):
        library.find("support")
    assert library.add(made(tmp_path / "3", 3), "support", describe=read_made).version.version == 3


def test_tags_are_added_and_removed(library: Library, tmp_path: Path) -> None:
    library.add(made(tmp_path, 1), "support", describe=read_made)
    assert library.tag("support", "b", "a", "a").tags == ["a", "b"]
    assert library.untag("support@1", "b").tags == ["a"]
    with pytest.raises(AdapterError, match=r"no tag b, c[\s\S]*it has a"):
        library.untag("support", "c", "b", "a")
    with pytest.raises(ConfigError, match="cannot be a tag"):
        library.tag("support", "two words")


def test_search_covers_every_recorded_property(library: Library, tmp_path: Path) -> None:
    parent = "sha256:" + "9" * 64
    cards = {
        "cats": {"base": "stabilityai/SDXL-base", "trigger_words": ["Cat Girl", "purr"], "licence": "mit"},
        "cars": {"base": "org/other", "base_fingerprint": "sha256:77ff", "parents": [parent]},
        "carts_100%": {},
    }
    for n, (name, card) in enumerate(cards.items()):
        library.add(made(tmp_path / str(n), n, **card), name.strip("%"), tags=[f"t{n}", "all"], describe=read_made)
    newer = made(tmp_path / "9", 9, base="stabilityai/SDXL-base", recipe={"note": "Newer one"})
    library.add(newer, "cats", describe=read_made)

    def found(text: str = "", **filters: object) -> list[str]:
        return [v.reference for v in library.search(text, **filters)]

    assert found() == ["cars@1", "carts_100@1", "cats@2"]
    assert found(all_versions=True) == ["cars@1", "carts_100@1", "cats@1", "cats@2"]
    assert found(limit=1, offset=1) == ["carts_100@1"]
    assert found(name="car") == ["cars@1", "carts_100@1"]
    assert found(base="sdxl-BASE") == found(base="stabilityai/SDXL-base") == ["cats@2"]
    assert found(base="sha256:77") == ["cars@1"]
    assert found(trigger="cat girl", all_versions=True) == ["cats@1"]
    assert found(trigger="cat") == []
    assert found(parent=parent[:20]) == ["cars@1"]
    assert found(tags=["all", "t1"]) == ["cars@1"]
    assert found("MIT purr", all_versions=True) == ["cats@1"]
    assert found("newer one") == ["cats@2"]
    assert found("t1") == ["cars@1"]
    assert found("car_") == [] != found("carts_1"), "no wildcards"
    assert found("%") == found("nothing like it") == []


def test_search_tolerates_cards_of_other_tools(library: Library, tmp_path: Path) -> None:
    card = {"base": 7, "trigger_words": ["ok", "", None, "ok", 5], "parents": "none", "extra": {"a": [["Ünïcode 猫"]]}}
    version = library.add(made(tmp_path, 1, **card), "odd", describe=read_made).version
    assert (version.base, version.trigger_words, version.parents) == ("7", ["ok"], [])
    assert [v.name for v in library.search("猫")] == ["odd"]


def test_an_unknown_reference_names_the_nearest(library: Library, tmp_path: Path) -> None:
    library.add(made(tmp_path, 1), "support", describe=read_made)
    with pytest.raises(AdapterError, match=r"did you mean support\?"):
        library.resolve("suport")
    with pytest.raises(AdapterError, match=r"no support@2[\s\S]*it has support@1"):
        library.find("support@2")
    with pytest.raises(AdapterError, match=r"no support@prod"):
        library.alias("support@prod", "next")


def test_files_that_are_not_adapters_are_not_stored(library: Library, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no card")
    with pytest.raises(AdapterError, match="no card"):
        library.add(tmp_path / "x.safetensors", "x", describe=read_made)
    assert list(library.store.walk("blobs")) == []
    with pytest.raises(AdapterError, match="no such file"):
        library.add(tmp_path / "gone", "x")


def test_file_that_changes_during_an_add_is_refused(library: Library, tmp_path: Path) -> None:
    path = made(tmp_path, 1)

    def describe(place: Path) -> object:
        told = read_made(place)
        made(tmp_path, 2)
        return told

    with pytest.raises(AdapterError, match=r"sha256|changed while"):
        library.add(path, "x", describe=describe)  # type: ignore[arg-type]
    assert library.search() == []


def test_a_damaged_download_is_not_used(tmp_path: Path, s3: str) -> None:
    with open_library(f"{s3}/x", str(tmp_path / "index")) as library:
        assert isinstance(library.store, RemoteStore)
        library.add(made(tmp_path, 1), "x", describe=read_made)
        path = next(library.store.walk("blobs"))[0]
        library.store.replace(path, bytes(len(adapter_bytes(1))))
        with pytest.raises(AdapterError, match="have sha256"):
            library.resolve("x")


def test_a_missing_blob_is_an_error_and_can_be_restored(library: Library, tmp_path: Path) -> None:
    source = made(tmp_path, 1)
    library.add(source, "x", describe=read_made)
    library.store.delete(next(library.store.walk("blobs"))[0])
    with pytest.raises(AdapterError, match=r"missing in the store[\s\S]*add the adapter again"):
        library.resolve("x")
    library.add(source, "y", describe=read_made)
    assert library.resolve("x").read_bytes() == source.read_bytes()


def test_an_unusable_index_is_an_error_at_once(tmp_path: Path) -> None:
    """Covers errors such as a full or read-only disk; only a locked index is retried."""
    open_library(tmp_path / "a").close()
    wal = tmp_path / "a" / "index.sqlite-wal"
    wal.unlink(missing_ok=True)
    wal.mkdir()
    begin = time.monotonic()
    with pytest.raises(ConfigError, match="cannot be opened") as refused:
        open_library(tmp_path / "a")
    assert time.monotonic() - begin < 30
    assert "free space" in str(refused.value.fix)


def test_an_index_of_another_library_is_refused(tmp_path: Path) -> None:
    open_library(tmp_path / "a").close()
    open_library(tmp_path / "b").close()
    with pytest.raises(ConfigError, match=r"does not belong to these files[\s\S]*--rebuild"):
        open_library(tmp_path / "a", str(tmp_path / "b" / "index.sqlite"))
    (tmp_path / "a" / "index.sqlite").unlink()
    with pytest.raises(ConfigError, match="new, or does not belong"):
        open_library(tmp_path / "a")


@pytest.mark.parametrize(
    ("index", "says"),
    [("postgresql://nobody@127.0.0.1:1/none", "cannot be opened"), ("nonsense://x", "not an address of an index")],
)
def test_errors_of_the_index_hide_its_password(tmp_path: Path, index: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        open_library(tmp_path, index)
    with pytest.raises(ConfigError) as error:
        open_library(tmp_path, "postgresql://me:secret@127.0.0.1:1/none")
    assert "secret" not in str(error.value)


def test_default_location_is_in_the_veneer_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    with open_library() as library:
        assert library.location == str(tmp_path / "library")
    monkeypatch.setenv("VENEER_LIBRARY", str(tmp_path / "other"))
    monkeypatch.setenv("VENEER_LIBRARY_INDEX", str(tmp_path / "i.sqlite"))
    with open_library() as library:
        assert library.location == str(tmp_path / "other")
    assert (tmp_path / "i.sqlite").is_file()


def test_a_location_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        with pytest.raises(ConfigError, match="cannot create a folder for an index"):
            open_library(tmp_path / place)


def test_unsupported_locations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be stored on ftp://"):
        open_library("ftp://nowhere.invalid/x")
    with pytest.raises(ConfigError, match="this is not an address of an index"):
        open_library(tmp_path, "mysql://nowhere.invalid/x")
