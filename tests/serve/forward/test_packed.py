"""Weights as serving multiplies by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import FAMILIES
from tests.ops.draws import coded
from tests.serve.forward.test_runner import base_of, prompts, serve, trained
from veneer.errors import ConfigError
from veneer.ops.cpu import compiled
from veneer.serve.forward.packed import (
    Dense,
    Int4,
    Int8,
    Reordered,
    best_packing,
    pack_weight,
    quantised_packing,
)
from veneer.serve.forward.panels import PanelRows, Panels, panels_of_codes
from veneer.serve.forward.runner import Runner

CPU = torch.device("cpu")


def weight(rows: int = 48, n: int = 96) -> torch.Tensor:
    return (torch.randn(rows, n, generator=torch.Generator().manual_seed(0)) * 0.1).bfloat16()


has_panels = pytest.mark.skipif(not compiled.has("panel_product"), reason="no kernels for products here")


@pytest.mark.parametrize("rows", [1, 3, 8, 15, 16, 17, 200])
@pytest.mark.parametrize(
    "pack",
    [
        Dense, Reordered.of, Int8.of, Int4.of,
        *(pytest.param(of, marks=has_panels) for of in (Panels.of, Panels.int8, Panels.int4)),
    ],
)  # fmt: skip
def test_products_are_those_of_the_dense_weight(pack: Callable[[Tensor], Any], rows: int) -> None:
    if pack == Reordered.of and best_packing(torch.bfloat16, CPU) is None:
        pytest.skip("this torch packs no weights")
    w = weight()
    matrix = pack(w)
    own = matrix.dense().double() if hasattr(matrix, "dense") else w.double()
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(48, generator=torch.Generator().manual_seed(2)).bfloat16()
    want = x.double() @ own.t()
    size = float(want.abs().max())
    assert (matrix(x).double() - want).abs().max() <= 0.01 * size
    assert (matrix(x, bias).double() - (want + bias.double())).abs().max() <= 0.015 * size
    y = bias.repeat(rows, 1)
    matrix.add_onto(y, x)
    assert (y.double() - (want + bias.double())).abs().max() <= 0.015 * size


@has_panels
@pytest.mark.parametrize(("out", "n"), [(16, 32), (80, 4224), (208, 2080)])
@pytest.mark.parametrize("pack", [Panels.of, Panels.int8, Panels.int4])
def test_panels_of_any_size(pack: Callable[[Tensor], Panels], out: int, n: int) -> None:
    """Last panels that are not full, sums longer than a block, rows in several blocks; each row by itself as well."""
    g = torch.Generator().manual_seed(0)
    w, x, bias = torch.randn(out, n, generator=g), torch.randn(131, n, generator=g), torch.randn(out, generator=g)
    w, x, bias = w.bfloat16(), x.bfloat16(), bias.bfloat16()
    matrix = pack(w)
    want = x.double() @ matrix.dense().double().t()
    got = matrix(x, bias)
    assert (got.double() - want - bias.double()).abs().max() <= 0.006 * want.abs().max()
    assert all(torch.equal(matrix(x[i : i + k], bias), got[i : i + k]) for i, k in ((0, 0), (1, 2), (5, 3), (60, 71)))
    y = x[:, :1].repeat(1, out)
    before = y.clone()
    matrix.add_onto(y, x, bias)
    assert torch.equal(y, before + got)


KINDS = ("nf4", "fp4", "int8", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")


def rounding(x: Tensor, w: Tensor, kind: str) -> Tensor:
    """What sums of float32 and one rounding of the result to bfloat16 may make of x·wᵀ; and a rounding of each weight
    where those of the kernel are rounded otherwise: scale and zero are one rounding there."""
    size, otherwise = x.abs() @ w.abs().t(), kind in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")
    return 2**-8 * (x @ w.t()).abs() + (2**-8 if otherwise else 2**-16) * size


@has_panels
@pytest.mark.parametrize(("out", "n"), [(16, 256), (80, 512), (208, 1280)])
@pytest.mark.parametrize("kind", KINDS)
def test_products_by_codes_are_those_of_the_dequantised_weight(kind: str, out: int, n: int) -> None:
    """Of float64, one row or forty, in int8 before it is rounded to bfloat16; a row by itself has the same bits, and
    the codes are as they were."""
    g = torch.Generator().manual_seed(1)
    first, second = (coded(torch.randn(k, n, generator=g).bfloat16() / 8, kind) for k in (out, 32))
    dense = torch.cat([first.dense(), second.dense()])
    laid = panels_of_codes([first, second])
    assert laid is not None
    panels, views = laid
    assert panels.bytes <= 64 * -(-(out + 32) // 64) * (n * BITS[kind] / 8 + 4)
    assert all(torch.equal(v.dense(), w.dense()) for v, w in zip(views, (first, second), strict=True))
    assert torch.equal(views[1][5:21].dense(), second.dense()[5:21])
    assert torch.equal(views[0].clone().dense(), first.dense())
    x = torch.randn(40, n, generator=g).bfloat16()
    exact = torch.cat([w.stored.dense(torch.float32, 0, len(w)) for w in (first, second)]) if kind == "int8" else dense
    got, (x64, w64) = panels(x), (x.double(), exact.double())
    assert ((got.double() - x64 @ w64.t()).abs() <= rounding(x64, w64, kind)).all()
    for rows in range(40):
        assert torch.equal(panels(x[40 - rows :].contiguous()), got[40 - rows :])


BITS = {
    "nf4": 4.5, "fp4": 4.5, "int8": 8, "Q4_0": 5, "Q4_1": 6, "Q5_0": 9, "Q5_1": 10, "Q8_0": 9, "Q4_K": 6, "Q5_K": 10,
    "Q6_K": 10,
}  # fmt: skip


@has_panels
def test_weights_of_two_types_lie_in_one_panel_and_those_of_no_common_form_do_not() -> None:
    g = torch.Generator().manual_seed(1)
    w = [torch.randn(16, 256, generator=g).bfloat16() for _ in range(3)]
    for kinds in (("Q4_K", "Q6_K", "Q8_0"), ("int8", "Q4_0", "Q4_1"), ("nf4", "nf4", "nf4")):
        laid = panels_of_codes([coded(own, kind) for own, kind in zip(w, kinds, strict=True)])
        assert laid is not None
        assert torch.equal(laid[0].dense(), torch.cat([v.dense() for v in laid[1]]))
    assert panels_of_codes([coded(w[0], "nf4"), coded(w[1], "int8")]) is None
    assert panels_of_codes([coded(w[0], "nf4"), w[1]]) is None
    assert panels_of_codes([coded(w[0][:15], "nf4")]) is None
    assert panels_of_codes([coded(w[0][:, :100], "nf4")]) is None
    laid = panels_of_codes([coded(w[0], "int8")])
    assert laid is not None
    again = panels_of_codes(laid[1])  # a second engine over the same base
    assert again is not None
    assert isinstance(again[1][0].stored, PanelRows)
    assert torch.equal(again[1][0].dense(), laid[1][0].dense())


def test_weights_without_panels_are_kept_as_they_can_be() -> None:
    with pytest.raises(ValueError, match="no panels"):
        Panels.of(weight(41, 96))
    w, x = weight(41, 96), torch.ones(3, 96).bfloat16()
    assert (pack_weight(w)(x).double() - x.double() @ w.double().t()).abs().max() <= 0.05
    eight = quantised_packing("int8")(w)
    assert (eight(x).double() - x.double() @ eight.dense().double().t()).abs().max() <= 0.05
    with pytest.raises(ValueError, match="no int8 form"):
        Int8.of(weight(48, 40))


def test_a_vocabulary_of_any_size_is_served_in_int8() -> None:
    model = FAMILIES["llama3"](hidden_size=64, intermediate_size=96, vocab_size=161).bfloat16()
    ((ids,), rows) = prompts([20]), []
    for weights in ("dense", "int8"):
        runner = Runner(base_of(model), cache_bytes=1 << 20, weights=weights)  # type: ignore[arg-type]
        rows.append(serve(runner, [(ids, [])], [7, 16])[0].double())
        runner.close()
    assert len(rows[1]) == 161
    assert (rows[1] - rows[0]).norm() <= 0.1 * rows[0].norm()


@pytest.mark.parametrize(("of8", "of4"), [(Int8.of, Int4.of), (Panels.int8, Panels.int4)])
def test_rounding_is_as_fine_as_the_bits_allow(of8: Any, of4: Any) -> None:
    w = weight()
    eight = (of8(w).dense().float() - w.float()).abs()
    assert (eight <= 0.55 * w.float().abs().amax(1, keepdim=True) / 127 + 0.005 * w.float().abs()).all()
    groups = w.float().view(48, 3, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    four = (of4(w).dense().float() - w.float()).abs().view(48, 3, 32)
    assert (four <= 0.6 * step[..., None] + 0.01 * groups.abs().amax(-1, keepdim=True)).all()
    with pytest.raises(ValueError, match="no int4 form"):
        of4(weight(48, 40))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_base_with_adapters_is_its_rounded_weights_with_them(kind: str) -> None:
    model = FAMILIES["llama3"](hidden_size=64, intermediate_size=96, tie_word_embeddings=True).bfloat16()
    adapters = {"a": trained(model, 1), "b": trained(model, 2, dora=True)}
    runner = Runner(base_of(model), cache_bytes=1 << 20, weights=kind)  # type: ignore[arg-type]
    assert all(w.is_meta for n, w in model.named_parameters() if n.endswith("_proj.weight"))
    twin = FAMILIES["llama3"](hidden_size=64, intermediate_size=96, tie_word_embeddings=False).bfloat16()
    twin.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data
    own = dict(twin.named_modules())
    own["model.norm"].weight.data = model.model.norm.weight.data
    for i, layer in enumerate(model.model.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(twin.model.layers[i], name).weight.data = getattr(layer, name).weight.data
    for group in runner.layout.groups:
        for i, name in enumerate(group.modules):
            own[name].weight.data = group.weight(i).clone()
    dense = Runner(base_of(twin), cache_bytes=1 << 20)
    mixes: list[list[tuple[str, float]]] = [[], [("a", 1.0)], [("a", 0.5), ("b", 1.0)]]
    ids = prompts([20, 33, 17])
    out = []
    for each in (runner, dense):
        ready = {name: each.prepare(a, name) for name, a in adapters.items()}
        work = [(p, [(ready[n], s) for n, s in mix]) for p, mix in zip(ids, mixes, strict=True)]
        out.append(serve(each, work, [7, 16]))
        each.close()
    for g, w in zip(*out, strict=True):
        assert (g.double() - w.double()).norm() <= 0.04 * w.double().norm()


def test_what_a_quantised_base_cannot_serve_is_said() -> None:
    from veneer.core.adapter import Adapter

    model = FAMILIES["llama3"](hidden_size=64, intermediate_size=96).bfloat16()
    norms = Adapter(modules={"model.norm": {"weight": model.model.norm.weight.detach().clone()}})
    runner = Runner(base_of(model), cache_bytes=1 << 20, weights="int8")
    assert runner.problems(norms) == ["model.norm: a full copy, which a base in int8 cannot have"]
    with pytest.raises(ConfigError, match="runs packed"):
        Runner(base_of(FAMILIES["gemma3"]().bfloat16()), cache_bytes=1 << 20, weights="int8")
    with pytest.raises(ConfigError, match="float32"):
        Runner(base_of(FAMILIES["llama3"]()), cache_bytes=1 << 20, weights="int8")
