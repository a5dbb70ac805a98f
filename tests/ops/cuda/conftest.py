"""Tests of this folder run the kernels of GPUs on tensors of the CPU, in triton's interpreter (tests/conftest.py turns
it on, which has to be before anything imports triton); laws that take a `device` also compiled, by `make test-gpu`."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from veneer.ops.cuda import launch

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]  # no wheel of it for this machine


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("gpu"):
        yield
        return
    assert launch.INTERPRETED, "TRITON_INTERPRET=0 is for tests marked gpu alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("veneer.ops.dispatch.DEVICE", "cuda")
        yield


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a law's tensors are: interpreted on a CPU, compiled on a GPU."""
    return str(request.param)
