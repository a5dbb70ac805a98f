"""Laws of low-rank products as a GPU makes them, against float64, by the ops that use them."""

from __future__ import annotations

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.cuda.laws import DTYPES, FEW, SEEDS, close, drawn
from veneer.ops.cuda.lowrank import ShadowedProducts
from veneer.ops.dispatch import dispatch
from veneer.ops.linear import LinearMap, linear
from veneer.ops.lowrank import LowRank
from veneer.train.optim import make_optimizer, optimizer_names


def products_of(
    seed: int, ranks: list[int], inputs: int, each: int, first: int, apart: int, device: str = "cpu"
) -> list[LowRank]:
    out = []
    for i, rank in enumerate(ranks):
        A = drawn(seed + 2 * i, rank, inputs, dtype=torch.float32, device=device).requires_grad_()
        B = drawn(seed + 2 * i + 1, each, rank, dtype=torch.float32, device=device).requires_grad_()
        out.append(LowRank(A, B, scale=0.5 + i, first=first + i * (each + apart)))
    return out


@FEW
@given(
    DTYPES,
    st.integers(0, 9),
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.integers(0, 3),
    st.booleans(),
    SEEDS,
)
def test_linear(device: str, dtype: torch.dtype, n: int, ranks: list[int], apart: int, gain: bool, seed: int) -> None:
    inputs, each = 24, 10
    products = products_of(seed, ranks, inputs, each, apart, apart, device)
    rows = products[-1].last + apart
    W, b = (
        drawn(seed + 50, rows, inputs, dtype=dtype, device=device),
        drawn(seed + 51, rows, dtype=dtype, device=device),
    )
    x, g = (
        drawn(seed + 52, n, inputs, dtype=dtype, device=device).requires_grad_(),
        drawn(seed + 53, n, rows, dtype=dtype, device=device),
    )
    by = (drawn(seed + 54, rows, dtype=torch.float32, device=device) + 1).requires_grad_() if gain else None
    given = [x, *(t for p in products for t in (p.A, p.B)), *([by] if by is not None else [])]
    assert dispatch("low_rank", x, x, products) is ShadowedProducts
    y = linear(x, LinearMap(W, b, tuple(products), by))
    wide = [t.detach().double().requires_grad_() for t in given]
    plain = wide[0] @ W.double().t()
    for i, p in enumerate(products):
        own = p.scale * (wide[0] @ wide[1 + 2 * i].t()) @ wide[2 + 2 * i].t()
        plain = plain + torch.nn.functional.pad(own, (p.first, rows - p.last))
    want = (plain if by is None else plain * wide[-1]) + b.double()
    close(y, want, dtype, 3)
    got, wanted = torch.autograd.grad(y, given, g), torch.autograd.grad(want, wide, g.double())
    for a, b in zip(got, wanted, strict=True):
        close(a, b, dtype, 3)


def copies_of(*products: LowRank) -> ShadowedProducts:
    return ShadowedProducts(products, 5, torch.bfloat16)


def test_copies_are_made_once_and_again_after_a_step() -> None:
    (p,) = products_of(0, [4], 8, 6, 0, 0)
    first = copies_of(p)
    assert copies_of(LowRank(p.A, p.B, scale=7.0)).A is first.A
    with torch.no_grad():
        p.A.add_(1)
    new = copies_of(p)
    assert new.A is not first.A
    assert torch.equal(new.A, p.A.bfloat16())
    p.B.data = p.B.data * 2
    assert torch.equal(copies_of(p).B[0], p.B.bfloat16())
    assert torch.equal(first.B[0], (p.B / 2).bfloat16())


@pytest.mark.parametrize("name", optimizer_names())
def test_copies_follow_every_optimizer(name: str) -> None:
    """A fused one changes a parameter without a new version of it."""
    (p,) = products_of(0, [4], 8, 6, 0, 0)
    parameters = {"A": torch.nn.Parameter(p.A.detach()), "B": torch.nn.Parameter(p.B.detach())}
    product = LowRank(parameters["A"], parameters["B"])
    optimizer = make_optimizer(parameters, name=name, learning_rate=0.1)
    for _ in range(2):
        copies_of(product)
        for t in parameters.values():
            t.grad = torch.ones_like(t)
        before = product.B.detach().clone()
        optimizer.step()
        assert not torch.equal(product.B, before)
        made = copies_of(product)
        assert torch.equal(made.A, product.A.bfloat16())
        assert torch.equal(made.B[0], product.B.bfloat16())


def test_copies_go_with_what_they_are_copies_of() -> None:
    products = products_of(0, [4, 2], 8, 6, 0, 0)
    copies = [weakref.ref(t) for t in (copies_of(*products).A, *copies_of(*products).B)]
    assert all(copy() is not None for copy in copies)
    del products
    assert all(copy() is None for copy in copies)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_in_the_dtype_already_is_not_copied(dtype: torch.dtype) -> None:
    A, B = torch.ones(2, 3, dtype=dtype), torch.ones(4, 2, dtype=dtype)
    made = ShadowedProducts([LowRank(A, B)], 5, dtype)
    assert (made.A.data_ptr(), made.B[0].data_ptr()) == (A.data_ptr(), B.data_ptr())
