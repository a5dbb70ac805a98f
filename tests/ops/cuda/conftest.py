"""Fixtures for tests of other libraries' kernels.

On a CPU, Triton's interpreter runs the kernels; on a GPU, they are compiled."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def liger(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the test if Liger-Kernel is missing.

    On a CPU, add what Triton's interpreter lacks: float scalars and libdevice."""
    pytest.importorskip("triton", reason="Liger-Kernel needs it")
    pytest.importorskip("liger_kernel", reason="pip install -e '.[gpu]'")
    if device != "cpu":
        return
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    converted = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if not isinstance(value, float):
            return converted(value)
        return tl.tensor(interpreter.TensorHandle(numpy.array([value], numpy.float32), tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    norms = importlib.import_module("liger_kernel.ops.rms_norm")
    monkeypatch.setattr(norms, "rsqrt", lambda x: tl.rsqrt(x))
