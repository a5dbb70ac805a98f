"""Deltas of every form equal a float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.attached import attached
from veneer.core import Adapter, attach
from veneer.core.forms import Delta, change_of, delta_of, part_problems, product_of, tucker
from veneer.errors import AdapterError

G = torch.Generator().manual_seed(7)


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def test_hadamard_by_hand() -> None:
    a1, b1, a2, b2 = made(3, 2), made(2, 4), made(3, 1), made(1, 4)
    P = product_of(Delta("hadamard", {"a1": a1, "b1": b1, "a2": a2, "b2": b2}, (3, 4), 0.25))
    for o in range(3):
        for i in range(4):
            one = sum(float(a1[o, r]) * float(b1[r, i]) for r in range(2))
            assert math.isclose(float(P[o, i]), 0.25 * one * float(a2[o, 0]) * float(b2[0, i]), rel_tol=1e-12)


def test_kronecker_by_hand() -> None:
    """(w1 ⊗ w2)[c·p + q, d·r + s] = w1[p, r]·w2[q, s] for w2 (c, d)."""
    w1, a2, b2 = made(2, 3), made(4, 2), made(2, 5)
    P = product_of(Delta("kronecker", {"w1": w1, "a2": a2, "b2": b2}, (8, 15), 2.0))
    for p in range(2):
        for r in range(3):
            for q in range(4):
                for s in range(5):
                    w2 = sum(float(a2[q, k]) * float(b2[k, s]) for k in range(2))
                    assert math.isclose(float(P[4 * p + q, 5 * r + s]), 2.0 * float(w1[p, r]) * w2, rel_tol=1e-12)


def test_kronecker_convolution_kernel_is_in_the_second_factor() -> None:
    w1, w2 = made(2, 3), made(4, 5, 3, 3)
    P = product_of(Delta("kronecker", {"w1": w1, "w2": w2}, (8, 15, 3, 3)))
    assert torch.allclose(P[4 * 1 + 2, 5 * 2 + 3], w1[1, 2] * w2[2, 3])


def test_a_core_equals_the_product_by_hand() -> None:
    a, core, b = made(3, 2), made(2, 2, 1, 3), made(2, 4)
    W = tucker(a, core, b)
    assert W.shape == (3, 4, 1, 3)
    for o, i, k in [(0, 0, 0), (2, 3, 2), (1, 2, 1)]:
        want = sum(float(a[o, p]) * float(core[p, q, 0, k]) * float(b[q, i]) for p in range(2) for q in range(2))
        assert math.isclose(float(W[o, i, 0, k]), want, rel_tol=1e-12)
    parts = {"a1": a, "t1": core, "b1": b, "a2": made(3, 2), "t2": made(2, 2, 1, 3), "b2": made(2, 4)}
    both = product_of(Delta("hadamard", parts, (3, 4, 1, 3)))
    assert torch.allclose(both, W * tucker(parts["a2"], parts["t2"], parts["b2"]))


def test_delta_rows_select_rows_of_the_product() -> None:
    w1, w2 = made(3, 2), made(4, 5)
    whole = product_of(Delta("kronecker", {"w1": w1, "w2": w2}, (12, 10)))
    part = Delta("kronecker", {"w1": w1, "w2": w2}, (4, 10), 1.0, None, (4, 8), (12, 10))
    assert not part_problems(part)
    assert torch.equal(product_of(part), whole[4:8])


def test_gain_scales_outputs_or_inputs() -> None:
    W = made(3, 4)
    by_output, by_input = made(3), made(1, 4)
    assert torch.allclose(delta_of(W, Delta("gain", {"value": by_output}, (), 0.5)), 0.5 * torch.diag(by_output) @ W)
    assert torch.allclose(delta_of(W, Delta("gain", {"value": by_input}, (), 0.5)), 0.5 * W @ torch.diag(by_input[0]))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 2)])
def test_dora_sets_row_or_column_norms(shape: tuple[int, ...]) -> None:
    """By definition, each row (or column) of W' has norm m and the direction that it has in W + P."""
    W, P = made(*shape), made(*shape)
    m = made(3).abs()
    new = W + change_of(W, P, m)
    assert torch.allclose(new.flatten(1).norm(dim=1), m)
    assert torch.allclose(
        nn.functional.cosine_similarity(new.flatten(1), (W + P).flatten(1)), torch.ones(3, dtype=torch.float64)
    )
    m = made(1, 4, *[1] * (len(shape) - 2)).abs()
    new = W + change_of(W, P, m)
    assert torch.allclose(new.transpose(0, 1).flatten(1).norm(dim=1), m.flatten())


@pytest.mark.parametrize(
    ("delta", "said"),
    [
        (Delta("dense", {"value": made(3, 3)}, (3, 4)), "value (3, 3) do not fit"),
        (Delta("kronecker", {"w1": made(2, 2), "w2": made(2, 2)}, (3, 4), 1.0, None, (2, 3), (4, 4)), "(1, 4), but"),
        (Delta("hadamard", {"a1": made(3, 2)}, (3, 4)), "hadamard has parts: a1; expected a1, a2, b1, b2"),
        (Delta("hadamard", {"a1": made(3, 2), "b1": made(3, 4), "a2": made(3, 2), "b2": made(2, 4)}, (3, 4)), "fit"),
        (Delta("kronecker", {"w1": made(2, 2), "w2": made(2, 2)}, (4, 5)), "do not fit"),
        (Delta("gain", {"value": made(3)}, (), rows=(0, 1)), "a gain cannot have rows"),
    ],
)  # fmt: skip
def test_parts_of_other_shapes_are_refused(delta: Delta, said: str) -> None:
    (problem,) = part_problems(delta)
    assert said in problem


def test_attach_error_lists_misfits() -> None:
    model = nn.ModuleDict({"m": nn.Linear(4, 3, bias=False), "n": nn.LayerNorm(4)})
    deltas = {
        "m.weight": Delta("dense", {"value": made(3, 5)}, (3, 5)),
        "m.bias": Delta("dense", {"value": made(4)}, (4,)),
        "m.gain": Delta("dense", {"value": made(3)}, (3,)),
        "n.weight": Delta("gain", {"value": made(5)}),
        "o.weight": Delta("dense", {"value": made(3)}, (3,)),
        "n.bias": Delta("dense", {"value": made(4)}, (4,), magnitude=made(3)),
    }
    with attach(model) as attachment, pytest.raises(AdapterError) as error:
        attachment.add("a", Adapter(deltas=deltas))
    for line in (
        "m.weight is (3, 5), the base needs (3, 4)",
        "m.bias is (4,), the base needs (3,)",
        "m.gain: Linear has no 'gain'",
        "n.weight: a gain of (5,) does not fit (4,)",
        "o: no such module in the base",
        "n.bias: the magnitude is (3,), the base needs (4,)",
    ):
        assert line in str(error.value)


def test_bias_delta_acts_on_bias_free_module_but_cannot_merge() -> None:
    model = nn.ModuleDict({"m": nn.Linear(4, 3, bias=False)})
    x, b = made(2, 4).float(), made(3).float()
    with attached(model, Adapter(deltas={"m.bias": Delta("dense", {"value": b}, (3,), 0.5)})) as attachment:
        torch.testing.assert_close(model["m"](x), x @ model["m"].weight.T + 0.5 * b)
        with pytest.raises(AdapterError, match=r"m\.bias: the base has no such bias to merge into"):
            attachment.merged("a")


def test_a_norm_takes_deltas_of_both_parameters() -> None:
    model = nn.ModuleDict({"n": nn.GroupNorm(2, 4)})
    w, b = made(4), made(4)
    deltas = {"n.weight": Delta("dense", {"value": w}, (4,)), "n.bias": Delta("dense", {"value": b}, (4,), 0.5)}
    x = made(2, 4, 3).float()
    with attached(model, Adapter(deltas=deltas), 2.0) as attachment:
        y = model["n"](x)
        state = attachment.merged(("a", 2.0))
    torch.testing.assert_close(state["n.bias"], b.float())
    want = nn.functional.group_norm(x, 2, 1 + 2 * w.float(), b.float())
    torch.testing.assert_close(y, want)


def test_different_deltas_have_different_digests() -> None:
    value = {"value": made(3, 4)}
    one = Adapter(deltas={"m.weight": Delta("dense", value, (3, 4))}).digest()
    assert one != Adapter(deltas={"m.weight": Delta("dense", value, (3, 4), 0.5)}).digest()
    assert one != Adapter(deltas={"n.weight": Delta("dense", value, (3, 4))}).digest()
    assert one == Adapter(deltas={"m.weight": Delta("dense", {"value": value["value"].clone()}, (3, 4))}).digest()
