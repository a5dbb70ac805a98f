"""Linear maps with low-rank products, compared with the same formula in plain torch.

Values and every gradient are compared, in float64 if possible."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from tests.core.exact import DTYPES, draw, same, same_with_gradients, seeded, wide  # noqa: F401, seeded acts by itself
from tests.ops.draws import factors, mask_of_next, with_dropout
from veneer.ops.dispatch import dispatch
from veneer.ops.linear import LinearMap, LowRankProducts, join_maps, linear, split_map
from veneer.ops.lowrank import LowRank


@DTYPES
@pytest.mark.parametrize("bias", [False, True])
def test_fused_projections_equal_separate_projections(dtype: torch.dtype, bias: bool) -> None:
    x = draw(3, 5, 32, dtype=dtype).requires_grad_()
    W, b = draw(24 + 8 + 16, 32, dtype=dtype), draw(48, dtype=dtype) if bias else None
    A1, B1, A2, B2 = ab = factors(dtype, (4, 32), (24, 4), (2, 32), (16, 2))
    pairs = (LowRank(A1, B1, 2.0), LowRank(A2, B2, 0.3, first=32))  # rows 24 … 32 have no pair
    y = linear(x, LinearMap(W, b, pairs))

    xd, (A1, B1, A2, B2) = wide(x), (abd := [wide(t) for t in ab])
    yd = F.linear(xd, W.double(), None if b is None else b.double())
    nothing = torch.zeros(3, 5, 8, dtype=torch.float64)
    yd = yd + torch.cat([2.0 * (xd @ A1.T) @ B1.T, nothing, 0.3 * (xd @ A2.T) @ B2.T], -1)
    got = same_with_gradients(y, [x, *ab], yd, [xd, *abd])
    assert all(t.dtype == p.dtype for t, p in zip(got[2:], ab, strict=True))


@DTYPES
def test_dropout_acts_on_pairs_only(dtype: torch.dtype) -> None:
    x = draw(3, 5, 32, dtype=dtype).requires_grad_()
    W = draw(24 + 16, 32, dtype=dtype)
    A1, B1, A2, B2 = ab = factors(dtype, (4, 32), (24, 4), (2, 32), (16, 2))
    pairs = (LowRank(A1, B1, 2.0), LowRank(A2, B2, 0.3, first=24))
    mask = mask_of_next(0.4, 3, 5, 32, dtype=dtype)
    y = linear(x, LinearMap(W, None, with_dropout(pairs, 0.4)))
    torch.randint(9, ())  # other uses of the generator must not change the masks

    xd, (A1, B1, A2, B2) = wide(x), (abd := [wide(t) for t in ab])
    left = xd * mask
    yd = F.linear(xd, W.double()) + torch.cat([2.0 * (left @ A1.T) @ B1.T, 0.3 * (left @ A2.T) @ B2.T], -1)
    same_with_gradients(y, [x, *ab], yd, [xd, *abd])
    with torch.no_grad():
        assert not torch.equal(linear(x, LinearMap(W, None, with_dropout(pairs, 0.4))), y), "each call draws anew"


def test_recomputation_repeats_the_dropout_mask() -> None:
    x = draw(6, 32, dtype=torch.bfloat16).requires_grad_()
    W, (A, B) = draw(16, 32, dtype=torch.bfloat16), factors(torch.bfloat16, (4, 32), (16, 4))

    def layer(x: Tensor) -> Tensor:
        return linear(x, LinearMap(W, None, (LowRank(A, B, 2.0, 0.3),)))

    state = torch.random.get_rng_state()
    plain = torch.autograd.grad(layer(x).float().square().sum(), [x, A, B])
    torch.random.set_rng_state(state)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    torch.randint(9, ())
    again = torch.autograd.grad(y.float().square().sum(), [x, A, B])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_pairs_with_different_dropouts_cannot_be_fused() -> None:
    one, other = (
        LinearMap(torch.ones(2, 3), None, (LowRank(torch.ones(1, 3), torch.ones(2, 1), 0.5, p),)) for p in (0.1, 0.2)
    )
    with pytest.raises(ValueError, match="dropouts"):
        join_maps([one, other])
    assert join_maps([one, LinearMap(torch.ones(2, 3))]).dropout == 0.1


@DTYPES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
def test_a_gain_multiplies_all_but_the_bias(dtype: torch.dtype, bias: bool, dropout: float) -> None:
    """The first of two projections has DoRA's gain, m/‖W + s·B·A‖.

    Dropout is as in PEFT: x·Wᵀ uses all of x; the terms of the gain and the pair use x after dropout."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    x = draw(7, 32, dtype=dtype).requires_grad_()
    A1, B1, A2, B2 = ab = factors(dtype, (4, 32), (24, 4), (2, 32), (16, 2))
    m = (1 + draw(24, dtype=kept, scale=0.1)).requires_grad_()
    parts = [
        LinearMap(
            draw(24, 32, dtype=dtype), draw(24, dtype=dtype) if bias else None, (LowRank(A1, B1, 2.0, dropout),), m
        ),
        LinearMap(draw(16, 32, dtype=dtype), None, (LowRank(A2, B2, 0.3, dropout),)),
    ]
    mask = mask_of_next(dropout, 7, 32, dtype=dtype) if dropout else torch.ones(7, 32, dtype=torch.float64)
    y = linear(x, join_maps(parts))

    xd, md, (A1, B1, A2, B2) = wide(x), wide(m), (abd := [wide(t) for t in ab])
    left, (W, V) = xd * mask, (p.weight.double() for p in parts)
    one = xd @ W.T + (md - 1) * (left @ W.T) + md * (2.0 * (left @ A1.T) @ B1.T)
    one = one if parts[0].bias is None else one + parts[0].bias.double()
    yd = torch.cat([one, xd @ V.T + 0.3 * (left @ A2.T) @ B2.T], -1)
    same_with_gradients(y, [x, *ab, m], yd, [xd, *abd, md])


def test_fused_map_stacks_the_rows_of_its_parts() -> None:
    a = LinearMap(torch.ones(2, 3), None, (LowRank(torch.ones(1, 3), torch.ones(2, 1), 0.5),))
    b = LinearMap(torch.zeros(4, 3), torch.ones(4))
    both = join_maps([b, a])
    assert both.weight.shape == (6, 3)
    assert both.bias.tolist() == [1, 1, 1, 1, 0, 0]
    assert [(p.first, p.last, p.scale) for p in both.products] == [(4, 6, 0.5)]


def test_frozen_input_needs_no_gradient_product() -> None:
    x = draw(4, 8, dtype=torch.float32)
    A, B = factors(torch.float32, (2, 8), (6, 2))
    y = linear(x, LinearMap(draw(6, 8, dtype=torch.float32), None, (LowRank(A, B, 1.0),)))
    products = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal products
            products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_, torch.ops.aten.addmm)
            return func(*args, **(kwargs or {}))

    with Count():
        torch.autograd.grad(y.sum(), [A, B])
    assert products == 3  # du, dA, dB, and no product with W


def test_linear_output_is_writable() -> None:
    x = draw(4, 8, dtype=torch.float32)
    A, B = factors(torch.float32, (2, 8), (6, 2))
    y = linear(x, LinearMap(draw(6, 8, dtype=torch.float32), None, (LowRank(A, B, 1.0),)))
    y.add_(1.0).mul_(2.0)  # Llama 4 adds its routed experts in place
    y.sum().backward()
    torch.testing.assert_close(B.grad, 2.0 * (x @ A.detach().T).sum(0).expand(6, 2))


@pytest.mark.parametrize("rows", [1, 47, 50, 130])
def test_low_rank_products_in_compiled_calls(rows: int) -> None:
    """Covers sizes that do not fill the kernels' tiles, compared with torch.

    Tiles have 48 rows, in steps of 4; ranks have steps of 16; panels have 64 and 256 columns."""
    x, g = draw(rows, 96, dtype=torch.bfloat16), draw(rows, 400, dtype=torch.bfloat16)
    ab = [t.detach() for t in factors(torch.bfloat16, (4, 96), (304, 4), (20, 96), (80, 20))]
    pairs = (LowRank(ab[0], ab[1], 2.0), LowRank(ab[2], ab[3], 0.5, first=320))
    joint = LinearMap(draw(400, 96, dtype=torch.bfloat16), None, pairs)
    made = []
    make = dispatch("low_rank", x, g, joint.products) or LowRankProducts
    for exact, products in ((False, make(pairs, 400, x.dtype)), (True, LowRankProducts(pairs, 400, torch.float64))):
        x_, g_, y, dx = (t.double() if exact else t.clone() for t in (x, g, g, x))
        u = products.forward(x_, y)
        du = products.backward(g_, dx)
        made.append([y, dx, *products.gradients(g_, x_, u, du)])
        assert torch.equal(products.backward(g_, None), du)
    same(*made, 8e-3)


@pytest.mark.parametrize("at", [8, 24, 30])
def test_a_linear_map_split_in_two_equals_the_whole(at: int) -> None:
    """The cut is inside the first product, between the products, or inside the second.

    Values and all gradients are compared."""
    dtype = torch.float64
    x = draw(3, 5, 32, dtype=dtype).requires_grad_()
    W, b = draw(40, 32, dtype=dtype), draw(40, dtype=dtype)
    A1, B1, A2, B2 = ab = factors(dtype, (4, 32), (24, 4), (2, 32), (10, 2))
    gain = draw(40, dtype=torch.float32).requires_grad_()
    for own in (None, gain):
        whole = LinearMap(W, b, (LowRank(A1, B1, 2.0), LowRank(A2, B2, 0.3, first=26)), own)
        parts = split_map(whole, at)
        assert all(p.weight.untyped_storage().data_ptr() == W.untyped_storage().data_ptr() for p in parts)
        given, wanted = [x, *ab, *([] if own is None else [own])], linear(x, whole)
        y, g = torch.cat([linear(x, part) for part in parts], -1), draw(*wanted.shape, dtype=dtype)
        grads = [torch.autograd.grad(out, given, g) for out in (y, wanted)]
        same([y, *grads[0]], [wanted, *grads[1]], 1e-6)


def test_products_with_dropout_cannot_be_split() -> None:
    x, B = draw(2, 8, dtype=torch.float32), draw(6, 2, dtype=torch.float32)
    with pytest.raises(ValueError, match="dropout"):
        split_map(LinearMap(draw(6, 8, dtype=torch.float32), None, (LowRank(x, B, dropout=0.1),)), 3)
