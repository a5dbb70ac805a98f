"""The compiled kernels are optional, said aloud, and not trusted before they agree with torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from veneer import kernels

SAY = "from veneer import kernels; print(kernels.status())"


def status(tmp_path: Path, **environment: str) -> str:
    """What a fresh process says, with an empty cache."""
    env = {**os.environ, "VENEER_HOME": str(tmp_path), **environment}
    return subprocess.run([sys.executable, "-c", SAY], env=env, capture_output=True, text=True, check=True).stdout


def test_without_a_compiler_torch_does_the_work_and_says_so(tmp_path: Path) -> None:
    assert "no C compiler" in status(tmp_path, PATH=str(tmp_path), CC="")


def test_turned_off_on_request(tmp_path: Path) -> None:
    assert "VENEER_NATIVE=0" in status(tmp_path, VENEER_NATIVE="0")


def test_a_compiler_that_fails_is_reported_and_leaves_nothing_behind(tmp_path: Path) -> None:
    bad = tmp_path / "bad-cc"
    bad.write_text(
        "#!/bin/sh\nif [ \"$1\" = --version ]; then echo bad 1.0; exit 0; fi\necho 'no such flag' >&2\nexit 1\n"
    )
    bad.chmod(0o755)
    said = status(tmp_path / "home", CC=str(bad))
    assert "could not build them: no such flag" in said
    assert not list((tmp_path / "home").rglob("*.so"))


@pytest.fixture
def library() -> object:
    found = kernels.load()
    if found is None:
        pytest.skip(kernels.status())
    return found


def test_only_contiguous_bfloat16_on_the_cpu(library: object) -> None:
    x = torch.zeros(4, 6, dtype=torch.bfloat16)
    assert kernels.usable(x) is library
    assert kernels.usable(x.float()) is None
    assert kernels.usable(x.t()) is None
    assert kernels.usable(x.to("meta")) is None


def test_results_do_not_depend_on_the_number_of_threads(library: object) -> None:
    x, w = torch.randn(33, 64).bfloat16(), torch.randn(64).bfloat16()
    results = []
    for threads in (1, 2, 5):
        y = torch.empty_like(x)
        library.rms_norm(x.data_ptr(), w.data_ptr(), y.data_ptr(), 33, 64, 1e-5, threads)  # type: ignore[attr-defined]
        results.append(y)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_nan_and_infinity_stay_visible(library: object) -> None:
    """The loop stops a run whose loss is not finite: no kernel may turn one into a number."""
    logits = torch.zeros(3, 40, dtype=torch.bfloat16)
    logits[0, 3], logits[1, 5] = float("nan"), float("inf")
    nll = torch.empty(3)
    targets = torch.tensor([0, 0, 0])
    arguments = (t.data_ptr() for t in (logits, targets, nll))
    library.token_nll(*arguments, 3, 40, 1, 1)  # type: ignore[attr-defined]
    assert not nll[0].isfinite()
    assert not nll[1].isfinite()
    assert nll[2].isfinite()
    x = torch.tensor([[1.0, float("nan")]], dtype=torch.bfloat16)
    y = torch.empty_like(x)
    library.rms_norm(x.data_ptr(), torch.ones_like(x).data_ptr(), y.data_ptr(), 1, 2, 1e-5, 1)  # type: ignore[attr-defined]
    assert not y.isfinite().any()


def test_kept_memory_nests_and_ends() -> None:
    with kernels.kept_memory(), kernels.kept_memory():
        assert torch.ones(10_000_000).sum() == 10_000_000
    assert torch.ones(10_000_000).sum() == 10_000_000


def test_paged_out_memory_reads_as_before(tmp_path: Path) -> None:
    values = torch.arange(100_000, dtype=torch.float32)
    (tmp_path / "file").write_bytes(values.numpy().tobytes())
    mapped = torch.from_file(str(tmp_path / "file"), size=100_000)
    for tensor in (values.clone(), mapped, values[:3].clone()):
        wanted = tensor.tolist()
        kernels.page_out(tensor)
        assert tensor.tolist() == wanted
