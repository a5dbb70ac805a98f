"""Comparison of a written adapter with the adapter read back, by their ΔW."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.formats.image_adapters import by_hand, numbers
from veneer.core.adapter import Adapter, Pair, TokenRows
from veneer.core.forms import Delta
from veneer.formats.comparison import TOLERANCE, differences, relative_error


def pair(seed: str = "", rank: int = 2, scale: float = 0.5) -> Pair:
    return Pair(numbers((rank, 6), f"A{seed}", torch.float64), numbers((8, rank), f"B{seed}", torch.float64), scale)


SCALES = st.floats(-3, 3).filter(
    lambda s: s == 0 or abs(s) > 1e-100
)  # for smaller scales, the square underflows float64


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), SCALES, SCALES)
def test_error_equals_that_of_the_dense_difference(r1, r2, s1, s2):
    a, b = pair("a", r1, s1), pair("b", r2, s2)
    whole, off = by_hand(a).norm(), (by_hand(a) - by_hand(b)).norm()
    want = float(off / whole) if whole else float(off)
    assert math.isclose(relative_error(a, b), want, rel_tol=1e-6, abs_tol=1e-7)


@settings(max_examples=50, deadline=None)
@given(st.floats(-12, 0))
def test_differences_above_the_tolerance_are_reported(exponent):
    a = pair()
    b = Pair(a.A, a.B * (1 + 10**exponent), a.scale)
    if abs(math.log10(TOLERANCE) - exponent) > 0.1:
        assert bool(differences(Adapter({"m": a}), Adapter({"m": b}))) == (10**exponent > TOLERANCE)


def test_factors_of_equal_product_do_not_differ():
    a = pair(rank=2)
    turn = torch.linalg.qr(numbers((2, 2), "Q", torch.float64)).Q
    wide = Pair(torch.cat([turn @ a.A, torch.ones(3, 6)]), torch.cat([a.B @ turn.T, torch.zeros(8, 3)], 1), a.scale)
    assert differences(Adapter({"m": a}), Adapter({"m": wide})) == []
    conv = Pair(wide.A.reshape(5, 6, 1, 1), wide.B.reshape(8, 5, 1, 1), a.scale, "conv")
    assert differences(Adapter({"m": a}), Adapter({"m": conv})) == []


def dense(value: torch.Tensor, scale: float = 1.0) -> Delta:
    return Delta("dense", {"value": value}, tuple(value.shape), scale)


ONES = torch.ones(8)
MEANT = Adapter(
    {"m": pair()},
    {"n": {"weight": ONES}},
    {"e": TokenRows((1,), torch.ones(1, 4))},
    deltas={"m.bias": dense(ONES), "g.weight": Delta("gain", {"value": ONES}, ())},
)


def but(**changes) -> Adapter:
    parts = {what: getattr(MEANT, what) for what in ("pairs", "modules", "token_rows", "deltas")}
    return Adapter(**(parts | changes))


DIFFERENCES = [
    (but(pairs={}), "m: lost"),
    (but(pairs={"m": pair(), "x": pair()}), "x: an unexpected pair"),
    (but(pairs={"m": pair(scale=0.6)}), "m: ΔW would come back with a relative error of 0.2"),
    (but(pairs={"m": Pair(pair().A, pair().B, 0.5, magnitude=ONES)}), "m: the magnitude is not the same"),
    (but(pairs={"m": Pair(pair().A[:, :3], pair().B, 0.5)}), "m: a delta of (8, 6) would come back as one of (8, 3)"),
    (but(deltas={"g.weight": MEANT.deltas["g.weight"]}), "m.bias: lost"),
    (but(deltas=MEANT.deltas | {"x.bias": dense(ONES)}), "x.bias: an unexpected change"),
    (but(deltas=MEANT.deltas | {"m.bias": dense(ONES, 2.0)}), "m.bias: the scale is not the same"),
    (
        but(deltas=MEANT.deltas | {"m.bias": dense(ONES * 2)}),
        "m.bias: the change would come back with a relative error of 1",
    ),
    (but(deltas=MEANT.deltas | {"g.weight": dense(ONES)}), "g.weight: a gain change would come back as a dense one"),
    (but(modules={"n": {"weight": ONES * 2}}), "n.weight: the replacement is not the same"),
    (but(modules={}), "n.weight: the replacement is not the same"),
    (but(token_rows={}), "e, rows (1,): the replacement is not the same"),
]


@pytest.mark.parametrize(("got", "line"), DIFFERENCES)
def test_every_difference_has_a_line(got, line):
    assert differences(MEANT, got) == [line]


def test_zero_change_may_be_read_back():
    nothing = Pair(torch.ones(2, 6), torch.zeros(8, 2), 1.0)
    zero = but(pairs={"m": pair(), "x": nothing}, deltas=MEANT.deltas | {"x.bias": dense(torch.zeros(8))})
    assert differences(MEANT, zero) == []
    assert differences(MEANT, MEANT) == []
