"""Building the kernels' library: one per processor, private to the user."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from veneer.ops.cpu import build, compiled

COMPILER = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "")
HERE = Path(compiled.__file__).parent

pytestmark = pytest.mark.skipif(not COMPILER or not hasattr(os, "geteuid"), reason="no C compiler, or no owners")


@pytest.fixture(scope="module")
def copying(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a fake compiler that copies an existing library, to save time."""
    made = compiled.kernels()
    if made is None:
        pytest.skip(compiled.status())  # VENEER_NATIVE=0
    script = tmp_path_factory.mktemp("compiler") / "cc"
    script.write_text(
        f"""#!/bin/sh
while [ $# -gt 1 ] && [ "$1" != -o ]; do shift; done
if [ "$1" = -o ]; then cp {shlex.quote(str(made.path))} "$2" && chmod 777 "$2"; else echo what a processor is; fi
"""
    )
    script.chmod(0o700)
    return str(script)


@pytest.fixture
def said(tmp_path: Path, copying: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Return a function that reports the kernels' status, using temporary folders.

    test_selftest.py runs the kernels; these tests do not."""
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CC", copying)
    monkeypatch.setattr(build, "failed_kernels", lambda library: {})

    def looked() -> str:
        compiled.kernels_for.cache_clear()
        return compiled.status()

    yield looked
    compiled.kernels_for.cache_clear()


def test_built_library_is_private_for_any_umask(tmp_path: Path, said: Callable[[], str]) -> None:
    before = os.umask(0)
    try:
        assert "native CPU kernels: compiled by" in said()
    finally:
        os.umask(before)
    made = [tmp_path / "home" / "kernels", *(tmp_path / "home" / "kernels").iterdir()]
    assert {p.suffix for p in made} == {"", ".so", ".json", ".lock"}
    assert all(not p.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) for p in made)


def test_unused_kernel_folder_is_reported(tmp_path: Path, said: Callable[[], str]) -> None:
    open_to_all = tmp_path / "home" / "kernels"
    open_to_all.mkdir(parents=True)
    open_to_all.chmod(0o777)
    status = said()
    assert f"{open_to_all} is not used: other users can write to it" in status
    assert "compiled by" in status
    assert not list(open_to_all.iterdir())
    assert list((tmp_path / "cache" / "veneer" / "kernels").glob("*.so"))
    (tmp_path / "cache" / "veneer" / "kernels").chmod(0o777)
    status = said()
    assert status.startswith("torch's own operations")
    assert "no folder for the kernels that only you can write to" in status


def test_library_of_another_user_is_not_loaded(tmp_path: Path, copying: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    sources, headers = ([HERE / n for n in names] for names in (compiled.SOURCES, compiled.HEADERS))
    monkeypatch.setattr(build, "failed_kernels", lambda library: {})
    first = build.build_kernels(copying, sources, headers)
    good = first.library.read_bytes()
    first.library.write_bytes(b"somebody else's")
    first.library.chmod(0o777)
    again = build.build_kernels(copying, sources, headers)
    assert again.library.read_bytes()[:4] == good[:4]
    assert any("built again: other users can write to it" in note for note in again.notes)
    owner = os.stat_result((0o100700, 0, 0, 1, os.geteuid() + 1, 0, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda self, **more: owner)
    assert build.distrust_reason(first.library) == "it belongs to another user"


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"a": 1}', "[" * 200_000])
def test_damaged_self_test_record_is_rewritten(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(build, "failed_kernels", lambda library: {"one": "is wrong"})
    monkeypatch.setattr(
        build, "compile_kernels", lambda compiler, sources, target, more: target.write_bytes(b"") or None
    )
    made = build.build_kernels(COMPILER, [HERE / "native.c"], [])
    (record,) = made.library.parent.glob("*.json")
    record.write_text(content)
    assert build.build_kernels(COMPILER, [HERE / "native.c"], []).rejected == {"one": "is wrong"}
    assert record.read_text() == '{"one": "is wrong"}'


def test_new_torch_version_reruns_the_self_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels call libtorch, so a result with one torch version says nothing about another version.

    The library is not compiled again."""
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    compiled_now: list[Path] = []
    monkeypatch.setattr(
        build, "compile_kernels", lambda c, s, target, more: compiled_now.append(target.write_bytes(b"") or target)
    )
    for version in ("2.13.0", "2.14.0", "2.13.0"):
        monkeypatch.setattr(torch, "__version__", version)
        monkeypatch.setattr(build, "failed_kernels", lambda library, version=version: {"one": f"is wrong in {version}"})
        assert build.build_kernels(COMPILER, [HERE / "native.c"], []).rejected == {"one": f"is wrong in {version}"}
    assert len(compiled_now) == 1


def test_sources_are_compiled_at_the_same_time(tmp_path: Path) -> None:
    compiler, names = tmp_path / "cc", ["one", "two", "three"]
    # A fake compiler that waits until all sources are being compiled.
    compiler.write_text(
        f"""#!/bin/sh
for last; do :; done
case "$*" in
    *" -c "*) cd {tmp_path}; touch "$last" begun-$$; for i in $(seq 600); do
        [ $(ls begun-* | wc -l) = {len(names)} ] && exit 0; sleep 0.05; done; exit 1;;
    *one.o*two.o*three.o*) while [ "$1" != -o ]; do shift; done; echo library > "$2";;
esac
"""
    )
    compiler.chmod(0o700)
    build.compile_kernels(str(compiler), [tmp_path / f"{name}.c" for name in names], tmp_path / "all.so")
    assert (tmp_path / "all.so").read_text() == "library\n"


def test_processes_that_start_at_once_build_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    compiled_now: list[Path] = []

    def compile_slowly(compiler: str, sources: Sequence[Path], target: Path, more: Sequence[str]) -> None:
        compiled_now.append(target)
        time.sleep(0.3)
        target.touch(0o700)

    monkeypatch.setattr(build, "compile_kernels", compile_slowly)
    monkeypatch.setattr(build, "failed_kernels", lambda library: {})
    with ThreadPoolExecutor(3) as pool:  # threads suffice, because a file lock also excludes threads
        found = list(pool.map(lambda _: build.build_kernels(COMPILER, [HERE / "native.c"], []).library, range(3)))
    assert compiled_now == found[:1]
    assert capsys.readouterr().err.count("compiling kernels for this processor (once") == 1


@pytest.mark.skipif(
    compiled.why_missing("narrow_rope_varlen_attention") != "", reason="no small bfloat16 products on this processor"
)
def test_onednn_limit_removes_the_small_bfloat16_products() -> None:
    """oneDNN throws a C++ exception, which would end the process, if it may not use bfloat16 instructions."""
    program = "from veneer.ops.cpu import compiled; print(compiled.why_missing('narrow_rope_varlen_attention'))"
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert "libtorch has no small matrix products" in ran.stdout, ran.stderr


def test_failed_kernel_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    library = compiled.Kernels(ctypes.CDLL(None), Path("kernels"))
    monkeypatch.setattr(compiled, "kernels", lambda: library)
    assert "this processor" in compiled.why_missing("narrow_rope_varlen_attention")
    assert "no AVX-512" in compiled.why_missing("attend")
    assert "no AVX-512, AVX2 or NEON" in compiled.why_missing("decode")
    library.wrong = {"narrow_rope_varlen_attention": "is off by 3", "decode": "crashes its process (-11)"}
    assert compiled.why_missing("narrow_rope_varlen_attention").endswith(
        "the self-test failed (narrow_rope_varlen_attention is off by 3)"
    )
    assert compiled.why_missing("decode").endswith("the self-test failed (decode crashes its process (-11))")


def test_each_processor_type_has_its_own_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's name depends on what the compiler resolves -march=native to.

    /proc/cpuinfo would not suffice, because it has no line of flags on ARM."""
    compiler = tmp_path / "cc"
    found = []
    monkeypatch.setattr(build, "failed_kernels", lambda library: {})
    monkeypatch.setattr(
        build, "compile_kernels", lambda compiler, sources, target, more: target.write_bytes(b"") or None
    )
    monkeypatch.setattr(sys, "platform", "elsewhere")  # no /proc/cpuinfo
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    for feature in ("SVE", "SVE2", "SVE"):
        compiler.write_text(
            f'#!/bin/sh\ncase "$*" in *-dM*) echo "#define __ARM_FEATURE_{feature} 1";; *) exit 1;; esac\n'
        )
        compiler.chmod(0o755)
        found.append(build.build_kernels(str(compiler), [HERE / "native.c"], []).library.name)
    assert found[0] == found[2]
    assert found[0] != found[1]
