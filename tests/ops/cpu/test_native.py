"""Compiled kernels are optional, reported, and tested against torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer.ops.cpu import compiled, memory


def status(tmp_path: Path, **environment: str) -> str:
    """Return the kernels' status in this environment, with an empty cache."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"VENEER_HOME": str(tmp_path), **environment}.items():
            patch.setenv(name, value)
        compiled.kernels_for.cache_clear()
        said = compiled.status()
    compiled.kernels_for.cache_clear()
    return said


def test_missing_compiler_falls_back_to_torch_with_a_reason(tmp_path: Path) -> None:
    assert "no C compiler" in status(tmp_path, PATH=str(tmp_path), CC="")


def test_kernels_can_be_turned_off(tmp_path: Path) -> None:
    assert "VENEER_NATIVE=0" in status(tmp_path, VENEER_NATIVE="0")


def test_failed_compilation_is_reported_and_cleaned_up(tmp_path: Path) -> None:
    bad = tmp_path / "bad-cc"
    bad.write_text(
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo bad 1.0; exit 0; fi\necho 'no such flag' >&2\nexit 1\n"
    )
    bad.chmod(0o755)
    said = status(tmp_path / "home", CC=str(bad))
    assert f"could not be built: {bad} ended with exit code 1; its last output: no such flag; install" in said
    assert "unset CC" in said
    assert not list((tmp_path / "home").rglob("*.so"))


def test_missing_compiler_is_reported(tmp_path: Path) -> None:
    assert "CC=no-such-cc is not on the path" in status(tmp_path, CC="no-such-cc", PATH=str(tmp_path))


@pytest.fixture
def library() -> object:
    found = compiled.kernels()
    if found is None:
        pytest.skip(compiled.status())
    return found


def test_results_do_not_depend_on_the_number_of_threads(library: object) -> None:
    x, w = torch.randn(33, 64).bfloat16(), torch.randn(64).bfloat16()
    results = []
    for threads in (1, 2, 5):
        y = torch.empty_like(x)
        library.rms_norm(x.data_ptr(), w.data_ptr(), y.data_ptr(), 33, 64, 1e-5, threads)  # type: ignore[attr-defined]
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_nan_and_infinity_stay_visible(library: object, dtype: torch.dtype) -> None:
    """Training stops at a non-finite loss, so a kernel must not hide NaN or infinity."""
    logits = torch.zeros(3, 40, dtype=dtype)
    logits[0, 3], logits[1, 5] = float("nan"), float("inf")
    nll = torch.empty(3)
    targets = torch.tensor([0, 0, 0])
    arguments = logits.data_ptr(), int(dtype == torch.bfloat16), targets.data_ptr(), nll.data_ptr()
    library.token_nll(*arguments, None, 3, 40, 1, 1)  # type: ignore[attr-defined]
    assert not nll[0].isfinite()
    assert not nll[1].isfinite()
    assert nll[2].isfinite()
    x = torch.tensor([[1.0, float("nan")]], dtype=torch.bfloat16)
    y = torch.empty_like(x)
    library.rms_norm(x.data_ptr(), torch.ones_like(x).data_ptr(), y.data_ptr(), 1, 2, 1e-5, 1)  # type: ignore[attr-defined]
    assert not y.isfinite().any()


MAPPED = """
import ctypes
from veneer.ops.cpu import compiled, memory

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]

def mapped(size):
    block = libc.malloc(size)  # glibc: the second bit of the word before it
    found = bool(ctypes.c_size_t.from_address(block - 8).value & 2)
    libc.free(ctypes.c_void_p(block))
    return found

with memory.keep_freed_memory():
    inside = [mapped(40 << 20)]
    with memory.keep_freed_memory():
        pass
    inside.append(mapped(80 << 20))  # each larger than what lies free
    with memory.return_freed_memory():
        inside.append(mapped(160 << 20))
        with memory.keep_freed_memory():
            inside.append(mapped(240 << 20))
        inside.append(mapped(320 << 20))
    inside.append(mapped(400 << 20))
print(inside, [mapped(40 << 20), mapped(24 << 20)])
before = libc.sbrk(0)
blocks = [libc.malloc(16 << 20) for _ in range(3)]
for block in reversed(blocks):
    libc.free(ctypes.c_void_p(block))
print(libc.sbrk(0) > before)
"""


def test_keep_freed_memory_is_restored_after_the_last_block() -> None:
    """Afterwards, glibc maps blocks above 32 MB and can keep 64 MB free.

    Both are the upper limits of glibc's own dynamic rule."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("mallopt is glibc's")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", MAPPED]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split("\n")[:2] == ["[False, False, True, False, True, False] [True, False]", "True"]


@pytest.mark.skipif(sys.platform != "linux", reason="nobody says so elsewhere")
def test_mapped_memory_is_resident_after_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 << 20))
    mapped = torch.from_file(str(tmp_path / "file"), size=1 << 20)
    assert memory.unread_bytes(mapped) == 4 << 20
    mapped[: 1 << 19].sum()
    assert (1 << 20) < memory.unread_bytes(mapped) <= 2 << 20  # the operating system reads ahead a little
    mapped.sum()
    assert memory.unread_bytes(mapped) == memory.unread_bytes(torch.ones(1 << 20)) == 0


def test_paged_out_memory_reads_as_before(tmp_path: Path) -> None:
    values = torch.arange(100_000, dtype=torch.float32)
    (tmp_path / "file").write_bytes(values.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "file"), size=100_000)
    for tensor in (values.clone(), mapped, values[:3].clone()):
        wanted = tensor.tolist()
        memory.page_out(tensor)
        assert tensor.tolist() == wanted
