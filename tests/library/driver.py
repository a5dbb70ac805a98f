"""Kill processes that use one library concurrently.

This is a separate program, so that it can fork safely:

    python -m tests.library.driver random PLACE INDEX SECONDS SEED   random operations, killed at random
    python -m tests.library.driver points FOLDER STRIDE INDEX…       a scenario, killed at each STRIDE-th step

The exit code is 0 if every process ended as intended and the library is consistent; prints a summary.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.forks import expect, fork
from tests.library.made import adapter_bytes, made, open_made, read_made
from veneer.errors import AdapterError
from veneer.library import maintenance as upkeep
from veneer.library.library import Library
from veneer.library.store import LocalStore, blob_path

NAMES, CONTENTS, WORKERS = 4, 8, 3


# -- invariants --------------------------------------------------------------------------------------------------------


def check(place: str, index: str | None) -> None:
    """Assert that versions resolve to their bytes, and aliases to their versions.

    Garbage collection must remove everything else."""
    with open_made(place, index) as library:
        every = library.search(all_versions=True)
        for version in every:
            assert read_made(library.resolve(version.reference)).digest == version.digest, version.reference
            for alias in version.aliases:
                assert library.find(f"{version.name}@{alias}").version == version.version
        found = upkeep.verify_library(library, repair=True)
        assert not found.missing, found.missing
        assert not found.corrupt, found.corrupt
        upkeep.gc(library, grace=0)
        after = upkeep.verify_library(library)
        assert after.ok, after
        assert not after.orphans, after.orphans
        looked_at = [replace(v, health="sound") for v in every]  # the index stores the results of verification
        assert library.search(all_versions=True) == looked_at
        if isinstance(library.store, LocalStore):
            assert not list(library.store.walk("tmp")), "debris"
            folders = {p.name for p in (library.store.root / "folders").glob("*")}
            assert folders <= {v.entry for v in every}
        kept = {blob_path(sha256) for v in every for sha256, _ in library.files(v.entry).values()}
        assert {path for path, _, _ in library.store.walk("blobs")} == kept


# -- random operations -------------------------------------------------------------------------------------------------


def operate(library: Library, pick: random.Random, sources: list[Path]) -> str:
    name = f"name{pick.randrange(NAMES)}"
    what = pick.choice(["add", "add", "add", "alias", "remove", "gc", "resolve", "resolve"])
    try:
        if what == "add":
            library.add(pick.choice(sources), name, tags=pick.sample(["a", "b", "c"], 1), describe=read_made)
        elif what == "gc":
            upkeep.gc(library, grace=pick.choice([0.0, 0.0, 0.05, 60.0]))
        else:
            versions = library.search(name=name, all_versions=True)
            if not versions:
                return what
            version = pick.choice(versions)
            if what == "alias":
                library.alias(version.reference, pick.choice(["prod", "dev"]))
            elif what == "remove":
                library.remove(version.reference, with_aliases=True)
            else:
                assert read_made(library.resolve(version.reference)).digest == version.digest
    except (AdapterError, FileNotFoundError) as error:
        # Allowed: another process removed the version and its content between the two checks. Any other error
        # is a fault.
        if what == "add" or ("library has no" not in str(error) and still_there(library, version.reference)):
            raise
    return what


def still_there(library: Library, reference: str) -> bool:
    try:
        library.resolve(reference)
    except AdapterError:
        return any(v.reference == reference for v in library.search(all_versions=True))
    return False


def worker(place: str, index: str | None, seed: int, sources: list[Path], done: int) -> None:
    pick = random.Random(seed)
    with open_made(place, index) as library:
        while True:
            os.write(done, operate(library, pick, sources)[:1].encode())


def run_random(place: str, index: str | None, seconds: float, seed: int) -> dict[str, int]:
    pick, kills, pipe_ends = random.Random(seed), 0, os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        sources = [made(Path(folder) / str(n), n, size=50_000) for n in range(CONTENTS)]
        born = itertools.count(seed * 1_000_000)

        def start() -> int:
            own = next(born)
            return fork(lambda: worker(place, index, own, sources, pipe_ends[1]))

        running = [start() for _ in range(WORKERS)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(pick.uniform(*((0.4, 1.5) if place.startswith("s3:") else (0.05, 0.5))))
            victim = running.pop(pick.randrange(WORKERS))
            os.kill(victim, signal.SIGKILL)
            kills += 1
            expect(victim, killed=True)
            running.append(start())
        for victim in running:
            os.kill(victim, signal.SIGKILL)
            expect(victim, killed=True)
    os.close(pipe_ends[1])
    with os.fdopen(pipe_ends[0], "rb") as pipe:
        done = pipe.read()
    expect(fork(lambda: check(place, index)), killed=False)
    counts = {name: done.count(name[0].encode()) for name in ("gc", "resolve")}
    return {"kills": kills, "operations": len(done), **counts}


# -- every step of one scenario ----------------------------------------------------------------------------------------


def scenario(library: Library, old: Path, new: Path) -> None:
    library.add(new, "b", tags=["t"], describe=read_made)
    library.alias("b@1", "prod")
    library.remove("a")
    upkeep.gc(library, grace=0)
    library.add(old, "a", describe=read_made)
    library.resolve("a")


def killed_at(step: int) -> None:
    """Make this process kill itself before its `step`-th file change or commit."""
    left = [step]

    def hook(function: Callable[..., object]) -> Callable[..., object]:
        def stepped(*arguments: object, **named: object) -> object:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return stepped

    from sqlalchemy import Connection

    for name in ("write", "fchmod", "replace", "rename", "link", "unlink", "mkdir"):
        setattr(os, name, hook(getattr(os, name)))
    Connection.commit = hook(Connection.commit)  # type: ignore[method-assign]


def run_points(folder: str, stride: int, indexes: list[str]) -> dict[str, int]:
    sources = Path(folder) / "in"
    old, new = made(sources / "old", 1), made(sources / "new", 2)
    for step in itertools.count(0, stride):
        place = f"{folder}/{step}"
        index = indexes[step // stride] if indexes else None

        def first(place: str = place, index: str | None = index, step: int = step) -> None:
            with open_made(place, index) as library:
                library.add(old, "a", describe=read_made)
                killed_at(step)
                scenario(library, old, new)

        def then(place: str = place, index: str | None = index) -> None:
            with open_made(place, index) as library:
                state = {v.reference: v for v in library.search(all_versions=True)}
                assert set(state) <= {"a@1", "a@2", "b@1"}
                assert "a@1" in state or "b@1" in state, "what was there before is there, or its removal came after b"
                if "a@1" in state:
                    assert library.resolve("a@1").read_bytes() == adapter_bytes(1)
            check(place, index)
            with open_made(place, index) as library:
                library.add(new, "b", tags=["t"], describe=read_made)
                library.add(old, "a", describe=read_made)
            check(place, index)

        alive = expect(fork(first), killed=None)
        expect(fork(then), killed=False)
        if alive:
            return {"steps": step}
    raise AssertionError


if __name__ == "__main__":
    for heavy in (
        "psycopg",
        "sqlalchemy.dialects.postgresql.psycopg",
        "s3fs",
    ):  # imported once instead of in every worker
        with contextlib.suppress(ImportError):
            importlib.import_module(heavy)
    if sys.argv[1] == "random":
        place, index, seconds, seed = sys.argv[2:6]
        print(json.dumps(run_random(place, index or None, float(seconds), int(seed))))
    else:
        print(json.dumps(run_points(sys.argv[2], int(sys.argv[3]), sys.argv[4:])))
