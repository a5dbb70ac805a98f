"""The tensors that are written for module changes agree with LyCORIS' own modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.formats.test_module_tensors import close, product, rand
from veneer.core.adapter import Pair
from veneer.core.forms import Delta, change_of, delta_of
from veneer.errors import AdapterError
from veneer.formats.module_tensors import ModuleChanges, fitted, read_module, write_module


def test_alpha_is_written_so_that_the_scale_survives():
    third = write_module(ModuleChanges(Pair(rand(16, 3), rand(4, 16), 1 / 3)))["alpha"]
    assert (third.dtype, third.ndim) == (torch.float64, 0)
    assert write_module(ModuleChanges(Pair(rand(16, 3), rand(4, 16), 0.5)))["alpha"].dtype == torch.float32


CHANGES_WITHOUT_KOHYA = [
    ModuleChanges(Pair(rand(1, 2, 3), rand(1, 3, 2), 1.0, "experts")),
    ModuleChanges(
        None, {"weight": Delta("kronecker", {"w1": rand(2, 2), "w2": rand(3, 3)}, (4, 6), 1, None, (0, 4), (6, 6))}
    ),
    ModuleChanges(Pair(rand(2, 3), rand(3, 2), 1.0), {"weight": Delta("dense", {"value": rand(3, 3)}, (3, 3))}),
    ModuleChanges(None, {}, {"bias": rand(3)}),
]


@pytest.mark.parametrize("leaf", CHANGES_WITHOUT_KOHYA)
def test_changes_without_kohya_names_are_refused(leaf):
    with pytest.raises(AdapterError, match="has no tensors for"):
        write_module(leaf)


def test_an_origin_is_written_as_one_pair():
    A, B, A0, B0 = rand(2, 3), rand(4, 2), rand(2, 3, seed=1), rand(4, 2, seed=1)
    again = read_module(write_module(ModuleChanges(Pair(A, B, 0.5, origin=(A0, B0)))), where="x")
    close(product(again, (4, 3)), 0.5 * (B @ A - B0 @ A0))


BASES: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: torch.nn.Linear(12, 8), (3, 12)),
    "conv": (lambda: torch.nn.Conv2d(6, 8, 3), (3, 6, 5, 5)),
}


def applied(base: torch.nn.Module, leaf: ModuleChanges, x: Tensor) -> Tensor:
    """Return the base's output with ΔW added to its weight, in float64."""
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
    """Compares outputs with those of LyCORIS' forward pass, and the written tensors with its state dict.

    (Its get_diff_weight cannot be used, because it applies the scale of LoHa and LoKr twice.)"""
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
        leaf = fitted(read_module(state, where="x"), tuple(base.weight.shape))
        ours = applied(base, leaf, x)
    torch.testing.assert_close(theirs.double(), ours, rtol=1e-4, atol=1e-4)
    again = write_module(leaf)
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
        leaf = read_module(state, where="x")
        close(delta_of(base.weight, leaf.deltas["weight"]), module.get_diff_weight()[0], 1e-6)
        assert set(write_module(leaf)) == set(state)
