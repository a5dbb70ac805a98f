"""Leaves that are written come back with the same ΔW, and LyCORIS' own modules agree with what is read."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.formats.test_leaves import close, product, rand
from veneer.core.adapter import Pair
from veneer.core.forms import Delta, change_of, delta_of, product_of
from veneer.errors import AdapterError
from veneer.formats.leaves import Leaf, fitted, read_leaf, write_leaf


def same(leaf: Leaf, again: Leaf, shape: tuple[int, ...]) -> None:
    torch.testing.assert_close(product(again, shape), product(leaf, shape), rtol=1e-15, atol=0)
    for name in leaf.deltas:
        if name == "bias":
            close(product_of(again.deltas[name]), product_of(leaf.deltas[name]))
    for ours, theirs in ((leaf.pair, again.pair), (leaf.deltas.get("weight"), again.deltas.get("weight"))):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours.magnitude is None) == (theirs.magnitude is None)
            assert ours.magnitude is None or torch.equal(ours.magnitude, theirs.magnitude)


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 5),
    scale=st.floats(1e-3, 100),
    kernel=st.sampled_from([(), (1, 1), (3, 3)]),
    magnitude=st.sampled_from([None, 0, 1]),
    bias=st.booleans(),
)
def test_pairs_come_back(rank, scale, kernel, magnitude, bias):
    shape = (4, 3, *kernel)
    m = None if magnitude is None else rand(shape[magnitude]).abs()
    if magnitude == 1:
        m = m.reshape(1, -1, *[1] * len(kernel))
    A, B = rand(rank, 3, *kernel), rand(4, rank, *[1] * len(kernel))
    leaf = Leaf(Pair(A, B, scale, "conv" if kernel else "linear", m))
    if bias:
        leaf.deltas["bias"] = Delta("dense", {"value": rand(4)}, (4,), scale)
    again = read_leaf(write_leaf(leaf), where="x")
    assert math.isclose(again.pair.scale, scale, rel_tol=1e-15)
    same(leaf, again, shape)


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(
        ["loha", "loha core", "lokr", "lokr a", "lokr b", "lokr ab", "lokr core", "dense", "gain", "norm"]
    ),
    scale=st.floats(1e-3, 100),
    magnitude=st.sampled_from([None, 0, 1]),
)
def test_other_forms_come_back_in_lycoris_names(form, scale, magnitude):
    shape: tuple[int, ...] = (6, 6)
    parts: dict[str, Tensor]
    if form.startswith("loha"):
        parts = {"a1": rand(6, 2), "b1": rand(2, 6), "a2": rand(6, 2, seed=1), "b2": rand(2, 6, seed=1)}
        if "core" in form:
            parts |= {"t1": rand(2, 2, 3, 3), "t2": rand(2, 2, 3, 3, seed=1)}
            shape = (6, 6, 3, 3)
        delta = Delta("hadamard", parts, shape, scale)
    elif form.startswith("lokr"):
        parts = {"a1": rand(2, 2), "b1": rand(2, 3)} if "a" in form else {"w1": rand(2, 3)}
        parts |= {"a2": rand(3, 2), "b2": rand(2, 2)} if "b" in form or "core" in form else {"w2": rand(3, 2)}
        if "core" in form:
            parts["t2"] = rand(2, 2, 3, 3)
            shape = (6, 6, 3, 3)
        delta = Delta("kronecker", parts, shape, scale)
    elif form == "dense":
        delta = Delta("dense", {"value": rand(6, 6)}, shape, scale)
    elif form == "norm":
        shape = (6,)
        delta = Delta("dense", {"value": rand(6)}, shape, scale)
    else:
        delta = Delta("gain", {"value": rand(1, 6) if magnitude else rand(6)}, (), scale)
    if magnitude is not None and form.startswith("lo"):
        m = rand(6).abs()
        delta.magnitude = m if magnitude == 0 else m.reshape(1, -1, *[1] * (len(shape) - 2))
    leaf = Leaf(None, {"weight": delta})
    if form == "norm":
        leaf.deltas["bias"] = Delta("dense", {"value": rand(6)}, (6,), 2.0)
    written = write_leaf(leaf)
    if form == "norm":
        assert set(written) == {"w_norm", "b_norm"}
    again = read_leaf(written, where="x")
    if form == "gain":
        W = rand(6, 6, seed=5)
        close(delta_of(W, again.deltas["weight"]), delta_of(W, delta))
    else:
        same(leaf, again, shape)


def test_alpha_is_written_so_that_the_scale_survives():
    third = write_leaf(Leaf(Pair(rand(16, 3), rand(4, 16), 1 / 3)))["alpha"]
    assert (third.dtype, third.ndim) == (torch.float64, 0)
    assert write_leaf(Leaf(Pair(rand(16, 3), rand(4, 16), 0.5)))["alpha"].dtype == torch.float32


@pytest.mark.parametrize(
    "leaf",
    [
        Leaf(Pair(rand(1, 2, 3), rand(1, 3, 2), 1.0, "experts")),
        Leaf(
            None, {"weight": Delta("kronecker", {"w1": rand(2, 2), "w2": rand(3, 3)}, (4, 6), 1, None, (0, 4), (6, 6))}
        ),
        Leaf(Pair(rand(2, 3), rand(3, 2), 1.0), {"weight": Delta("dense", {"value": rand(3, 3)}, (3, 3))}),
        Leaf(None, {}, {"bias": rand(3)}),
    ],
)
def test_what_the_names_cannot_hold_is_refused(leaf):
    with pytest.raises(AdapterError, match="has no tensors for"):
        write_leaf(leaf)


def test_an_origin_is_written_as_one_pair():
    A, B, A0, B0 = rand(2, 3), rand(4, 2), rand(2, 3, seed=1), rand(4, 2, seed=1)
    again = read_leaf(write_leaf(Leaf(Pair(A, B, 0.5, origin=(A0, B0)))), where="x")
    close(product(again, (4, 3)), 0.5 * (B @ A - B0 @ A0))


BASES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: torch.nn.Linear(12, 8), (3, 12)),
    "conv": (lambda: torch.nn.Conv2d(6, 8, 3), (3, 6, 5, 5)),
}


def applied(base: torch.nn.Module, leaf: Leaf, x: Tensor) -> Tensor:
    """The base's output with the leaf's ΔW in its weight, in float64."""
    held = leaf.pair or leaf.deltas["weight"]
    W = base.weight.detach().double()
    W = W + change_of(W, product(leaf, tuple(W.shape)), held.magnitude)
    op = torch.nn.functional.linear if W.ndim == 2 else torch.nn.functional.conv2d
    return op(x.double(), W, base.bias.detach().double())


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", BASES)
@pytest.mark.parametrize("wd", [None, True, False])
@pytest.mark.parametrize("extra", [{}, {"use_tucker": True}, {"decompose_both": True}, {"rs_lora": True}])
@pytest.mark.parametrize("algorithm", ["LoConModule", "LohaModule", "LokrModule"])
def test_lycoris_agrees(algorithm, extra, wd, layer):
    """Its forward's ΔW, from its own state dict. (Its get_diff_weight counts the scale of LoHa and LoKr twice.)"""
    modules = pytest.importorskip("lycoris.modules")
    torch.manual_seed(0)
    make, shape = BASES[layer]
    base = make()
    extra = {"factor": 4, "lora_dim": 1, **extra} if algorithm == "LokrModule" else {"lora_dim": 2, **extra}
    module = getattr(modules, algorithm)(
        "x", base, alpha=0.5, weight_decompose=wd is not None, wd_on_out=wd is not False, **extra
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        if wd is not None:
            module.dora_scale.abs_()
        state = {k: t.clone() for k, t in module.custom_state_dict().items()}
        x = torch.randn(shape)
        module.apply_to()
        theirs = base(x)
        module.restore()
        leaf = fitted(read_leaf(state, where="x"), tuple(base.weight.shape))
        ours = applied(base, leaf, x)
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-4, atol=1e-4)
    again = write_leaf(leaf)
    if algorithm != "LoConModule" or "use_tucker" not in extra:
        assert set(again) == set(state)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", BASES)
@pytest.mark.parametrize("on_input", [True, False])
def test_lycoris_agrees_on_gains(on_input, layer):
    modules = pytest.importorskip("lycoris.modules")
    base = BASES[layer][0]()
    module = modules.IA3Module("x", base, train_on_input=on_input)
    torch.nn.init.normal_(module.weight)
    with torch.no_grad():
        state = {k: t.clone() for k, t in module.state_dict().items() if k in ("weight", "on_input")}
        leaf = read_leaf(state, where="x")
        theirs = module.get_diff_weight()[0]
        close(delta_of(base.weight, leaf.deltas["weight"]), theirs, 1e-6)
        assert set(write_leaf(leaf)) == set(state)
