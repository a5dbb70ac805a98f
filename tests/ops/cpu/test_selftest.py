"""The self-test covers every kernel, and excludes kernels with wrong results."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from veneer.ops.cpu import build, compiled, selftest
from veneer.ops.lowrank import LowRank
from veneer.ops.weight_panels import Panels

HERE = Path(compiled.__file__).parent
SOURCES = [HERE / name for name in compiled.SOURCES]
COMPILER = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "")
EMULATED = ["-D_GNU_SOURCE", "-include", str(Path(__file__).parent / "avx512_bf16.h"), "-DVENEER_EMULATE_AMX"]

pytestmark = pytest.mark.skipif(not COMPILER, reason="no C compiler")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile all kernels; emulate instructions that the processor lacks.

    AVX512-BF16 is emulated with AVX-512, and AMX in C. Optimization is low, because only results matter."""
    target = tmp_path_factory.mktemp("whole") / "native.so"
    build.compile_kernels(COMPILER, SOURCES, target, ["-O1", *(EMULATED if "AVX512BW" in torch_features() else [])])
    return target


def torch_features() -> str:
    found = build.machine_of(COMPILER)[1]
    return " ".join(re.findall(r"__(AVX512\w+?)__", found))


def test_every_exported_kernel_has_a_test_case() -> None:
    names = [name for case in selftest.CASES for name in case.kernels]
    assert sorted(names) == sorted(compiled.SIGNATURES)


cases = pytest.mark.parametrize("case", selftest.CASES, ids=lambda case: case.kernels[0])


def loaded(library: Path, case: selftest.Case) -> compiled.Kernels:
    found = compiled.load_library(library)
    if not found.has(*case.kernels):
        pytest.skip("not compiled for this processor")
    return found


@cases
def test_a_kernel_agrees_with_float64_and_writes_nothing_else(
    whole: Path, case: selftest.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    margins: list[Tensor] = []

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, **_: Any) -> Tensor:
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        flat = torch.full((math.prod(size) * dtype.itemsize + 512,), 0xFF, dtype=torch.uint8)
        margins.extend((flat[:256], flat[-256:]))
        return flat[256:-256].view(dtype).view(*size)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda t, **_: empty(tuple(t.shape), dtype=t.dtype))
    monkeypatch.setattr(Tensor, "new_empty", lambda t, *shape, dtype=None, **_: empty(*shape, dtype=dtype or t.dtype))
    assert selftest.wrong(loaded(whole, case), case) == ""
    assert all(bool((margin == 0xFF).all()) for margin in margins)


@pytest.mark.parametrize("march", ["x86-64-v3", pytest.param("x86-64-v4", marks=pytest.mark.slow)])
def test_kernels_for_older_processors_pass_the_self_test(march: str, tmp_path: Path) -> None:
    """Serving and training multiply bfloat16 with AVX2, and with AVX-512 without its BF16 part."""
    needs = {"x86-64-v3": "avx2", "x86-64-v4": "avx512vl"}[march]
    if not any(needs in line.split() for line in build.processor_features()):
        pytest.skip(f"this processor has no {needs}")
    build.compile_kernels(COMPILER, SOURCES, tmp_path / "native.so", [f"-march={march}", "-O1"])
    library = compiled.load_library(tmp_path / "native.so")
    assert library.has("decode", "panel_product", "lora_rows", "float_product", *compiled.PAGED)
    assert library.has("attend", "lora_forward") == (march == "x86-64-v4")
    assert build.failed_kernels(tmp_path / "native.so") == {}


@cases
def test_self_test_detects_idle_kernels(whole: Path, case: selftest.Case) -> None:
    for name in case.kernels:
        if name != "decode":  # decode is compared with the model's own output when a base is served
            library = loaded(whole, case)
            setattr(library, name, lambda *arguments: 0)
            assert selftest.wrong(library, case) == "disagrees with torch on this machine", name


@pytest.mark.parametrize("name", ["panel_product", "amx_panel_product"])
@pytest.mark.parametrize(
    ("out", "n", "pack"),
    [(112, 326, Panels.from_weight), (80, 1120, Panels.from_weight), (80, 1120, Panels.int8), (80, 1120, Panels.int4)],
)
def test_a_row_has_the_same_bits_in_any_batch(
    whole: Path, name: str, out: int, n: int, pack: Callable[[Tensor], Panels]
) -> None:
    """Covers partial panels and tiles, sums of several code blocks, and several tiles."""
    library = compiled.load_library(whole)
    if not library.has(name):
        pytest.skip("not compiled for this processor")
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(out, n, generator=g).bfloat16(), torch.randn(70, n, generator=g).bfloat16()
    matrix = pack(w)

    def product(rows: Tensor, threads: int) -> Tensor:
        y = rows.new_empty(len(rows), out)
        at = rows.data_ptr(), len(rows), n, matrix.pointers.data_ptr(), None, y.data_ptr(), out, 0, threads
        getattr(library, name)(*at)
        return y

    whole_batch = product(x, 1)
    want = x.double() @ matrix.dense().double().t()
    assert (whole_batch.double() - want).abs().max() <= 0.006 * want.abs().max()
    for first, count in ((0, 1), (3, 2), (5, 7), (9, 16), (20, 17), (11, 32), (30, 40)):
        part = product(x[first : first + count].contiguous(), 2)
        assert torch.equal(part, whole_batch[first : first + count])


def test_every_available_kernel_passes_the_self_test() -> None:
    """The kernels are compiled as for users, and checked as after a build."""
    library = compiled.kernels()
    if library is None:
        pytest.skip(compiled.status())
    assert library.wrong == {}


BROKEN: dict[str, Callable[[str], str]] = {
    "rms_norm disagrees with torch": lambda s: s.replace("norm_row(x + i * d, w, y + i * d, d, eps);", ";"),
    "geglu crashes its process": lambda s: s.replace("ui + f;\n        bf16 *hi", "ui + f;\n abort();\n bf16 *hi", 1),
}


def test_failing_kernels_are_excluded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers a kernel with wrong results, and a kernel that crashes its test process."""
    source = (HERE / "native.c").read_text()
    for change in BROKEN.values():
        changed = change(source)
        assert changed != source
        source = changed
    for path in (*SOURCES[1:], *(HERE / name for name in compiled.HEADERS)):
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "native.c").write_text(source)
    quick = tmp_path / "cc"
    quick.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O1\n')
    quick.chmod(0o700)
    monkeypatch.setenv("CC", str(quick))
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    compiled.kernels_for.cache_clear()
    try:
        x, w = torch.randn(3, 64).bfloat16(), torch.randn(64).bfloat16()
        assert compiled.kernels() is not None, compiled.status()
        for says in BROKEN:
            assert says in compiled.status()
            assert compiled.usable(says.split()[0], x) is None
        assert compiled.usable("gelu_tanh", x) is not None
        from veneer.ops.mlp import geglu
        from veneer.ops.norms import rms_norm

        want = torch.nn.functional.rms_norm(x.float(), (64,), w.float(), 1e-5)
        torch.testing.assert_close(rms_norm(x, w, 1e-5).float(), want, rtol=2**-7, atol=1e-3)
        up, gate = x.float().chunk(2, -1)
        torch.testing.assert_close(geglu(x).float(), up * torch.nn.functional.gelu(gate), rtol=2**-7, atol=1e-3)
        # the result is stored, so the self-test does not run again
        monkeypatch.setattr(build, "failed_kernels", lambda library: pytest.fail("tried again"))
        compiled.kernels_for.cache_clear()
        assert all(says in compiled.status() for says in BROKEN)
    finally:
        compiled.kernels_for.cache_clear()


# -- invalid arguments are errors --------------------------------------------------------------------------------------

FAR = 1 << 48
"""More elements than any machine can store."""
_ROWS_OF_NONE = torch.tensor([0, 1])
"""Start and end of a row with one token."""


ALLOCATING_CALLS = [
    ("norm_silu", [*[None] * 5, 0, 1, 1, FAR, 1e-5, 2]),
    ("norm_silu_backward", [*[None] * 6, 0, 1, 1, FAR, 1e-5, 2]),
    ("causal_softmax", [None, 0, 0, 1, FAR, 0, 0, 0, 2]),
    ("token_nll", [None, 1, None, None, None, 0, FAR, 0, 2]),
    ("attend", [*[None] * 6, 0, 1, 1, FAR, 16, 1.0, 2]),
    ("attend_backward", [*[None] * 10, 0, 1, 1, FAR, 16, 1.0, 2]),
    ("rope_varlen_attention", [None, 0, None, None, _ROWS_OF_NONE.data_ptr(), 1, FAR, 1, 16, 1.0, 0, 0, None, None, 2]),
    (
        "rope_varlen_attention_backward",
        [*[None] * 3, None, 0, None, None, _ROWS_OF_NONE.data_ptr(), 1, FAR, 1, 16, 1.0, 0, 0, None, 2],
    ),
    ("paged_attend", [None, 1, None, 2, 1, 16, *[None] * 2, 0, None, 1, *[None] * 2, 1.0, 0.0, 0, FAR, 2]),
]


@pytest.mark.parametrize(("name", "arguments"), ALLOCATING_CALLS)
def test_out_of_memory_raises_memory_error(whole: Path, name: str, arguments: list[Any]) -> None:
    library = compiled.load_library(whole)
    if not library.has(name):
        pytest.skip("not compiled for this processor")
    with pytest.raises(MemoryError, match=name):
        getattr(library, name)(*arguments)


def test_low_rank_products_without_memory_raise(whole: Path) -> None:
    library = compiled.load_library(whole)
    if not library.has("lora_forward"):
        pytest.skip("not compiled for this processor")
    product = LowRank(torch.empty(16, 0), torch.empty(16, 0), 1.0)
    table = compiled.low_rank_structs([product])
    with pytest.raises(MemoryError, match="lora_forward"):
        library.lora_forward(table, 1, None, None, None, 0, FAR, 16, 2)
    with pytest.raises(MemoryError, match="lora_backward"):
        library.lora_backward(table, 1, None, None, None, 0, FAR, 16, 2)
    with pytest.raises(MemoryError, match="lora_weight_gradients"):
        library.lora_weight_gradients(table, 1, *[None] * 6, 2 * (FAR // 2), 16, 16, 2)


@pytest.mark.parametrize("target", [40, -1, -99, 2**40, -(2**62)])
def test_invalid_target_raises_without_writing(whole: Path, target: int) -> None:
    library = compiled.load_library(whole)
    around = torch.ones(5, 40, dtype=torch.bfloat16)
    logits, nll = around[1:4], torch.full((3,), 7.0)
    targets = torch.tensor([1, target, 2])
    arguments = logits.data_ptr(), 1, targets.data_ptr(), nll.data_ptr()
    with pytest.raises(IndexError, match="not a token of the vocabulary"):
        library.token_nll(*arguments, None, 3, 40, 1, 2)
    assert bool((around == 1).all())
    assert nll.tolist() == [7.0] * 3
