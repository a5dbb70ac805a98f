"""An archive restores to an empty machine; kills, damage and hostile archives are found before they do harm."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from tests.cli.run import run
from tests.forks import Forked
from tests.jobs.fakes import CONFIG, PLAN, taken
from tests.library.conftest import _s3_server as _s3_server
from tests.library.conftest import postgres, quick, s3  # noqa: F401
from tests.library.made import made, read_made
from tests.serve.tenancy.conftest import new_tenant
from tests.serve.whole import Shop, asking, make_shop, served
from veneer.errors import ConfigError, DataError
from veneer.jobs.backup import check_backup, restore_backup, write_backup
from veneer.jobs.files import open_files
from veneer.jobs.input_files import copy_input
from veneer.jobs.store import JobStore
from veneer.jobs.tables import JOB_SCHEMA
from veneer.library.index import INDEX_SCHEMA
from veneer.library.library import Library, open_library
from veneer.library.maintenance import verify_library
from veneer.serve.request import Usage
from veneer.serve.tenancy.entry import LedgerEntry, LedgerLine
from veneer.serve.tenancy.ledger import usage
from veneer.serve.tenancy.store import TENANT_SCHEMA, Price, Store, tenants_at
from veneer.serve.tenancy.tenants import Tenants

ROOT = Path(__file__).resolve().parents[2]
ROWS = b'{"prompt": "Where is my parcel?", "completion": "On its way."}\n'
TABLES = [table for schema in (INDEX_SCHEMA, JOB_SCHEMA, TENANT_SCHEMA) for table in schema.tables.sorted_tables]


def fill(folder: Path, library: Library, store: Store) -> str:
    """Add adapters, a tenant with usage, an uploaded file and a queued job. Return the tenant's key."""
    jobs, files = JobStore(library), open_files(library)
    for seed, name in enumerate(("support", "support", "acme/tone")):
        library.add(made(folder / f"a{seed}", seed, tags=["x"]), name, describe=read_made, tags=["new"])
    library.alias("support@1", "prod")
    key = new_tenant(store, "acme", ["acme/*"])
    tenants = Tenants(store, watch=False)
    use(tenants, "r0")
    tenants.ledger.flush()
    file = files.add("acme", "tickets.jsonl", "fine-tune", io.BytesIO(ROWS))
    path = copy_input(files, "kq7vz2mh", "train", file)
    config = CONFIG | {"data": {"train": str(path)}}
    job = jobs.create("acme", config, name="support", about={"input": "kq7vz2mh"})
    jobs.queue(taken(jobs, state="validating", only=job.id), PLAN, price=5)
    tenants.close()
    return key


def use(tenants: Tenants, request: str) -> None:
    entry = LedgerEntry(
        request, "acme", "support", 1_800_000_000.0, 5, 7, (LedgerLine("d", "support@1", 1.0, Price(9, 9, 9)),)
    )
    tenants.ledger.open(entry).result(30)
    tenants.ledger.settle(request, Usage(5, 1, 7)).result(30)


def contents(library: Library, where: str) -> dict[str, Any]:
    """Return every row of the three schemas, and the bytes of every stored file."""
    rows: dict[str, Any] = {}
    with contextlib.closing(Store(where)) as store:
        for table in TABLES:
            engine = store.engine if table.name in TENANT_SCHEMA.tables.tables else library.engine
            if not table.name.endswith("_meta"):
                with engine.connect() as c:
                    rows[table.name] = sorted((tuple(row) for row in c.execute(select(table))), key=repr)
    stores = {"library": library.store, "uploads": open_files(library).store}
    for name, each in stores.items():
        for prefix in ("blobs", "manifests", "names", "tenants"):
            for path, _, _ in each.walk(prefix):
                if name == "library" or prefix == "tenants":
                    rows[f"{name}/{path}"] = each.read(path)
    return rows


@pytest.fixture
def machine(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """Return a filled veneer home, which VENEER_HOME names."""
    for name in [n for n in os.environ if n.startswith("VENEER_") and n != "VENEER_TEST_KERNELS"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("VENEER_HOME", str(quick / "home"))
    with open_library() as library, contextlib.closing(Store(str(quick / "home" / "tenants.sqlite"))) as store:
        fill(quick / "made", library, store)
    judged = quick / "home" / "judged" / "tiny" / "votes.jsonl"
    judged.parent.mkdir(parents=True)
    judged.write_bytes(ROWS)
    return quick


def backup(path: Path) -> dict[str, Any]:
    with open_library() as library, tenants_at(None) as store:
        return write_backup(path, library, store)


def here(home: Path) -> dict[str, Any]:
    with open_library(home / "library") as library:
        return contents(library, str(home / "tenants.sqlite"))


def without_paths(rows: dict[str, Any]) -> dict[str, Any]:
    """Return contents without the job's configuration, in which a path differs."""
    jobs = [tuple(v for v in row if "tickets.jsonl" not in str(v)) for row in rows["jobs"]]
    return rows | {"jobs": jobs}


def test_every_row_and_file_returns(machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    archive = machine / "monday.tar"
    said = run(capsys, "backup", "create", str(archive)).out
    assert "left out: base models" in said
    assert archive.stat().st_mode & 0o777 == 0o600
    assert run(capsys, "backup", "create", str(archive), code=2).err.startswith("error: a file or folder")
    before, second = here(machine / "home"), machine / "elsewhere" / "home"
    monkeypatch.setenv("VENEER_HOME", str(second))
    run(capsys, "backup", "restore", str(archive))
    assert without_paths(here(second)) == without_paths(before)
    with open_library() as library:
        assert verify_library(library).ok
        assert library.find("support@prod").version == 1
        (job,), _ = JobStore(library).jobs("acme")
        assert (job.state, job.price) == ("queued", 5)
        assert Path(job.config["data"]["train"]).read_bytes() == ROWS
        assert str(second) in job.config["data"]["train"]
    after = here(second)
    assert (second / "judged" / "tiny" / "votes.jsonl").read_bytes() == ROWS
    # a target in use is refused, and set aside on request
    assert "is not empty" in run(capsys, "backup", "restore", str(archive), code=2).err
    assert here(second) == after
    (second / "judged" / "tiny" / "votes.jsonl").write_bytes(b"{}\n")
    run(capsys, "backup", "restore", str(archive), "--replace")
    assert without_paths(here(second)) == without_paths(before)
    (aside,) = second.glob("judged.before-restore-*")
    assert (aside / "tiny" / "votes.jsonl").read_bytes() == b"{}\n"
    assert len([*second.glob("library.before-restore-*/index.sqlite")]) == 1


def test_archives_move_between_kinds_of_databases_and_stores(
    machine: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    bucket, database = request.getfixturevalue("s3") + "/library", request.getfixturevalue("postgres")()
    before = here(machine / "home")
    backup(machine / "a.tar")
    monkeypatch.setenv("VENEER_HOME", str(machine / "second"))
    restore_backup(machine / "a.tar", bucket, database, database)
    with open_library(bucket, database) as library:
        assert without_paths(contents(library, database)) == without_paths(before)
        files = open_files(library)  # a new row takes a number that no restored row has
        files.add("acme", "more.jsonl", "fine-tune", io.BytesIO(ROWS + ROWS))
        files.delete("acme", files.list("acme")[0][0].id)
        with contextlib.closing(Store(database)) as store:
            write_backup(machine / "b.tar", library, store)
        with pytest.raises(ConfigError, match="set aside"):
            restore_backup(machine / "a.tar", bucket, database, database, replace=True)
    monkeypatch.setenv("VENEER_HOME", str(machine / "third"))
    home = machine / "third"
    restore_backup(machine / "b.tar", str(home / "library"), None, str(home / "tenants.sqlite"))
    assert without_paths(here(home)) == without_paths(before)


_KILL = """
import os, signal, sys
from sqlalchemy import Engine, event
left = int(sys.argv.pop(1))
def tick():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
event.listen(Engine, "commit", lambda c: tick())
def hook(name, arguments):
    if name == "os.rename" or (name == "open" and "/blobs/" in str(arguments[0])):
        tick()
sys.addaudithook(hook)
from veneer.cli.main import main
main()
"""


def killed(folder: Path, number: int, *arguments: str) -> bool:
    """Run a command that is killed at its n-th commit, rename or opened blob; return whether it was killed."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    code = Forked(["-c", _KILL, str(number), *arguments], env=env, log=folder / "log", cwd=folder).wait()
    assert code in (0, -9), (folder / "log").read_text()
    return code != 0


def test_killed_backup_leaves_no_archive(machine: Path) -> None:
    number = 1
    while killed(machine, number, "backup", "create", str(machine / "a.tar")):
        assert not (machine / "a.tar").exists()
        for part in machine.glob(".a.tar.*"):
            if number < 5:  # the last kill is before the rename, when the archive is complete
                with pytest.raises(DataError, match="incomplete or damaged"):
                    check_backup(part)
            assert part.stat().st_mode & 0o777 == 0o600
        number += 1
    assert number > 5
    check_backup(machine / "a.tar")


def test_killed_restore_cannot_be_mistaken_for_a_whole_one(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    before, archive = without_paths(here(machine / "home")), machine / "a.tar"
    backup(archive)
    number, refused = 1, 0
    while True:
        home = machine / f"home{number}"
        monkeypatch.setenv("VENEER_HOME", str(home))
        if not killed(machine, number, "backup", "restore", str(archive)):
            break
        opened = run(capsys, "library", "list", code=None) if (home / "library" / "library.json").exists() else None
        if opened is not None and opened.code == 2:
            assert "run `veneer backup restore` again" in opened.err
            refused += 1
        if opened is None or opened.code == 2:  # otherwise killed after the last commit that matters
            restore_backup(archive, str(home / "library"), None, str(home / "tenants.sqlite"))
        assert without_paths(here(home)) == before
        number += 1
    assert refused > 5
    assert without_paths(here(home)) == before


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("archive")
    with open_library(folder / "library") as library, contextlib.closing(Store(str(folder / "t.sqlite"))) as store:
        fill(folder / "made", library, store)
        write_backup(folder / "a.tar", library, store)
    return (folder / "a.tar").read_bytes()


@settings(max_examples=300)
@given(data=st.data())
def test_one_changed_byte_is_found(
    archive: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(archive) - 1))
    value = data.draw(st.integers(1, 255))
    path = tmp_path_factory.getbasetemp() / "changed.tar"
    path.write_bytes(archive[:at] + bytes([archive[at] ^ value]) + archive[at + 1 :])
    with pytest.raises(DataError, match="incomplete or damaged"):
        check_backup(path)
    path.write_bytes(archive[:at])
    with pytest.raises(DataError, match="incomplete or damaged"):
        check_backup(path)


def resealed(archive: bytes, change: Any) -> bytes:
    """Return the archive with changed members, and a correct manifest and sha256."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar if info.name != "SHA256"]  # type: ignore[union-attr]
    files = {info.name: data for info, data in members}
    manifest = json.loads(files.pop("manifest.json"))
    extra = change(manifest, files)
    manifest["files"] = {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in files.items()}
    manifest["files"] |= {info.name: [0, hashlib.sha256().hexdigest()] for info in extra or ()}
    for info in extra or ():
        out.write(info.tobuf(tarfile.PAX_FORMAT))
    for name, data in [*files.items(), ("manifest.json", json.dumps(manifest).encode())]:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        out.write(info.tobuf(tarfile.PAX_FORMAT) + data + bytes(-len(data) % 512))
    seal = tarfile.TarInfo("SHA256")
    seal.size, seal.mode = 64, 0o600
    digest = hashlib.sha256(out.getvalue()).hexdigest().encode()
    return out.getvalue() + seal.tobuf(tarfile.PAX_FORMAT) + digest + bytes(448 + 1024)


def _link(kind: bytes, name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def _renamed_file(manifest: Any, files: dict[str, bytes]) -> None:
    (name,) = [name for name in files if name.startswith("tables/library_files/")]
    files[name] = files[name].replace(b'"a.safetensors"', b'"../../../evil"')


HOSTILE: dict[str, Any] = {
    "a path outside": lambda manifest, files: files.update({"inputs/../../evil": b"x"}),
    "an absolute path": lambda manifest, files: files.update({"/evil": b"x"}),
    "a symbolic link": lambda manifest, files: [_link(tarfile.SYMTYPE, "inputs/evil")],
    "a hard link": lambda manifest, files: [_link(tarfile.LNKTYPE, "inputs/evil")],
    "a device": lambda manifest, files: [_link(tarfile.CHRTYPE, "inputs/evil")],
    "a later version": lambda manifest, files: manifest.update({"veneer-backup": 2}),
    "later tables": lambda manifest, files: manifest["revisions"].update(tenant_version="9999"),
    "earlier tables": lambda manifest, files: manifest["revisions"].update(tenant_version="0001"),
    "an adapter's file with a path": _renamed_file,
    "an id with a path": lambda manifest, files: manifest.update(library="../x"),
    "no tables": lambda manifest, files: manifest.pop("revisions") and None,
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_archive_is_refused(
    archive: bytes, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "deep" / "home"))
    path, home = tmp_path / "a.tar", tmp_path / "deep" / "home"
    path.write_bytes(resealed(archive, HOSTILE[attack]))
    with pytest.raises((DataError, ConfigError)):
        restore_backup(path, str(home / "library"), None, str(home / "tenants.sqlite"))
    assert not [*tmp_path.rglob("evil")]
    if attack != "an adapter's file with a path":  # found only among the rows, which are written last
        assert not home.exists()
    path.write_bytes(resealed(archive, lambda manifest, files: None))
    check_backup(path)  # so the attack is what was refused


def test_backup_of_a_busy_ledger_is_consistent(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, counts = threading.Event(), []
    tenants = Tenants(str(machine / "home" / "tenants.sqlite"), watch=False)

    def write() -> None:
        number = 1
        while not stop.is_set():
            use(tenants, f"r{number}")
            number += 1

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for number in range(5):
            backup(machine / f"{number}.tar")
    finally:
        stop.set()
        thread.join()
        tenants.close()
    for number in range(5):
        home = machine / f"home{number}"
        monkeypatch.setenv("VENEER_HOME", str(home))
        restore_backup(machine / f"{number}.tar", str(home / "library"), None, str(home / "tenants.sqlite"))
        lines = here(home)["tenant_lines"]
        with contextlib.closing(Store(str(home / "tenants.sqlite"))) as store, store.reading() as c:
            (total,) = usage(c, by=())
        assert total["requests"] == len(lines)
        assert total["completion"] == 7 * total["done"]
        counts.append(len(lines))
    assert counts == sorted(counts)
    assert counts[-1] > 1


def test_restored_server_answers_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Backed up while the server runs; restored to an empty machine that has the base."""
    shop, where = make_shop(tmp_path / "one", ["plain"]), str(tmp_path / "one" / "tenants.sqlite")
    with contextlib.closing(Store(where)) as store:
        key = new_tenant(store, "acme", ["plain"])
    asked = asking("plain", [5, 6, 7, 8, 9], 4)
    body = {k: v for k, v in asked.items() if k != "extra_body"} | asked["extra_body"]
    headers = {"authorization": f"Bearer {key}"}
    with served(shop, tenants=where) as server:
        first = server.http.post("/v1/completions", json=body, headers=headers).json()["choices"]
        assert server.built.service.tenancy.ledger.flush()  # type: ignore[attr-defined]
        places = ["--library", shop.library.location, "--tenants", where]
        run(capsys, "backup", "create", str(tmp_path / "a.tar"), *places)
    other = Shop(tmp_path / "two")
    shutil.copytree(shop.base_dir, other.base_dir)
    shutil.copytree(shop.adapters, other.adapters)
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "two" / "home"))
    restored = str(tmp_path / "two" / "tenants.sqlite")
    places = ["--library", str(tmp_path / "two" / "library"), "--tenants", restored]
    run(capsys, "backup", "restore", str(tmp_path / "a.tar"), *places)
    sums = []
    for each in (where, restored):
        with contextlib.closing(Store(each)) as store, store.reading() as c:
            sums.append(usage(c, by=("tenant", "adapter", "day")))
    assert sums[0] == sums[1]
    assert sums[1][0]["completion"] == 4
    with served(other, tenants=restored, folders=()) as server:
        assert server.http.post("/v1/completions", json=body).status_code == 401
        assert server.http.post("/v1/completions", json=body, headers=headers).json()["choices"] == first
