"""Leaves written under every naming come back with the same ΔW, and LyCORIS' own modules agree with what is read."""

from __future__ import annotations

import math

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
    naming=st.sampled_from(["kohya", "lora.up", "diffusers", "peft"]),
    rank=st.integers(1, 5),
    scale=st.floats(1e-3, 100),
    kernel=st.sampled_from([(), (1, 1), (3, 3)]),
    magnitude=st.sampled_from([None, 0, 1]),
    bias=st.booleans(),
)
def test_pairs_come_back(naming, rank, scale, kernel, magnitude, bias):
    shape = (4, 3, *kernel)
    m = None if magnitude is None else rand(shape[magnitude]).abs()
    if magnitude == 1:
        m = m.reshape(1, -1, *[1] * len(kernel))
    A, B = rand(rank, 3, *kernel), rand(4, rank, *[1] * len(kernel))
    leaf = Leaf(Pair(A, B, scale, "conv" if kernel else "linear", m))
    if bias:
        leaf.deltas["bias"] = Delta("dense", {"value": rand(4)}, (4,), scale)
    refused = magnitude is not None and (naming == "lora.up" or ((magnitude == 1 or bias) and naming != "kohya"))
    if refused:
        with pytest.raises(AdapterError, match="has no tensors for"):
            write_leaf(leaf, naming)
        return
    written = write_leaf(leaf, naming)
    again = read_leaf(written, alpha=scale * rank if naming == "peft" else None, where="x")
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
    written = write_leaf(leaf, "kohya")
    if form == "norm":
        assert set(written) == {"w_norm", "b_norm"}
    again = read_leaf(written, where="x")
    if form == "gain":
        W = rand(6, 6, seed=5)
        close(delta_of(W, again.deltas["weight"]), delta_of(W, delta))
    else:
        same(leaf, again, shape)
    for naming in ("peft", "diffusers"):
        with pytest.raises(AdapterError, match="has no tensors for"):
            write_leaf(leaf, naming)


def test_alpha_is_written_so_that_the_scale_survives():
    third = write_leaf(Leaf(Pair(rand(16, 3), rand(4, 16), 1 / 3)), "kohya")["alpha"]
    assert (third.dtype, third.ndim) == (torch.float64, 0)
    assert write_leaf(Leaf(Pair(rand(16, 3), rand(4, 16), 0.5)), "kohya")["alpha"].dtype == torch.float32


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
@pytest.mark.parametrize("naming", ["kohya", "peft"])
def test_what_a_naming_cannot_hold_is_refused(leaf, naming):
    with pytest.raises(AdapterError, match="has no tensors for"):
        write_leaf(leaf, naming)


def test_an_origin_is_written_as_one_pair():
    A, B, A0, B0 = rand(2, 3), rand(4, 2), rand(2, 3, seed=1), rand(4, 2, seed=1)
    again = read_leaf(write_leaf(Leaf(Pair(A, B, 0.5, origin=(A0, B0))), "kohya"), where="x")
    close(product(again, (4, 3)), 0.5 * (B @ A - B0 @ A0))


MODULES = {"linear": lambda: torch.nn.Linear(12, 8), "conv": lambda: torch.nn.Conv2d(6, 8, 3)}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", MODULES)
@pytest.mark.parametrize("wd", [None, True, False])
@pytest.mark.parametrize("extra", [{}, {"use_tucker": True}, {"decompose_both": True}, {"rs_lora": True}])
@pytest.mark.parametrize("algorithm", ["LoConModule", "LohaModule", "LokrModule"])
def test_lycoris_agrees(algorithm, extra, wd, layer):
    """Its forward's ΔW, from its own state dict. (Its get_diff_weight counts the scale of LoHa and LoKr twice.)"""
    modules = pytest.importorskip("lycoris.modules")
    torch.manual_seed(0)
    base = MODULES[layer]()
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
        x = torch.randn(3, 12) if layer == "linear" else torch.randn(3, 6, 5, 5)
        module.apply_to()
        theirs = base(x)
        module.restore()
        leaf = fitted(read_leaf(state, where="x"), tuple(base.weight.shape))
        held = leaf.pair or leaf.deltas["weight"]
        W = base.weight.double()
        W = W + change_of(W, product(leaf, tuple(W.shape)), held.magnitude)
        op = torch.nn.functional.linear if layer == "linear" else torch.nn.functional.conv2d
        ours = op(x.double(), W, base.bias.double())
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-4, atol=1e-4)
    again = write_leaf(leaf, "kohya")
    if algorithm != "LoConModule" or "use_tucker" not in extra:
        assert set(again) == set(state)
