"""Each fused path against the same formula in plain torch, in float64 where it can be, values and every gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from tests.core.exact import DTYPES, TOLERANCE, draw, same, seeded, wide  # noqa: F401, seeded acts by itself
from veneer.ops import fused
from veneer.ops.dropout import Dropout
from veneer.ops.fused import (
    Linears,
    PairRows,
    Projection,
    gated_mlp,
    joined,
    linears,
    token_nll,
)


def factors(dtype: torch.dtype, *shapes: tuple[int, int]) -> list[Tensor]:
    """A and B as training holds them: float32 beside a 16-bit base."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return [draw(*s, dtype=kept, scale=0.3).requires_grad_() for s in shapes]


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
def test_joined_projections_are_the_projections_one_by_one(dtype: torch.dtype, bias: bool) -> None:
    x = draw(3, 5, 32, dtype=dtype).requires_grad_()
    W, b = draw(24 + 8 + 16, 32, dtype=dtype), draw(48, dtype=dtype) if bias else None
    A1, B1, A2, B2 = ab = factors(dtype, (4, 32), (24, 4), (2, 32), (16, 2))
    pairs = (PairRows(0, 24, 2.0, A1, B1), PairRows(32, 48, 0.3, A2, B2))  # rows 24 … 32 carry no pair
    y = linears(x, Linears(W, b, pairs))
    g = draw(*y.shape, dtype=dtype)
    got = [y, *torch.autograd.grad(y, [x, *ab], g)]

    xd, (A1, B1, A2, B2) = wide(x), (abd := [wide(t) for t in ab])
    yd = F.linear(xd, W.double(), None if b is None else b.double())
    nothing = torch.zeros(3, 5, 8, dtype=torch.float64)
    yd = yd + torch.cat([2.0 * (xd @ A1.T) @ B1.T, nothing, 0.3 * (xd @ A2.T) @ B2.T], -1)
    same(got, [yd, *torch.autograd.grad(yd, [xd, *abd], g.double())], TOLERANCE[dtype])
    assert all(t.dtype == p.dtype for t, p in zip(got[2:], ab, strict=True))


def mask_of_next(p: float, *shape: int, dtype: torch.dtype) -> Tensor:
    """What the next dropout of that shape multiplies by, drawn without moving torch's generator on."""
    state = torch.random.get_rng_state()
    drop = Dropout.drawn(p)
    torch.random.set_rng_state(state)
    return (drop(torch.ones(*shape, dtype=dtype)) != 0).double() / (1 - p)


@DTYPES
def test_pairs_see_what_dropout_leaves_of_x_and_the_frozen_weight_sees_all_of_it(dtype: torch.dtype) -> None:
    x = draw(3, 5, 32, dtype=dtype).requires_grad_()
    W = draw(24 + 16, 32, dtype=dtype)
    A1, B1, A2, B2 = ab = factors(dtype, (4, 32), (24, 4), (2, 32), (16, 2))
    pairs = (PairRows(0, 24, 2.0, A1, B1), PairRows(24, 40, 0.3, A2, B2))
    mask = mask_of_next(0.4, 3, 5, 32, dtype=dtype)
    y = linears(x, Linears(W, None, pairs, 0.4))
    torch.randint(9, ())  # whatever else draws meanwhile
    g = draw(*y.shape, dtype=dtype)
    got = [y, *torch.autograd.grad(y, [x, *ab], g)]

    xd, (A1, B1, A2, B2) = wide(x), (abd := [wide(t) for t in ab])
    left = xd * mask
    yd = F.linear(xd, W.double()) + torch.cat([2.0 * (left @ A1.T) @ B1.T, 0.3 * (left @ A2.T) @ B2.T], -1)
    same(got, [yd, *torch.autograd.grad(yd, [xd, *abd], g.double())], TOLERANCE[dtype])
    with torch.no_grad():
        assert not torch.equal(linears(x, Linears(W, None, pairs, 0.4)), y), "each call draws anew"


@DTYPES
def test_gated_mlp_with_dropout_before_each_of_its_products(dtype: torch.dtype) -> None:
    x = draw(9, 32, dtype=dtype).requires_grad_()
    W, D = draw(96, 32, dtype=dtype, scale=0.2), draw(32, 48, dtype=dtype, scale=0.2)
    A1, B1, A3, B3 = ab = factors(dtype, (4, 32), (48, 4), (3, 48), (32, 3))
    first, last = (PairRows(0, 48, 2.0, A1, B1),), (PairRows(0, 32, 1.5, A3, B3),)
    mask = mask_of_next(0.2, 9, 32, dtype=dtype)
    state = torch.random.get_rng_state()
    torch.randint(1 << 62, ())
    mask_down = mask_of_next(0.2, 9, 48, dtype=dtype)
    torch.random.set_rng_state(state)
    y = gated_mlp(x, Linears(W, None, first, 0.2), Linears(D, None, last, 0.2))
    g = draw(*y.shape, dtype=dtype)
    got = [y, *torch.autograd.grad(y, [x, *ab], g)]

    xd, (A1, B1, A3, B3) = wide(x), (abd := [wide(t) for t in ab])
    h = F.silu(xd @ W[:48].double().T + 2.0 * ((xd * mask) @ A1.T) @ B1.T) * (xd @ W[48:].double().T)
    yd = h @ D.double().T + 1.5 * ((h * mask_down) @ A3.T) @ B3.T
    same(got, [yd, *torch.autograd.grad(yd, [xd, *abd], g.double())], TOLERANCE[dtype])


def test_recomputing_drops_what_was_dropped() -> None:
    x = draw(6, 32, dtype=torch.bfloat16).requires_grad_()
    W, (A, B) = draw(16, 32, dtype=torch.bfloat16), factors(torch.bfloat16, (4, 32), (16, 4))

    def layer(x: Tensor) -> Tensor:
        return linears(x, Linears(W, None, (PairRows(0, 16, 2.0, A, B),), 0.3))

    state = torch.random.get_rng_state()
    plain = torch.autograd.grad(layer(x).float().square().sum(), [x, A, B])
    torch.random.set_rng_state(state)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    torch.randint(9, ())
    again = torch.autograd.grad(y.float().square().sum(), [x, A, B])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_pairs_with_different_dropouts_are_no_one_product() -> None:
    one = Projection(torch.ones(2, 3), None, torch.ones(1, 3), torch.ones(2, 1), 0.5, 0.1)
    with pytest.raises(ValueError, match="dropouts"):
        joined([one, one._replace(dropout=0.2)])
    assert joined([one, Projection(torch.ones(2, 3))]).dropout == 0.1


@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_gain_multiplies_all_but_the_bias(dtype: torch.dtype, bias: bool, dropout: float) -> None:
    """DoRA's m/‖W + s·B·A‖ on the first projection of two, the second has none. With dropout as PEFT has it: x·Wᵀ of
    all of x, and of what is left of it what gain and pair add."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    x = draw(7, 32, dtype=dtype).requires_grad_()
    A1, B1, A2, B2 = ab = factors(dtype, (4, 32), (24, 4), (2, 32), (16, 2))
    m = (1 + draw(24, dtype=kept, scale=0.1)).requires_grad_()
    parts = [
        Projection(draw(24, 32, dtype=dtype), draw(24, dtype=dtype) if bias else None, A1, B1, 2.0, gain=m),
        Projection(draw(16, 32, dtype=dtype), None, A2, B2, 0.3),
    ]
    parts = [p._replace(dropout=dropout) for p in parts]
    mask = mask_of_next(dropout, 7, 32, dtype=dtype) if dropout else torch.ones(7, 32, dtype=torch.float64)
    y = linears(x, joined(parts))
    g = draw(*y.shape, dtype=dtype)
    got = [y, *torch.autograd.grad(y, [x, *ab, m], g)]

    xd, md, (A1, B1, A2, B2) = wide(x), wide(m), (abd := [wide(t) for t in ab])
    left, (W, V) = xd * mask, (p.weight.double() for p in parts)
    one = xd @ W.T + (md - 1) * (left @ W.T) + md * (2.0 * (left @ A1.T) @ B1.T)
    one = one if parts[0].bias is None else one + parts[0].bias.double()
    yd = torch.cat([one, xd @ V.T + 0.3 * (left @ A2.T) @ B2.T], -1)
    same(got, [yd, *torch.autograd.grad(yd, [xd, *abd, md], g.double())], TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gated_mlp_with_gains(dtype: torch.dtype, dropout: float) -> None:
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    x = draw(9, 32, dtype=dtype).requires_grad_()
    W, D = draw(96, 32, dtype=dtype, scale=0.2), draw(32, 48, dtype=dtype, scale=0.2)
    A1, B1, A3, B3 = ab = factors(dtype, (4, 32), (96, 4), (3, 48), (32, 3))
    m, n = ms = [(1 + draw(size, dtype=kept, scale=0.1)).requires_grad_() for size in (96, 32)]
    first = Linears(W, None, (PairRows(0, 96, 2.0, A1, B1),), dropout, m)
    mask, mask_down = torch.ones(9, 32, dtype=torch.float64), torch.ones(9, 48, dtype=torch.float64)
    if dropout:
        state = torch.random.get_rng_state()
        mask = mask_of_next(dropout, 9, 32, dtype=dtype)
        torch.randint(1 << 62, ())
        mask_down = mask_of_next(dropout, 9, 48, dtype=dtype)
        torch.random.set_rng_state(state)
    y = gated_mlp(x, first, Linears(D, None, (PairRows(0, 32, 1.5, A3, B3),), dropout, n))
    g = draw(*y.shape, dtype=dtype)
    got = [y, *torch.autograd.grad(y, [x, *ab, *ms], g)]

    def adapted(x: Tensor, mask: Tensor, W: Tensor, m: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return x @ W.T + (m - 1) * ((x * mask) @ W.T) + m * ((x * mask) @ A.T @ B.T)

    xd, (m, n), (A1, B1, A3, B3) = wide(x), (msd := [wide(t) for t in ms]), (abd := [wide(t) for t in ab])
    gate, up = adapted(xd, mask, W.double(), m, A1, 2.0 * B1).chunk(2, -1)
    yd = adapted(F.silu(gate) * up, mask_down, D.double(), n, A3, 1.5 * B3)
    same(got, [yd, *torch.autograd.grad(yd, [xd, *abd, *msd], g.double())], TOLERANCE[dtype])


def test_joined_lays_parts_below_one_another() -> None:
    a = Projection(torch.ones(2, 3), None, torch.ones(1, 3), torch.ones(2, 1), 0.5)
    b = Projection(torch.zeros(4, 3), torch.ones(4))
    both = joined([b, a])
    assert both.weight.shape == (6, 3)
    assert both.bias is not None
    assert both.bias.tolist() == [1, 1, 1, 1, 0, 0]
    assert [(p.first, p.last, p.scale) for p in both.pairs] == [(4, 6, 0.5)]


def test_a_frozen_input_gets_no_gradient_and_costs_no_product() -> None:
    x = draw(4, 8, dtype=torch.float32)
    A, B = factors(torch.float32, (2, 8), (6, 2))
    y = linears(x, Linears(draw(6, 8, dtype=torch.float32), None, (PairRows(0, 6, 1.0, A, B),)))
    products = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal products
            products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm)
            return func(*args, **(kwargs or {}))

    with Count():
        torch.autograd.grad(y.sum(), [A, B])
    assert products == 3  # du, dA, dB and nothing with W


def test_what_linears_returns_may_be_written_into() -> None:
    x = draw(4, 8, dtype=torch.float32)
    A, B = factors(torch.float32, (2, 8), (6, 2))
    y = linears(x, Linears(draw(6, 8, dtype=torch.float32), None, (PairRows(0, 6, 1.0, A, B),)))
    y.add_(1.0).mul_(2.0)  # Llama 4 adds its routed experts in place
    y.sum().backward()
    assert B.grad is not None
    torch.testing.assert_close(B.grad, 2.0 * (x @ A.detach().T).sum(0).expand(6, 2))


@DTYPES
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_gated_mlp(dtype: torch.dtype, act: str) -> None:
    x = draw(2, 9, 32, dtype=dtype).requires_grad_()
    W, D = draw(96, 32, dtype=dtype, scale=0.2), draw(32, 48, dtype=dtype, scale=0.2)
    A1, B1, A2, B2, A3, B3 = ab = factors(dtype, (4, 32), (48, 4), (2, 32), (48, 2), (3, 48), (32, 3))
    up = (PairRows(0, 48, 2.0, A1, B1), PairRows(48, 96, 0.5, A2, B2))
    y = gated_mlp(x, Linears(W, None, up), Linears(D, None, (PairRows(0, 32, 1.5, A3, B3),)), act)
    g = draw(*y.shape, dtype=dtype)
    got = [y, *torch.autograd.grad(y, [x, *ab], g)]

    xd, (A1, B1, A2, B2, A3, B3) = wide(x), (abd := [wide(t) for t in ab])
    gate = xd @ W[:48].double().T + 2.0 * (xd @ A1.T) @ B1.T
    over = xd @ W[48:].double().T + 0.5 * (xd @ A2.T) @ B2.T
    h = F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none")
    h = h * over
    yd = h @ D.double().T + 1.5 * (h @ A3.T) @ B3.T
    same(got, [yd, *torch.autograd.grad(yd, [xd, *abd], g.double())], TOLERANCE[dtype])


@pytest.mark.parametrize("rows", [1, 47, 50, 130])
def test_thin_products_in_compiled_calls(rows: int) -> None:
    """Tiles are of 48 rows in steps of 4, ranks in steps of 16, panels of 64 and 256 columns: beside torch's own."""
    x, g = draw(rows, 96, dtype=torch.bfloat16), draw(rows, 400, dtype=torch.bfloat16)
    ab = [t.detach() for t in factors(torch.bfloat16, (4, 96), (304, 4), (20, 96), (80, 20))]
    pairs = (PairRows(0, 304, 2.0, ab[0], ab[1]), PairRows(320, 400, 0.5, ab[2], ab[3]))
    joint = Linears(draw(400, 96, dtype=torch.bfloat16), None, pairs)
    made = []
    for thin in (fused._thin(joint, x, g), fused._Thin(joint, torch.float64)):
        exact = isinstance(thin, fused._Thin) and thin.A.dtype == torch.float64
        x_, g_, y, dx = (t.double() if exact else t.clone() for t in (x, g, g, x))
        u = thin.add(x_, y)
        du = thin.through(g_, dx)
        made.append([y, dx, *thin.gradients(g_, x_, u, du)])
        assert torch.equal(thin.through(g_, None), du)
    same(*made, 8e-3)


@DTYPES
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_token_nll(dtype: torch.dtype, chunk: int) -> None:
    h, W = draw(18, 32, dtype=dtype).requires_grad_(), draw(1000, 32, dtype=dtype)
    y = torch.randint(0, 1000, (18,))
    weights = torch.linspace(-1, 2, 18, dtype=torch.float64)  # a token of its own weight each, as preferences want
    loss = token_nll(h, W, y, chunk)
    (got,) = torch.autograd.grad(loss @ weights.float(), h)
    hd = wide(h)
    wanted = F.cross_entropy(hd @ W.double().T, y, reduction="none")
    (grad,) = torch.autograd.grad(wanted @ weights, hd)
    assert loss.shape == (18,)
    torch.testing.assert_close(loss.double(), wanted, rtol=max(TOLERANCE[dtype], 1e-6), atol=0.0)
    same([got], [grad], TOLERANCE[dtype] if dtype != torch.float64 else 1e-7)  # what comes back is float32


def test_token_nll_keeps_the_gradient_of_a_token_that_is_almost_certain() -> None:
    """p = 1 − 1.2e-4: rounded to bfloat16 before 1 is taken off, the whole gradient of the target would be lost."""
    h = torch.tensor([[9.0]], dtype=torch.bfloat16, requires_grad=True)
    W = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    token_nll(h, W, torch.tensor([0])).sum().backward()
    assert h.grad is not None
    assert h.grad.item() == pytest.approx(-1.0 / (1.0 + torch.tensor(9.0).exp().item()), rel=0.01)


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    with torch.no_grad():
        out = token_nll(draw(4, 8, dtype=torch.float32), draw(20, 8, dtype=torch.float32), torch.arange(4))
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_of_minus_a_hundred_is_none_and_any_other_that_is_no_token_an_error(dtype: torch.dtype) -> None:
    """By the compiled kernel and by torch's own operations; int32 targets are targets too."""
    hidden = torch.randn(6, 16).to(dtype).requires_grad_()
    weight = torch.randn(40, 16).to(dtype)
    targets = torch.tensor([3, -100, 0, 39, -100, 7], dtype=torch.int32)
    nll = token_nll(hidden, weight, targets, chunk=4)
    want = F.cross_entropy((hidden @ weight.t()).float(), targets.long(), reduction="none")
    torch.testing.assert_close(nll, want, rtol=1e-2, atol=1e-2)
    assert nll[1] == nll[4] == 0
    nll.sum().backward()
    assert hidden.grad is not None
    assert not hidden.grad[[1, 4]].any()
    assert hidden.grad[[0, 2, 3, 5]].any(1).all()
    for wrong in (40, -1, -101):
        with pytest.raises(IndexError, match="no token of the vocabulary"):
            token_nll(hidden, weight, torch.tensor([1, wrong, 2, 3, 4, 5]))
