"""Laws of attention over rows against the reference in float64, by the ops that run the kernels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cuda.laws import DTYPES, FEW, SEEDS, close, drawn
from veneer.ops.attention import (
    HeadNorms,
    RowLayout,
    joint_attention,
    normed_heads,
    rotary_attention,
    rotate,
    row_attention,
    scored_attention_reference,
)
from veneer.ops.cuda import attention
from veneer.ops.dispatch import dispatch

LENGTHS = st.sampled_from([[1], [5, 1, 9], [70], [64, 3], [33, 66]])
WINDOWS = st.sampled_from([None, 1, 7, 40, 200])
HEADS = st.sampled_from([(1, 1), (2, 1), (4, 2)])


def gradients(y: Tensor, given: list[Tensor], g: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(y, given, g))


@FEW
@given(
    DTYPES, LENGTHS, HEADS, st.sampled_from([8, 16, 40, 64]), WINDOWS, st.sampled_from([0.0, 2.0]), st.booleans(),
    st.sampled_from([0, 3]), SEEDS,
)  # fmt: skip
def test_rows(
    device: str,
    dtype: torch.dtype,
    lengths: list[int],
    counts: tuple[int, int],
    dim: int,
    window: int | None,
    cap: float,
    sunk: bool,
    idle: int,
    seed: int,
) -> None:
    (heads, kv), n = counts, sum(lengths) + idle
    q, g = (
        drawn(seed, n, heads, dim, dtype=dtype, device=device),
        drawn(seed + 1, n, heads, dim, dtype=dtype, device=device),
    )
    k, v = drawn(seed + 2, 2, n, kv, dim, dtype=dtype, device=device)
    sinks = drawn(seed + 3, heads, dtype=torch.float32, device=device) if sunk else None
    layout = RowLayout(lengths, device, idle=idle)
    given = [t.requires_grad_() for t in (q, k, v, sinks) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in given]
    assert dispatch("attend_rows", q, k, v, sinks) is not None
    got = row_attention(q, k, v, layout, dim**-0.5, window, cap, sinks)
    want = scored_attention_reference(
        wide[0], wide[1], wide[2], layout, dim**-0.5, window, cap, wide[3] if sunk else None
    )
    close(got, want, dtype)
    for a, b in zip(gradients(got, given, g), gradients(want, wide, g.double()), strict=True):
        assert a.shape == b.shape
        # relative to all gradients: of a row of one token those of q and k are zero but for rounding
        assert (a.double() - b).norm() <= 3e-2 * g.double().norm() if dtype != torch.float32 else True
        if dtype == torch.float32:
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-5)


@settings(max_examples=5)
@given(DTYPES, LENGTHS, HEADS, st.sampled_from([8, 16, 40, 64]), WINDOWS, SEEDS)
def test_rotary_rows(
    device: str,
    dtype: torch.dtype,
    lengths: list[int],
    counts: tuple[int, int],
    dim: int,
    window: int | None,
    seed: int,
) -> None:
    (heads, kv), n = counts, sum(lengths)
    qkv, g = (
        drawn(seed, n, heads + 2 * kv, dim, dtype=dtype, device=device),
        drawn(seed + 1, n, heads, dim, dtype=dtype, device=device),
    )
    angles = drawn(seed + 2, n, dim // 2, dtype=torch.float32, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    layout = RowLayout(lengths, device)
    qkv.requires_grad_()
    got = rotary_attention(qkv, cos, sin, kv, layout, dim**-0.5, window)
    wide = qkv.detach().double().requires_grad_()
    q, k, v = wide.split([heads, kv, kv], dim=1)
    turned = [rotate(t, cos.double(), sin.double()) for t in (q, k)]
    want = scored_attention_reference(*turned, v, layout, dim**-0.5, window, 0.0, None)
    close(got, want, dtype, 2)
    close(gradients(got, [qkv], g)[0], gradients(want, [wide], g.double())[0], dtype, 3)


@settings(max_examples=5)
@given(DTYPES, st.booleans(), st.sampled_from([[1], [5, 1, 9]]), HEADS, st.sampled_from([8, 40, 64]), WINDOWS, SEEDS)
def test_rotary_rows_of_normed_heads(
    device: str,
    dtype: torch.dtype,
    wide_weight: bool,
    lengths: list[int],
    counts: tuple[int, int],
    dim: int,
    window: int | None,
    seed: int,
) -> None:
    """Heads of 40 values do not fill a block; weights may have more bits than what they norm."""
    (heads, kv), n = counts, sum(lengths)
    qkv = drawn(seed, n, heads + 2 * kv, dim, dtype=dtype, device=device)
    g = drawn(seed + 1, n, heads, dim, dtype=dtype, device=device)
    angles = drawn(seed + 2, n, dim // 2, dtype=torch.float32, device=device)
    weight = 1 + drawn(seed + 3, 2, dim, dtype=torch.float32 if wide_weight else dtype, device=device, scale=0.3)
    cos, sin, layout = angles.cos().to(dtype), angles.sin().to(dtype), RowLayout(lengths, device)
    qkv.requires_grad_()
    got = rotary_attention(qkv, cos, sin, kv, layout, dim**-0.5, window, HeadNorms(weight, 1e-3))
    wide = qkv.detach().double().requires_grad_()
    *both, v = wide.split([heads, kv, kv], dim=1)
    normed = [F.rms_norm(t, (dim,), w.double(), 1e-3) for t, w in zip(both, weight, strict=True)]
    turned = [rotate(t, cos.double(), sin.double()) for t in normed]
    want = scored_attention_reference(*turned, v, layout, dim**-0.5, window, 0.0, None)
    close(got, want, dtype, 2)
    close(gradients(got, [qkv], g)[0], gradients(want, [wide], g.double())[0], dtype, 3)


def test_many_heads_take_several_programs_a_token() -> None:
    """33 heads of 128 in blocks of 16: each is normed by its own kind's weight, and its gradient has its own place,
    also where tokens do not lie one after another."""
    heads, kv, dim, n = 30, 3, 128, 2
    qkv = drawn(0, n, 1 + heads + 2 * kv, dim, dtype=torch.float32)[:, 1:].requires_grad_()
    angles, norms = drawn(1, n, dim // 2, dtype=torch.float32), HeadNorms(drawn(2, 2, dim, dtype=torch.float32), 1e-6)
    run = dispatch("split_turned", qkv, angles, angles)
    got = run(qkv, angles.cos(), angles.sin(), kv, norms)
    q, k, v = normed_heads(qkv, kv, norms).split([heads, kv, kv], dim=1)
    want = [*(rotate(t, angles.cos(), angles.sin()) for t in (q, k)), v]
    g = [drawn(3 + i, *t.shape, dtype=torch.float32) for i, t in enumerate(want)]
    for a, b in zip(
        [*got, *torch.autograd.grad(got, qkv, g)], [*want, *torch.autograd.grad(want, qkv, g)], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def exactly_joint(qkv: Tensor, weight: Tensor | None, turn: Tensor | None) -> Tensor:
    """`joint_attention` in float64."""
    *both, v = qkv.double().unbind(2)
    for i, x in enumerate(both):
        if weight is not None:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight[i].double().transpose(1, 2)
        if turn is not None:
            pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            x = torch.view_as_real(pairs * turn.to(torch.complex128)[:, None]).flatten(-2)
        both[i] = x
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (*both, v)))
    return out.transpose(1, 2).flatten(2)


@FEW
@given(
    DTYPES, st.integers(1, 2), st.sampled_from([1, 5, 9]), st.sampled_from([1, 3, 24]), st.sampled_from([8, 40, 128]),
    st.sampled_from([("none", True), ("one", False), ("one", True), ("by token", True)]), SEEDS,
)  # fmt: skip
def test_joint_attention(
    device: str, dtype: torch.dtype, n: int, S: int, heads: int, d: int, how: tuple[str, bool], seed: int
) -> None:
    """With the norms and positions of FLUX, and with either; weights by token are those of two streams."""
    norms, turned = how
    qkv, g = (
        drawn(seed, n, S, 3, heads, d, dtype=dtype, device=device),
        drawn(seed + 1, n, S, heads * d, dtype=dtype, device=device),
    )
    shape = 2, 1, 1, S if norms == "by token" else 1, d
    weight = None if norms == "none" else 1 + drawn(seed + 2, *shape, dtype=torch.float32, device=device, scale=0.3)
    angles = drawn(seed + 3, S, d // 2, dtype=torch.float32, device=device)
    turn = torch.polar(torch.ones_like(angles), angles) if turned else None
    assert dispatch("joint_heads", qkv, weight, turn) is not None
    qkv.requires_grad_()
    got = joint_attention(qkv, weight, 1e-3, turn)
    wide = qkv.detach().double().requires_grad_()
    want = exactly_joint(wide, weight, turn)
    close(got, want, dtype, 2)
    given, expected = gradients(got, [qkv], g)[0], gradients(want, [wide], g.double())[0]
    close(given, expected, dtype, 3 + 10 * (S == 1))


def test_a_row_sees_no_other() -> None:
    """A change in one row changes no bit of another's output or gradient."""
    layout, dim = RowLayout([70, 30]), 16
    q, k, v, g = drawn(0, 4, 100, 2, dim, dtype=torch.float32)

    def results(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        given = [t.clone().requires_grad_() for t in (q, k, v)]
        y = row_attention(given[0], given[1], given[2], layout, 0.25, 20, 5.0)
        return [y.detach(), *gradients(y, given, g)]

    before = results(q, k, v)
    q[70:] += 1
    k[70:] *= -3
    v[70:] = 0
    for a, b in zip(before, results(q, k, v), strict=True):
        assert torch.equal(a[:70], b[:70])


@pytest.mark.parametrize("turned", [False, True])
def test_heads_that_lie_apart(turned: bool) -> None:
    """q, k and v as views of what a projection gave, and of what transformers turned."""
    qkv = drawn(5, 40, 4, 16, dtype=torch.float32)
    qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1) if turned else qkv
    q, k, v = qkv.split([2, 1, 1], dim=1)
    layout = RowLayout([25, 15])
    want = scored_attention_reference(q, k, v, layout, 0.25, None, 0.0, None)
    torch.testing.assert_close(row_attention(q, k, v, layout, 0.25), want)


def test_a_grid_has_few_programs_on_its_second_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's first axis ends at 2³¹ − 1, the others at 65,535."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(attention, "run_kernel", lambda kernel, grid, *_, **__: grids.append(grid))
    lengths, heads = [3] * 1024, 64
    q = torch.zeros(sum(lengths), heads, 8, requires_grad=True)
    row_attention(q, q, q, RowLayout(lengths), 1.0, None, 2.0).sum().backward()
    assert grids == [(1024 * heads, 1)] * 3
