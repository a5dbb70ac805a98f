"""Arrays give the same report as tensors, and `adapter inspect` reads common files without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.formats.image_adapters import numbers
from tests.formats.layouts import kohya
from tests.formats.twins import linear_pairs
from veneer.core.adapter import Adapter, Pair
from veneer.core.forms import Delta
from veneer.errors import AdapterError
from veneer.formats import peft
from veneer.formats.arrays import read_arrays
from veneer.formats.read import read
from veneer.formats.reading import summary

Q = "model.layers.0.self_attn.q_proj"


def cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    return adapter.mapped(lambda t: t.to(dtype))


def dora(folder: Path) -> Path:
    pair = linear_pairs([Q]).pairs[Q]
    pair.magnitude = torch.rand(4)
    adapter = Adapter({Q: pair}, token_rows={}, modules={"lm_head": {"weight": torch.randn(8, 4)}})
    peft.write_folder(cast(adapter, torch.bfloat16), folder)
    return folder


def lokr(folder: Path) -> Path:
    parts = {"w1": numbers((2, 3), "w1"), "w2": numbers((4, 2), "w2")}
    peft.write_folder(Adapter(deltas={f"{Q}.weight": Delta("kronecker", parts, (8, 6), 2.0)}), folder)
    return folder


def rslora(folder: Path) -> Path:
    pair = Pair(torch.randn(4, 6).half(), torch.randn(8, 4).half(), 1.5)
    peft.write_folder(Adapter({Q: pair}, rslora=True), folder)
    return folder


def fused(folder: Path) -> Path:
    """Write a kohya file of FLUX.1, whose q, k and v are fused."""
    file = folder.with_suffix(".safetensors")
    tensors = kohya("flux1", original=True, only="blocks.0.").tensors
    save_file({name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}, file)
    return file


def unet(folder: Path) -> Path:
    file = folder.with_suffix(".safetensors")
    save_file(kohya("sd15", original=False, alpha=2.0).tensors, file)
    return file


LIGHT = [dora, lokr, rslora, fused, unet]


def eight_bits(folder: Path) -> Path:
    file = folder.with_suffix(".safetensors")
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in kohya("sd15", original=False).tensors.items()}, file)
    return file


@pytest.mark.parametrize("write", [*LIGHT, eight_bits])
def test_arrays_and_tensors_give_the_same_report(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    tensors, arrays = (summary(path, read(path, as_arrays=how), None) for how in (False, True))
    for one, other in zip(tensors["targets"].values(), arrays["targets"].values(), strict=True):
        assert one.pop("delta_norm") == pytest.approx(other.pop("delta_norm"), rel=1e-12)
    assert arrays == tensors
    assert list(arrays["targets"]) == list(tensors["targets"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_arrays_count_values_that_are_not_finite(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = kohya("sd15", original=False).tensors
    name = next(iter(tensors))
    tensors[name].view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    save_file({n: t.to(dtype) for n, t in tensors.items()}, tmp_path / "a.safetensors")
    errors = []
    for how in (False, True):
        with pytest.raises(AdapterError) as raised:
            read(tmp_path / "a.safetensors", as_arrays=how)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]
    assert f"{name} " in errors[0]
    assert ": 3 of " in errors[0]


def test_torch_functions_convert_arrays_to_tensors(tmp_path: Path) -> None:
    want = {"half": torch.randn(3, 4).bfloat16(), "empty": torch.empty(0, 2), "count": torch.tensor(5)}
    save_file(want, tmp_path / "a.safetensors")
    got, _ = read_arrays(tmp_path / "a.safetensors")
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor)
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(torch.cat([got["half"], want["half"]]), want["half"].repeat(2, 1))
    assert torch.equal(got["half"][1:].T.reshape(-1).chunk(2)[0], want["half"][1:].T.reshape(-1).chunk(2)[0])


@pytest.mark.parametrize("write", LIGHT)
def test_inspect_loads_no_torch(write: Callable[[Path], Path], tmp_path: Path) -> None:
    code = """
import sys
from veneer.cli.main import main
try:
    main(["adapter", "inspect", sys.argv[1]])
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules
"""
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-c", code, str(write(tmp_path / "a"))]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("usable\n")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_arrays_compute_what_tensors_compute(tmp_path: Path, dtype: torch.dtype) -> None:
    t = torch.arange(-4.0, 5.0).reshape(3, 3).to(dtype)
    save_file({"t": t}, tmp_path / "t.safetensors")
    a = read_arrays(tmp_path / "t.safetensors")[0]["t"]
    pairs = [(a * 2.0, t * 2.0), (a * a, t * t), (a @ a, t @ t), (a.sum(), t.sum())]
    pairs += [(2.0 * a, 2.0 * t), (a + a, t + t), (a == a.mT, t == t.mT), (-a, -t), (a * t.double(), t * t.double())]
    assert len(a) == len(t)
    for mine, theirs in pairs:
        assert str(mine.dtype) == str(theirs.dtype)
        assert mine.tolist() == theirs.tolist()
