"""Files and processes that only their owner can read."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.files.rights import make_private, private_folder

pytestmark = pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("before", "after"), [(0o644, 0o600), (0o755, 0o700), (0o664, 0o660), (0o777, 0o770), (0o600, 0o600)]
)
def test_make_private_removes_access_of_others(tmp_path: Path, before: int, after: int) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    for path in (file, folder):
        path.chmod(before)
    make_private(file)
    private_folder(folder)
    assert rights(file) == rights(folder) == after
    make_private(tmp_path / "nothing")


@pytest.mark.parametrize(("umask", "wanted"), [(0o022, 0o700), (0o002, 0o770), (0, 0o770)])
def test_new_folder_is_private_with_any_umask(tmp_path: Path, umask: int, wanted: int) -> None:
    before = os.umask(umask)
    try:
        assert rights(private_folder(tmp_path / "a" / "b")) == wanted
    finally:
        os.umask(before)


PRIVATE = """
import ctypes, os, sys, time
from veneer.files.rights import forbid_inspection

if os.geteuid() == 0:  # root reads everything
    os.setresuid(61183, 61183, 61183)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)

def readable(before):
    ready, done = os.pipe()
    child = os.fork()
    if child == 0:
        before()
        os.write(done, b"1")
        time.sleep(60)
    os.read(ready, 1)
    try:
        with open(f"/proc/{child}/environ", "rb") as opened:
            return opened.read() != b""
    except PermissionError:
        return False
    finally:
        os.kill(child, 9)
        os.wait()

print(readable(lambda: None), readable(forbid_inspection))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_private_process_cannot_be_read_by_same_user() -> None:
    done = subprocess.run([sys.executable, "-c", PRIVATE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
