"""Low-rank products of rows with mixes of their own, by the kernels, against W + ΔW in float64."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.families import FAMILIES
from tests.ops.cuda.laws import DTYPES, FEW, SEEDS, close
from tests.serve.forward import test_lowrank, test_runner
from veneer.core.adapter import Adapter, Pair
from veneer.ops.cuda import mixed_rows
from veneer.ops.cuda.launch import recorded
from veneer.ops.dispatch import dispatch
from veneer.serve.forward.lowrank import BaseLayout, Group, PackedAdapter, Segments, pack_adapter
from veneer.serve.forward.runner import Runner

Mix = list[tuple[PackedAdapter, float]]


def base(seed: int, inputs: int, sizes: tuple[int, ...], dtype: torch.dtype) -> BaseLayout:
    g = torch.Generator().manual_seed(seed)
    weights = [(torch.randn(n, inputs, generator=g) * 0.1).to(dtype) for n in sizes]
    biases = tuple(None if i % 2 else torch.randn(n, generator=g).to(dtype) for i, n in enumerate(sizes))
    group = Group(tuple("abc"[: len(sizes)]), sizes, biases, weights.__getitem__)
    return BaseLayout((group,), "embed", dtype, torch.device("cpu"))


def adapter(seed: int, layout: BaseLayout, inputs: int, ranks: list[int], dora: bool) -> PackedAdapter:
    """Ranks 0: no pair there."""
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, n, rank in zip(layout.groups[0].modules, layout.groups[0].sizes, ranks, strict=False):
        if rank:
            A, B = (torch.randn(s, generator=g) * 0.1 for s in ((rank, inputs), (n, rank)))
            pairs[name] = Pair(A, B, 1.5, magnitude=torch.rand(n, generator=g) + 0.5 if dora else None)
    return pack_adapter(Adapter(pairs=pairs), layout, key=str(seed))


@FEW
@given(
    DTYPES,
    st.sampled_from([(24,), (24, 33), (128, 16, 48)]),
    st.sampled_from([16, 70, 1100]),
    st.lists(st.tuples(st.lists(st.integers(0, 70), min_size=3, max_size=3), st.booleans()), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 20), st.lists(st.integers(0, 2), max_size=3)), min_size=1, max_size=4),
    SEEDS,
    st.booleans(),
)
def test_every_row_has_its_own_mix(
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    inputs: int,
    kinds: list[tuple[list[int], bool]],
    runs: list[tuple[int, list[int]]],
    seed: int,
    onto: bool,
) -> None:
    """`runs`: so many rows under adapters by number, none among them; ranks from 0 on, adapters that have nothing."""
    layout = base(seed, inputs, sizes, dtype)
    adapters = [adapter(i, layout, inputs, ranks, dora) for i, (ranks, dora) in enumerate(kinds)]
    spans: list[tuple[int, int, Mix]] = []
    at = 0
    for count, own in runs:
        mix = [(adapters[n % len(adapters)], 0.5 + n) for n in sorted(set(own))]
        spans.append((at, at := at + count, mix))
    x = (torch.randn(at, inputs, generator=torch.Generator().manual_seed(seed + 1))).to(dtype)
    y = test_lowrank.base_output(layout, x)
    segments = Segments.of(layout, [s for s in spans if s[2]])
    before = y.clone()
    residual = (
        torch.zeros_like(y) if not onto else torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    )
    got = residual + y if onto else y
    if segments is None or not at:
        return
    assert dispatch("mixed_rows", x, y) is mixed_rows.mixed_rows
    segments.add(0, x, got, before if onto else None)
    want = torch.cat([exact(layout, mix, x[a:b], inputs) for a, b, mix in spans]) + residual.double()
    close(got, want, dtype, 3.0)


def exact(layout: BaseLayout, mix: Mix, x: Tensor, inputs: int) -> Tensor:
    own, test_lowrank.INPUTS = test_lowrank.INPUTS, inputs
    try:
        return test_lowrank.exact(layout, mix, x)
    finally:
        test_lowrank.INPUTS = own


def test_a_rows_bits_do_not_depend_on_its_batch_where_the_layout_asks_for_it() -> None:
    from dataclasses import replace

    layout = replace(base(0, 1100, (24, 33), torch.bfloat16), rows=8)
    a, b = adapter(1, layout, 1100, [5, 9, 0], False), adapter(2, layout, 1100, [20, 0, 0], True)
    x = torch.randn(40, 1100, generator=torch.Generator().manual_seed(3)).bfloat16()
    y = test_lowrank.base_output(layout, x)
    spans = [(0, 33, [(a, 1.0), (b, 0.5)]), (33, 40, [(b, -1.0)])]
    segments = Segments.of(layout, spans)
    assert segments is not None
    together = y.clone()
    segments.add(0, x, together)
    for first, end in ((0, 1), (7, 20), (32, 40), (33, 34)):
        own = [(max(a_, first) - first, min(b_, end) - first, mix) for a_, b_, mix in spans if a_ < end and b_ > first]
        alone = y[first:end].clone()
        part = Segments.of(layout, own)
        assert part is not None
        part.add(0, x[first:end].contiguous(), alone)
        assert torch.equal(alone, together[first:end])


def test_a_server_s_step_goes_through_them() -> None:
    """Prompts and single tokens, ranks and DoRA mixed, beside core's attachment."""
    model = FAMILIES["qwen3"]()
    adapters = {"a": test_runner.trained(model, 1), "b": test_runner.trained(model, 2, rank=5, dora=True)}
    mixes: list[list[tuple[str, float]]] = [[("a", 0.7), ("b", 0.4)], [("b", 1.0)], []]
    ids = test_runner.prompts([9, 5, 7])
    want = [test_runner.reference(model, adapters, mix, p) for mix, p in zip(mixes, ids, strict=True)]
    runner = Runner(test_runner.base_of(model), cache_bytes=1 << 20)
    ready = {name: runner.prepare(each, name) for name, each in adapters.items()}
    work = [(p, [(ready[n], s) for n, s in mix]) for p, mix in zip(ids, mixes, strict=True)]
    with recorded() as launches:
        got = test_runner.serve(runner, work, [7, 1])
    runner.close()
    assert {"shrink", "expand", "paged_attention", "turn_and_store"} <= {each.name for each in launches}
    for g, w in zip(got, want, strict=True):
        test_runner.same(g, w)
