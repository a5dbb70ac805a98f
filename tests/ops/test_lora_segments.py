"""Low-rank products of several adapters, each on its own rows."""

from __future__ import annotations

import pytest
import torch

from veneer.ops.linear import LinearMap, join_maps, linear
from veneer.ops.lora_segments import LoraSegments
from veneer.ops.lowrank import LowRank

TOKENS, RANKS, DROPS = (5, 3, 7), (2, 4, 3), (0.3, 0.0, 0.5)
INPUTS, OUTPUTS = 6, (4, 5)


def factors(span: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
    A = torch.randn(RANKS[span], INPUTS, dtype=torch.float64, requires_grad=True)
    return A, torch.randn(out, RANKS[span], dtype=torch.float64, requires_grad=True)


def generator(span: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + span)


def test_each_segment_equals_a_separate_run() -> None:
    """Values, gradients and dropout masks equal those of separate runs.

    Two projections are fused, and the second adapter changes only one of them. Padding follows the rows."""
    torch.manual_seed(0)
    weights = [torch.randn(n, INPUTS, dtype=torch.float64) for n in OUTPUTS]
    pairs = [{(span, at): factors(span, n) for at, n in enumerate(OUTPUTS) if span != 1 or at} for span in range(3)]
    x = torch.randn(sum(TOKENS) + 2, INPUTS, dtype=torch.float64, requires_grad=True)
    g = torch.randn(len(x), sum(OUTPUTS), dtype=torch.float64)
    spans = LoraSegments(TOKENS, (1, 1, 1), [generator(span) for span in range(3)], sizes=(len(x), 4))
    maps = []
    for at, weight in enumerate(weights):
        used = [(span, own[span, at]) for span, own in enumerate(pairs) if (span, at) in own]
        products = tuple(LowRank(*pair, 0.5 + span, DROPS[span], span=span) for span, pair in used)
        maps.append(LinearMap(weight, None, products, spans=spans))
    leaves = [x, *(t for own in pairs for pair in own.values() for t in pair)]
    y = linear(x, join_maps(maps))
    found = torch.autograd.grad(y, leaves, g)

    expected, rows = [], []
    first = 0
    for span, n in enumerate(TOKENS):
        torch.set_rng_state(generator(span).get_state())
        own_maps = []
        for at, w in enumerate(weights):
            used = [pair for (_, own), pair in pairs[span].items() if own == at]
            products = tuple(LowRank(*pair, 0.5 + span, DROPS[span]) for pair in used)
            own_maps.append(LinearMap(w, None, products))
        own_x = x[first : first + n].detach().requires_grad_()
        own_y = linear(own_x, join_maps(own_maps))
        own_leaves = [own_x, *(t for pair in pairs[span].values() for t in pair)]
        grads = torch.autograd.grad(own_y, own_leaves, g[first : first + n])
        rows.append((own_y, grads[0]))
        expected += grads[1:]
        first += n
    plain = x[first:] @ torch.cat(weights).t()
    torch.testing.assert_close(y, torch.cat([*(own for own, _ in rows), plain]))
    torch.testing.assert_close(found[0], torch.cat([*(dx for _, dx in rows), g[first:] @ torch.cat(weights)]))
    torch.testing.assert_close(list(found[1:]), expected)


def test_non_finite_values_stay_in_their_rows() -> None:
    """NaN in one adapter's rows does not reach the other adapter's rows."""
    torch.manual_seed(0)
    pairs = [factors(span, 4) for span in range(2)]
    spans = LoraSegments((3, 3), (1, 1), [generator(0), generator(1)], sizes=(6, 2))
    x = torch.randn(6, INPUTS, dtype=torch.float64)
    x[:3] = torch.tensor(float("nan"))
    x.requires_grad_()
    products = tuple(LowRank(*pair, span=span) for span, pair in enumerate(pairs))
    y = linear(x, LinearMap(torch.randn(4, INPUTS, dtype=torch.float64), None, products, spans=spans))
    dx, *found = torch.autograd.grad(y.sum(), [x, *pairs[0], *pairs[1]])
    assert all(t.isfinite().all() for t in (y[3:], dx[3:], *found[2:]))
    assert not any(t.isfinite().all() for t in (y[:3], *found[:2]))


def test_wrong_number_of_rows_is_refused() -> None:
    spans = LoraSegments((3, 2), (1, 1), [generator(0), generator(1)], sizes=(5, 2))
    assert spans.bounds(5) == [slice(0, 3), slice(3, 5)]
    assert spans.bounds(2) == [slice(0, 1), slice(1, 2)]
    with pytest.raises(ValueError, match="4 rows in a product"):
        spans.bounds(4)
