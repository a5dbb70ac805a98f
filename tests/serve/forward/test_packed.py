"""Weights as serving multiplies by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.families import FAMILIES
from tests.serve.forward.test_runner import base_of, prompts, serve, trained
from veneer.errors import ConfigError
from veneer.serve.forward.packed import (
    Dense,
    Int4,
    Int4Panels,
    Int8,
    Int8Panels,
    Panels,
    Reordered,
    best_packing,
    pack_weight,
)
from veneer.serve.forward.runner import Runner

CPU = torch.device("cpu")


def weight(rows: int = 48, n: int = 96) -> torch.Tensor:
    return (torch.randn(rows, n, generator=torch.Generator().manual_seed(0)) * 0.1).bfloat16()


@pytest.mark.parametrize("rows", [1, 3, 8, 15, 16, 17, 200])
@pytest.mark.parametrize("kind", [Dense, Panels, Int8Panels, Int4Panels, Reordered, Int8, Int4])
def test_products_are_those_of_the_dense_weight(kind: type, rows: int) -> None:
    if issubclass(kind, Panels) and best_packing(torch.bfloat16, CPU) is not Panels:
        pytest.skip("no kernels for products here")
    if kind is Reordered and best_packing(torch.bfloat16, CPU) is None:
        pytest.skip("this torch packs no weights")
    w = weight()
    matrix = Dense(w) if kind is Dense else kind.of(w)
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


@pytest.mark.skipif(best_packing(torch.bfloat16, CPU) is not Panels, reason="no kernels for products here")
@pytest.mark.parametrize(("out", "n"), [(16, 32), (80, 4224), (208, 2080)])
@pytest.mark.parametrize("kind", [Panels, Int8Panels, Int4Panels])
def test_panels_of_any_size(kind: type[Panels], out: int, n: int) -> None:
    """Last panels that are not full, sums longer than a block, rows in several blocks; each row by itself as well."""
    g = torch.Generator().manual_seed(0)
    w, x, bias = torch.randn(out, n, generator=g), torch.randn(131, n, generator=g), torch.randn(out, generator=g)
    w, x, bias = w.bfloat16(), x.bfloat16(), bias.bfloat16()
    matrix = kind.of(w)
    w = matrix.dense() if isinstance(matrix, Int8Panels | Int4Panels) else w
    want = x.double() @ w.double().t()
    got = matrix(x, bias)
    assert (got.double() - want - bias.double()).abs().max() <= 0.006 * want.abs().max()
    assert all(torch.equal(matrix(x[i : i + k], bias), got[i : i + k]) for i, k in ((0, 1), (1, 2), (5, 3), (60, 71)))
    y = x[:, :1].repeat(1, out)
    before = y.clone()
    matrix.add_onto(y, x, bias)
    assert torch.equal(y, before + got)


def test_weights_without_panels_are_kept_as_they_can_be() -> None:
    with pytest.raises(ValueError, match="no panels"):
        Panels.of(weight(41, 96))
    w, x = weight(41, 96), torch.ones(3, 96).bfloat16()
    assert (pack_weight(w)(x).double() - x.double() @ w.double().t()).abs().max() <= 0.05


@pytest.mark.parametrize(("of8", "of4"), [(Int8, Int4), (Int8Panels, Int4Panels)])
def test_rounding_is_as_fine_as_the_bits_allow(of8: Any, of4: Any) -> None:
    w = weight()
    eight = (of8.of(w).dense().float() - w.float()).abs()
    assert (eight <= 0.55 * w.float().abs().amax(1, keepdim=True) / 127 + 0.005 * w.float().abs()).all()
    groups = w.float().view(48, 3, 32)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    four = (of4.of(w).dense().float() - w.float()).abs().view(48, 3, 32)
    assert (four <= 0.6 * step[..., None] + 0.01 * groups.abs().amax(-1, keepdim=True)).all()
    with pytest.raises(ValueError, match="no int4 form"):
        of4.of(weight(48, 40))


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
