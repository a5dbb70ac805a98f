"""Uploaded files: complete or absent, private to their tenant, and removed on time."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import event, insert

from veneer.jobs.files import Files, UploadedFile, open_files
from veneer.jobs.store import JobStore
from veneer.jobs.tables import job_file_table
from veneer.library.library import Library, open_library
from veneer.serve.quota import Quotas
from veneer.serve.request import Refused
from veneer.serve.settings import QuotaLimits
from veneer.serve.tenancy import manage
from veneer.serve.tenancy.store import Store

ROWS = b'{"messages": []}\n'
HOUR = 3600.0


@pytest.fixture
def files(library: Library) -> Files:
    """A file store whose clock stands still until a test moves it."""
    opened = open_files(library, Quotas(QuotaLimits(disk=2000, files=8)))
    now = opened.clock()
    opened.clock = lambda: now
    return opened


def later(files: Files, seconds: float) -> None:
    now = files.clock() + seconds
    files.clock = lambda: now


def stored_hashes(files: Files) -> set[str]:
    """Return the SHA-256 hash of each stored blob."""
    return {path.rpartition("/")[2] for path, _, _ in files.store.walk("tenants")}


def add(files: Files, tenant: str, data: bytes = ROWS, name: str = "rows.jsonl", ttl: float | None = None) -> str:
    return files.add(tenant, name, "fine-tune", io.BytesIO(data), ttl=ttl).id


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_file_is_stored_unchanged(files: Files, tmp_path: Path) -> None:
    file = files.get("acme", add(files, "acme", name="C:\\data\\../support rows.jsonl"))
    assert (file.filename, file.bytes, file.sha256) == ("support rows.jsonl", len(ROWS), sha(ROWS))
    with files.open(file) as source:
        assert source.read() == ROWS
    files.delete("acme", add(files, "acme"))
    copy = files.copy_to(file, tmp_path)
    files.delete("acme", file.id)
    assert (copy.parent, copy.name, copy.read_bytes()) == (tmp_path, "support rows.jsonl", ROWS)


def test_files_work_in_a_remote_store(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(quick / "home"))
    with open_library(f"memory://{quick.name}") as library:
        files = open_files(library)
        file = files.get("acme", add(files, "acme"))
        with files.open(file) as source:
            assert source.read() == ROWS
        files.delete("acme", file.id)
        assert stored_hashes(files) == set()


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_files_are_private_to_the_user(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers new databases and folders, and existing ones with open permissions."""
    monkeypatch.setenv("VENEER_HOME", str(quick / "home"))
    umask = os.umask(0o022)
    try:
        for again in range(2):
            with open_library(quick / "library") as library, closing(Store(str(quick / "tenants.sqlite"))) as tenants:
                jobs, files = JobStore(library), open_files(library)
                files.add("acme", "a.jsonl", "fine-tune", io.BytesIO(b"{}"))
                jobs.create("acme", {}, name="x").make_folder()
                manage.add_tenant(tenants, f"t{again}", actor="test")
                databases = [*quick.glob("*.sqlite*"), *(quick / "library").glob("index.sqlite*")]
                assert len(databases) == 6  # including SQLite's -wal and -shm files
                assert [stat.S_IMODE(path.stat().st_mode) for path in databases] == [0o600] * 6
                for folder in (quick / "library" / "uploads", quick / "home" / "jobs"):
                    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
                    folder.chmod(0o755)
                for path in (quick / "tenants.sqlite", quick / "library" / "index.sqlite"):
                    path.chmod(0o644)
    finally:
        os.umask(umask)


def test_files_are_private_to_the_tenant(files: Files) -> None:
    """Covers every method that takes an id. Tenants never share stored bytes."""
    id = add(files, "acme")
    for attack in (files.get, files.delete, lambda tenant, id: files.list(tenant, after=id)):
        with pytest.raises(Refused) as refused:
            attack("globex", id)
        assert refused.value.status == 404
    assert files.list("globex") == files.list("") == ([], False)
    add(files, "globex")
    files.delete("globex", files.list("globex")[0][0].id)
    with files.open(files.get("acme", id)) as source:
        assert source.read() == ROWS


def test_bytes_are_deleted_with_their_last_file(files: Files) -> None:
    first, second = add(files, "acme"), add(files, "acme")
    files.delete("acme", first)
    assert stored_hashes(files) == {sha(ROWS)}
    files.delete("acme", second)
    assert stored_hashes(files) == set()
    with pytest.raises(Refused, match="No such File"):
        files.delete("acme", second)


def test_concurrent_delete_keeps_bytes_of_a_new_file(files: Files) -> None:
    """Another file with equal bytes is deleted after `add` has found the bytes."""
    first = add(files, "acme")
    begin, done = files.store.size, []

    def size(path: str) -> int | None:
        size_now = begin(path)
        if not done:
            done.append(path)
            files.delete("acme", first)
        return size_now

    files.store.size = size
    second = add(files, "acme")
    with files.open(files.get("acme", second)) as source:
        assert source.read() == ROWS


def test_file_expires_on_time(files: Files) -> None:
    id, unlimited = add(files, "acme", ttl=HOUR), add(files, "acme", b"kept")
    later(files, HOUR - 1)
    files.sweep()
    assert files.get("acme", id).id == id
    later(files, 1)
    with pytest.raises(Refused, match="No such File"):
        files.get("acme", id)
    assert [file.id for file in files.list("acme")[0]] == [unlimited]
    files.sweep()
    assert stored_hashes(files) == {sha(b"kept")}


def test_many_files_expire_in_few_transactions(files: Files) -> None:
    """There are more files with distinct bytes than one SQL statement can have values."""
    files.quotas, now, count = Quotas(), files.clock(), 1200
    content = b"".join(b"%04d" % n for n in range(count))
    rows: list[dict[str, object]] = []
    for n in range(count):
        data = content[4 * n : 4 * n + 4]
        path = f"tenants/acme/blobs/{sha(data)[:2]}/{sha(data)}"
        files.store.put(path, data, sha(data))
        file = UploadedFile(f"file-{n}", "acme", "a.jsonl", "fine-tune", 4, sha(data), now, now + HOUR)
        rows.append(vars(file))
    with files.engine.begin() as c:
        for at in range(0, count, 100):
            c.execute(insert(job_file_table), rows[at : at + 100])
    add(files, "acme", b"0007", ttl=2 * HOUR)
    later(files, HOUR)
    commits, most = [0], [0]

    def counted(connection: object) -> None:
        commits[0] += 1

    def bound(connection: object, cursor: object, statement: str, parameters: object, *_: object) -> None:
        most[0] = max(most[0], len(parameters) if isinstance(parameters, tuple | dict) else 0)

    event.listen(files.engine, "commit", counted)
    event.listen(files.engine, "before_cursor_execute", bound)
    files.sweep()
    assert commits[0] < 100
    assert most[0] < 1000
    assert stored_hashes(files) == {sha(b"0007")}


def test_sweep_removes_only_leftovers_of_a_kill(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed after it wrote the bytes, before it inserts the row."""

    class Killed(BaseException):
        pass

    id, clock = add(files, "acme"), files.clock

    def kill(table: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("veneer.jobs.files.insert", kill)
        with pytest.raises(Killed):
            add(files, "acme", b"never said to be there")
    assert stored_hashes(files) == {sha(ROWS), sha(b"never said to be there")}
    files.sweep()  # keeps new bytes, because an upload could still insert their row
    assert len(stored_hashes(files)) == 2
    files.clock = lambda: clock() + 2 * HOUR
    files.sweep()
    assert stored_hashes(files) == {sha(ROWS)}
    assert files.get("acme", id)


def test_file_quotas_and_names_are_checked(files: Files) -> None:
    add(files, "acme", bytes(1900))
    with pytest.raises(Refused) as refused:
        add(files, "acme", bytes(150))
    assert (refused.value.status, refused.value.code) == (400, "storage_full")
    assert stored_hashes(files) == {sha(bytes(1900))}
    made_here = files.add("acme", "a.csv", "fine-tune-results", io.BytesIO(bytes(150)), id="file-own")
    assert files.get("acme", made_here.id) == made_here  # results can exceed quotas, so that jobs can be inspected
    for _ in range(8):
        add(files, "globex", bytes(150))
    with pytest.raises(Refused, match="8 files") as refused:
        add(files, "globex", b"x")
    assert refused.value.code == "storage_full"
    for name in ("", "..", "a\nb", "x" * 201):
        with pytest.raises(Refused, match="name"):
            add(files, "acme", name=name)
    with pytest.raises(Refused, match="empty"):
        add(files, "acme", b"")
