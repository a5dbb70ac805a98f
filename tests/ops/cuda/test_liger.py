"""Liger-Kernel's functions as ops, compared with float64 arithmetic.

The kernels are interpreted on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.compat import LIGER
from veneer.errors import install_command
from veneer.ops.attention import rotate
from veneer.ops.cuda.implementations import IMPLEMENTATIONS
from veneer.ops.cuda.liger import why_missing
from veneer.ops.dispatch import choices, dispatch
from veneer.ops.loss import token_nll
from veneer.ops.norms import rms_norm

DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])


def random(seed: int, *shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    assert got.shape == want.shape
    return bool((got.double() - want).norm() <= tolerance * want.norm())


@DTYPES
@pytest.mark.parametrize("wide_weight", [False, True])
def test_rms_norm_and_its_gradient(
    liger: None, device: str, dtype: torch.dtype, tolerance: float, wide_weight: bool
) -> None:
    x = random(0, 2, 5, 96, dtype=dtype, device=device).requires_grad_()
    weight = random(1, 96, dtype=torch.float32 if wide_weight else dtype, device=device)
    g = random(2, 2, 5, 96, dtype=dtype, device=device)
    y = IMPLEMENTATIONS["rms_norm_autograd"].run(x, weight, 1e-3)
    wide = x.detach().double().requires_grad_()
    want = F.rms_norm(wide, (96,), weight.double(), 1e-3)
    assert y.dtype == dtype
    assert near(y, want, tolerance)
    assert near(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(want, wide, g.double())[0], tolerance)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 7])
def test_rope_and_its_gradient(liger: None, device: str, dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    """q and k are views of a projection's output, which must not change."""
    qkv = random(0, tokens, 8, 16, dtype=dtype, device=device).requires_grad_()
    before, angles = qkv.detach().clone(), random(1, tokens, 8, dtype=torch.float32, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    got = IMPLEMENTATIONS["rope"].run(*qkv.split([4, 2, 2], dim=1)[:2], cos, sin)
    wide = qkv.detach().double().requires_grad_()
    want = [rotate(x, cos.double(), sin.double()) for x in wide.split([4, 2, 2], dim=1)[:2]]
    g = [random(2 + i, *x.shape, dtype=dtype, device=device) for i, x in enumerate(got)]
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert near(a, b, tolerance)
    given = torch.autograd.grad(got, qkv, g)[0]
    assert near(given, torch.autograd.grad(want, wide, [x.double() for x in g])[0], tolerance)
    assert torch.equal(qkv, before)


@DTYPES
@pytest.mark.parametrize("gradient", [False, True])
def test_linear_cross_entropy(liger: None, device: str, dtype: torch.dtype, tolerance: float, gradient: bool) -> None:
    """Each token has its own loss and gradient, unless its target is −100."""
    hidden, weight = (random(i, n, 24, dtype=dtype, device=device) for i, n in enumerate((9, 50)))
    targets = torch.arange(0, 45, 5, device=device)
    right = torch.zeros(9, dtype=torch.bool, device=device)
    targets[2] = (hidden.double() @ weight.double().t())[2].argmax()
    targets[3] = -100
    nll, grad = IMPLEMENTATIONS["linear_cross_entropy"].run(hidden, weight, targets, gradient, right)
    wide = hidden.double().requires_grad_()
    logits = wide @ weight.double().t()
    want = F.cross_entropy(logits, targets, reduction="none")
    assert nll.dtype == torch.float32
    assert near(nll, want, tolerance)
    assert torch.equal(right, logits.argmax(1) == targets)
    assert (grad is not None) == gradient
    if grad is not None:
        assert near(grad, torch.autograd.grad(want.sum(), wide)[0], tolerance)


def test_without_liger_an_op_runs_its_reference() -> None:
    x, weight = torch.ones(3, 16), torch.ones(16)
    assert dispatch("rms_norm_autograd", x, weight) is None
    assert torch.equal(rms_norm(x, weight, 0.0), x)
    try:
        LIGER.check()
    except ImportError:
        assert choices("cuda")["rope"].reason == f"liger_kernel is not installed ({install_command('gpu')})"


def test_failing_first_norm_reports_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel", reason="pip install -e '.[gpu]'")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 99)  # an invalid device number
    why_missing.cache_clear()
    name, reason, _ = choices("cuda")["rope"]
    why_missing.cache_clear()
    assert name == "torch"
    assert reason.startswith("a small norm failed: ")


@pytest.mark.gpu
@pytest.mark.parametrize("trained", [False, True])
def test_ops_on_a_gpu_choose_liger(trained: bool) -> None:
    pytest.importorskip("liger_kernel", reason="pip install -e '.[gpu]'")
    x, weight = torch.randn(5, 64, device="cuda", requires_grad=trained), torch.randn(40, 64, device="cuda")
    targets = torch.arange(5, device="cuda")
    assert dispatch("rms_norm_autograd", x, weight[0]) is IMPLEMENTATIONS["rms_norm_autograd"].run
    assert dispatch("linear_cross_entropy", x, weight) is IMPLEMENTATIONS["linear_cross_entropy"].run
    want = F.cross_entropy(x.double() @ weight.double().t(), targets, reduction="none")
    g = torch.rand(5, device="cuda")
    got = token_nll(x, weight, targets)
    assert near(got, want, 1e-5)
    if trained:
        assert near(torch.autograd.grad(got, x, g)[0], torch.autograd.grad(want, x, g.double())[0].double(), 1e-4)
