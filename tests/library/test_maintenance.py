"""Garbage collection during adds; verification; rebuilding the index."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.library.made import adapter_bytes, made, open_made, read_made
from veneer.library import maintenance as upkeep
from veneer.library.library import Library
from veneer.library.store import LocalStore


def collect_during(library: Library, monkeypatch: pytest.MonkeyPatch, when: str) -> list[upkeep.GcReport]:
    """Run `gc(grace=0)` during the next add.

    `when`: "before" the first file is stored, or "after" the last file and before the commit."""
    own, done = library.store.put, []

    def put(path: str, source: Any, sha256: str) -> None:
        if when == "before" and not done:
            done.append(upkeep.gc(library, grace=0))
        own(path, source, sha256)
        if when == "after" and path.startswith("manifests") and not done:
            done.append(upkeep.gc(library, grace=0))

    monkeypatch.setattr(library.store, "put", put)
    return done


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("there", [False, True])
def test_collection_during_an_add_loses_nothing(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, there: bool
) -> None:
    """`there`: whether the store already contains the content, although no name refers to it."""
    source = made(tmp_path, 1)
    if there:
        library.add(source, "old", describe=read_made)
        library.remove("old")
    done = collect_during(library, monkeypatch, when)
    library.add(source, "new", describe=read_made)
    assert len(done) == 1
    assert library.resolve("new").read_bytes() == adapter_bytes(1)
    assert upkeep.verify_library(library).ok


def test_a_killed_collection_does_not_break_later_adds(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collection is killed after it has deleted files, before it commits."""
    source = made(tmp_path, 1)
    library.add(source, "old", describe=read_made)
    library.remove("old")
    own = library.store.delete

    def delete(path: str) -> None:
        own(path)
        if path.startswith("manifests"):
            raise KeyboardInterrupt

    monkeypatch.setattr(library.store, "delete", delete)
    with pytest.raises(KeyboardInterrupt):
        upkeep.gc(library, grace=0)
    monkeypatch.undo()
    library.add(source, "new", describe=read_made)
    assert library.resolve("new").read_bytes() == adapter_bytes(1)
    assert upkeep.verify_library(library).ok


def test_content_stays_within_the_grace_period(library: Library, tmp_path: Path) -> None:
    library.add(made(tmp_path, 1), "x", describe=read_made)
    library.remove("x")
    assert upkeep.gc(library).files == 0
    foreseen = upkeep.gc(library, grace=0, dry_run=True)
    assert (foreseen.entries, foreseen.files) == (1, 2)
    assert len(list(library.store.walk("blobs"))) == 1
    done = upkeep.gc(library, grace=0)
    assert (done.entries, done.files, done.bytes) == (1, 2, foreseen.bytes)
    assert not [*library.store.walk("blobs"), *library.store.walk("manifests")]


def test_collection_removes_only_stray_files(library: Library, tmp_path: Path) -> None:
    library.add(made(tmp_path, 1), "x", describe=read_made)
    library.store.replace("blobs/aa/" + "a" * 64, b"stray")
    library.store.replace("blobs/notes.txt", b"someone's own")
    assert upkeep.gc(library, grace=3600).files == 0
    assert upkeep.gc(library, grace=0).files == 1
    assert library.store.size("blobs/notes.txt") is not None
    assert upkeep.verify_library(library).ok


def test_leftover_files_are_removed_but_not_running_writes(tmp_path: Path) -> None:
    with open_made(str(tmp_path / "l")) as library:
        assert isinstance(library.store, LocalStore)
        (tmp_path / "l" / "tmp").mkdir(exist_ok=True)
        (tmp_path / "l" / "tmp" / "dead").write_bytes(b"half")
        (tmp_path / "l" / "tmp" / "deadfolder").mkdir()
        with library.store.temporary() as (alive, _), library.store.temporary(folder=True) as (folder, _):
            assert upkeep.gc(library, grace=0).debris == 2
            assert alive.exists()
            assert folder.exists()
        assert not os.listdir(tmp_path / "l" / "tmp")


def test_verify_lists_missing_and_corrupt_files(library: Library, tmp_path: Path) -> None:
    for n in (1, 2, 3):
        library.add(made(tmp_path / str(n), n), f"n{n}", describe=read_made)
    blobs = {n: f"blobs/{h[:2]}/{h}" for n in (1, 2) for h, _ in library.files(library.find(f"n{n}").entry).values()}
    library.store.delete(blobs[1])
    library.store.delete(blobs[2])
    library.store.replace(blobs[2], bytes(len(adapter_bytes(2))))
    found = upkeep.verify_library(library)
    assert not found.ok
    assert found.missing == [f"{blobs[1]} (n1@1)"]
    assert found.corrupt == [f"{blobs[2]} (n2@1)"]
    upkeep.verify_library(library, repair=True)
    for n in (1, 2):
        library.add(made(tmp_path / str(n), n), f"again{n}", describe=read_made)
        assert library.resolve(f"n{n}").read_bytes() == adapter_bytes(n)
    assert upkeep.verify_library(library).ok


def test_a_wrong_record_is_found_and_repaired(library: Library, tmp_path: Path) -> None:
    library.add(made(tmp_path, 1), "x", describe=read_made)
    library.store.replace("names/x.json", b"{}")
    assert upkeep.verify_library(library).records == ["names/x.json"]
    assert upkeep.verify_library(library, repair=True).repaired == ["names/x.json"]
    assert upkeep.verify_library(library).ok


def test_the_index_is_rebuilt_from_the_store(
    place: str, index: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_made(place, index) as library:
        for n in (1, 2):
            card = {"base": "org/B", "trigger_words": ["w"], "parents": ["sha256:" + "1" * 64]}
            library.add(made(tmp_path / str(n), n, **card), "support", tags=["t"], source="s", describe=read_made)
        library.add(made(tmp_path / "3", 3), "other", describe=read_made)
        library.alias("support@1", "prod")
        library.remove("support@2")
        before = [v.to_dict() for v in library.search(all_versions=True)]
        gone = library.add(made(tmp_path / "4", 4), "gone", describe=read_made).version
        for sha256, _ in library.files(gone.entry).values():
            library.store.delete(f"blobs/{sha256[:2]}/{sha256}")
    fresh = str(tmp_path / "fresh.sqlite")
    made_again = upkeep.rebuild(place, fresh)
    assert (made_again.versions, len(made_again.lost)) == (2, 1)
    assert "gone@1: missing" in made_again.lost[0]
    with open_made(place, fresh) as library:
        assert [v.to_dict() for v in library.search(all_versions=True)] == before
        assert library.resolve("support@prod").read_bytes().startswith(b'{"base"')
        assert library.add(made(tmp_path / "5", 5), "support", describe=read_made).version.version == 3
