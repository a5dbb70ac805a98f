"""Low-rank products in a batch of rows with different mixes equal products with W + ΔW in float64.

Each row's result is the same as when the row is computed alone.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair
from veneer.core.merge import delta
from veneer.ops.cpu import compiled
from veneer.ops.dispatch import override_ops
from veneer.serve.forward.lowrank import AdapterBatch, BaseLayout, Group, PackedAdapter, low_rank_problems, pack_adapter

NATIVE = compiled.usable("lora_rows") is not None
INPUTS, COLUMNS = 70, (24, 33, 16)


def layout_of(dtype: torch.dtype, seed: int = 0) -> BaseLayout:
    g = torch.Generator().manual_seed(seed)
    weights = tuple((torch.randn(n, INPUTS, generator=g) * 0.1).to(dtype) for n in COLUMNS)
    biases = (None, torch.randn(COLUMNS[1], generator=g).to(dtype), None)
    group = Group(("a", "b", "c"), COLUMNS, biases, weights.__getitem__)
    return BaseLayout((group,), "embed", dtype, torch.device("cpu"))


def pair(rank: int, n: int, scale: float, seed: int, dora: bool) -> Pair:
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, INPUTS, generator=g) * 0.1, torch.randn(n, rank, generator=g) * 0.1
    return Pair(A, B, scale, magnitude=torch.rand(n, generator=g) + 0.5 if dora else None)


def some_adapters(layout: BaseLayout, dora: bool) -> list[PackedAdapter]:
    made = [
        {"a": pair(4, 24, 2.0, 1, dora), "b": pair(3, 33, 0.5, 2, dora), "c": pair(16, 16, 1.0, 3, False)},
        {"b": pair(1, 33, 3.0, 4, False)},
        {"c": pair(64, 16, 0.25, 5, dora)},
    ]
    return [pack_adapter(Adapter(pairs=p), layout, key=str(i)) for i, p in enumerate(made)]


def exact(layout: BaseLayout, mix: list[tuple[PackedAdapter, float]], x: Tensor) -> Tensor:
    group, out = layout.groups[0], []
    for i, (name, bias) in enumerate(zip(group.modules, group.biases, strict=True)):
        weight = group.weight(i)
        module = torch.nn.Linear(INPUTS, len(weight), bias=False, dtype=torch.float64)
        module.weight.data = weight.double()
        total = module.weight.data.clone()
        for adapter, strength in mix:
            if name in adapter.adapter.pairs:
                p = adapter.adapter.pairs[name]
                m = None if p.magnitude is None else p.magnitude.double()
                total += strength * delta(module, Pair(p.A.double(), p.B.double(), p.scale, magnitude=m))
        y = x.double() @ total.t()
        out.append(y if bias is None else y + bias.double())
    return torch.cat(out, dim=-1)


def base_output(layout: BaseLayout, x: Tensor) -> Tensor:
    group = layout.groups[0]
    return torch.cat([torch.nn.functional.linear(x, group.weight(i), b) for i, b in enumerate(group.biases)], 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1.5e-2)], ids=["f32", "bf16"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("reference", [False, True])
def test_every_row_has_its_own_mix(dtype: torch.dtype, tolerance: float, dora: bool, reference: bool) -> None:
    layout = layout_of(dtype)
    one, two, three = some_adapters(layout, dora)
    spans = [
        (0, 3, []),
        (3, 4, [(one, 1.0)]),
        (4, 9, [(two, -0.5), (one, 0.75)]),
        (9, 10, []),
        (10, 17, [(three, 1.0)]),
        (17, 19, [(one, 1.0), (two, 1.0), (three, 0.3)]),
    ]
    x = torch.randn(19, INPUTS, generator=torch.Generator().manual_seed(9)).to(dtype)
    y = before = base_output(layout, x)
    segments = AdapterBatch.build(layout, spans)
    y = before.clone()
    with override_ops(rows_low_rank="torch") if reference else nullcontext():
        segments.add(0, x, y)
    for first, end, mix in spans:
        want = exact(layout, mix, x[first:end])
        assert (y[first:end].double() - want).abs().max() <= tolerance * want.abs().max()
        if not mix:
            assert torch.equal(y[first:end], before[first:end])


@pytest.mark.skipif(not NATIVE, reason="needs the compiled kernels and AVX512-BF16")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_rows_result_does_not_depend_on_its_batch(threads: int) -> None:
    layout = layout_of(torch.bfloat16)
    adapters = some_adapters(layout, dora=False)
    mixes = [[(adapters[i % 3], 1.0 + i / 8)] if i % 4 else [] for i in range(40)]
    mixes[7] = [(adapters[0], 0.5), (adapters[2], 0.25)]
    x = torch.randn(40, INPUTS, generator=torch.Generator().manual_seed(9)).bfloat16()
    before = base_output(layout, x)
    had = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = before.clone()
        segments = AdapterBatch.build(layout, [(i, i + 1, mix) for i, mix in enumerate(mixes)])
        segments.add(0, x, together)
        for i, mix in enumerate(mixes):
            alone = before[i : i + 1].clone()
            own = AdapterBatch.build(layout, [(0, 1, mix)])
            if own is not None:
                own.add(0, x[i : i + 1].contiguous(), alone)
            assert torch.equal(alone[0], together[i])
    finally:
        torch.set_num_threads(had)


def test_problems_name_kinds_without_low_rank_form() -> None:
    layout = layout_of(torch.float32)
    adapter = Adapter(pairs={"x.y": pair(2, 24, 1.0, 0, False)}, modules={"norm": {"weight": torch.ones(3)}})
    assert low_rank_problems(adapter, layout) == [
        "norm: a full copy",
        "x.y: a pair on a module that is not a projection of this base",
    ]
