"""Products of 16-bit matrices in both arithmetics, compared with float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.core.exact import draw, same, seeded, wide  # noqa: F401, seeded acts by itself
from tests.ops.draws import factors
from veneer.ops.attention import RowLayout, VarlenSettings, cross_attention, varlen_attention
from veneer.ops.dispatch import dispatch, override_ops
from veneer.ops.grouped_mm import grouped_mm
from veneer.ops.linear import LinearMap, linear
from veneer.ops.loss import token_nll
from veneer.ops.lowrank import LowRank
from veneer.ops.mlp import gated_mlp
from veneer.ops.products import product
from veneer.ops.quantized import quantize

_BF16 = torch.bfloat16
BOTH = pytest.mark.parametrize("name", ["blocks", "columns"])


@BOTH
@pytest.mark.parametrize(("n", "k", "m"), [(1, 5, 3), (197, 74, 150), (130, 4100, 37)])
@pytest.mark.parametrize("dtypes", [(_BF16, _BF16), (_BF16, torch.float32), (torch.float32, _BF16)], ids=str)
def test_float32_arithmetic_rounds_once(
    name: str, n: int, k: int, m: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    for turned in (False, True):
        a, b = draw(n, k, dtype=dtypes[0]), draw(k, m, dtype=dtypes[1])
        a, b = (a.t().contiguous().t(), b.t().contiguous().t()) if turned else (a, b)
        bias, start = draw(m, dtype=_BF16), draw(n, m + 2, dtype=_BF16)
        exact = a.double() @ b.double()
        with override_ops(product=name):
            into, added = start.clone(), start.clone()
            product(a, b, out=into[:, 2:])
            product(a, b, out=added[:, 2:], add=True)
            results = [product(a, b, bias, dtype=_BF16), into[:, 2:], added[:, 2:]]
            unrounded = product(a, b, dtype=torch.float32)
        for got, want in zip(results, [exact + bias, exact, exact + start[:, 2:]], strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(unrounded.double(), exact, rtol=1e-5, atol=1e-3)
        assert torch.equal(into[:, :2], start[:, :2])


def test_bfloat16_arithmetic_gives_torch_s_own_bits() -> None:
    x, W, b, y = (draw(*s, dtype=_BF16) for s in ((33, 70), (20, 70), (20,), (33, 20)))
    assert torch.equal(product(x, W.t(), b), F.linear(x, W, b))
    assert torch.equal(product(x, W.t()), F.linear(x, W))
    assert torch.equal(product(y, W, out=x.clone(), add=True), x.clone().addmm_(y, W))


@BOTH
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    a, b, threads = draw(300, 70, dtype=_BF16), draw(70, 500, dtype=_BF16), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with override_ops(product=name):
                results.append(product(a, b))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def _linear(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: Tensor | None = None) -> Tensor:
    return linear(x, LinearMap(W, None, (LowRank(A, B, 2.0),), scale))


def _mlp(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return gated_mlp(x, LinearMap(W, None, (LowRank(A, B, 2.0),)), LinearMap(W[: x.shape[1], : len(W) // 2]))


def _nll(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return token_nll(linear(x, LinearMap(W[:32], None, (LowRank(A, B[:32]),))), W, torch.arange(len(x)), chunk=16)


def _attention(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    q, k, v = _linear(x, W[:48], A, B[:48]).view(len(x), 3, 2, 8).unbind(1)
    return varlen_attention(q, k, v, VarlenSettings(RowLayout([7, len(x) - 7]), 0.3)).flatten(1)


def _cross(x: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    q, k, v = _linear(x, W[:48], A, B[:48]).view(1, len(x), 3, 2, 8).unbind(2)
    return cross_attention(q, k, v).flatten(0, 1)


@pytest.mark.parametrize("name", ["torch", "blocks", "columns"])
@pytest.mark.parametrize("run", [_linear, _mlp, _nll, _attention, _cross], ids=lambda run: run.__name__[1:])
def test_every_op_of_a_step_agrees_with_float64(name: str, run: Callable[..., Tensor]) -> None:
    """Float32 arithmetic rounds less: adapters and sums keep their float32 values."""
    x, W = draw(40, 32, dtype=_BF16).requires_grad_(), draw(64, 32, dtype=_BF16, scale=0.2)
    inputs = x, *factors(_BF16, (4, 32), (64, 4))
    exact = [wide(t) for t in inputs]
    with override_ops(product=name, rope_varlen_attention="torch", attend="torch", low_rank="torch"):
        y = run(inputs[0], W, *inputs[1:])
        g = draw(*y.shape, dtype=y.dtype)
        got = [y, *torch.autograd.grad(y, inputs, g)]
    want = run(exact[0], W.double(), *exact[1:])
    wanted = [want, *torch.autograd.grad(want, exact, g.double())]
    errors = [
        float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(got, wanted, strict=True)
    ]
    assert max(errors) <= (3e-2 if name == "torch" else 1.5e-2), errors


@BOTH
def test_a_small_adapter_is_not_lost_in_rounding(name: str) -> None:
    """The adapter's output is below half the distance of neighboring values of y, but is added before y is rounded."""
    x, W = draw(512, 64, dtype=_BF16).requires_grad_(), draw(64, 64, dtype=_BF16)
    A, B = (t.detach() for t in factors(_BF16, (4, 64), (64, 4)))
    B, g = B * 2e-3, draw(512, 64, dtype=_BF16)
    with override_ops(product=name, low_rank="torch"):
        y = _linear(x, W, A, B)
        (dx,) = torch.autograd.grad(y, x, g)
    BA = 2.0 * B.double() @ A.double()
    for got, base, small in (
        (y, x.double() @ W.double().t(), x.double() @ BA.t()),
        (dx, g.double() @ W.double(), g.double() @ BA),
    ):
        share = ((got.double() - base) * small).sum() / small.square().sum()
        assert abs(float(share.detach()) - 1) < 0.1


@BOTH
def test_a_scaled_layer_agrees_with_float64(name: str) -> None:
    x, W, scale = draw(40, 32, dtype=_BF16), draw(64, 32, dtype=_BF16), draw(64, dtype=torch.float32)
    A, B = (t.detach() for t in factors(_BF16, (4, 32), (64, 4)))
    with override_ops(product=name):
        y = _linear(x, W, A, B, scale)
    same([y], [_linear(x.double(), W.double(), A.double(), B.double(), scale.double())], 5e-3)


@BOTH
def test_quantized_weights_multiply_in_float32(name: str) -> None:
    x, W = draw(40, 64, dtype=_BF16), quantize(draw(128, 64, dtype=_BF16), "nf4")
    with override_ops(product=name, quantized_linear="torch"):
        y = linear(x, LinearMap(W))
        dx = product(y, W)
    same([y, dx], [x.double() @ W.dense().double().t(), y.double() @ W.dense().double()], 3e-3)


@BOTH
def test_experts_multiply_in_float32(name: str) -> None:
    x, W, ends = draw(40, 32, dtype=_BF16).requires_grad_(), draw(2, 32, 64, dtype=_BF16), torch.tensor([25, 40])
    with override_ops(product=name):
        y = grouped_mm(x, W, ends)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    same(
        [y, dx],
        [
            torch.cat([a.double() @ w.double() for a, w in zip(x.split([25, 15]), W, strict=True)]).detach(),
            W.double().sum(2).repeat_interleave(torch.tensor([25, 15]), 0),
        ],
        3e-3,
    )


def test_profile_chooses_the_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, qkv = torch.ones(2, 2, dtype=_BF16), torch.ones(2, 3, 16, dtype=_BF16)
    assert dispatch("product", a, a, None) is None
    before = dispatch("rope_varlen_attention", qkv, None, None)
    profile = json.loads((Path(__file__).parents[1] / "profile.json").read_text(encoding="utf-8"))
    profile["gflops"]["bfloat16"] = {shape: rate / 2 for shape, rate in profile["gflops"]["float32"].items()}
    (tmp_path / "float32.json").write_text(json.dumps(profile), encoding="utf-8")
    monkeypatch.setenv("VENEER_PROFILE", str(tmp_path / "float32.json"))
    assert dispatch("product", a, a, None) is not None
    assert dispatch("product", a.float(), a.float(), None) is None
    after = dispatch("rope_varlen_attention", qkv, None, None)
    if before is not None and after is not None:
        assert (before.names[0], after.names[0]) == ("narrow_rope_varlen_attention", "rope_varlen_attention")
