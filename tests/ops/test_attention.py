"""Varlen and joint attention, compared with torch's attention in float64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from veneer.ops import attention
from veneer.ops.attention import (
    HeadNorms,
    RowLayout,
    VarlenSettings,
    cross_attention,
    joint_attention,
    joint_attention_reference,
    rope_varlen_attention,
    rotate,
    varlen_attention,
)
from veneer.ops.dispatch import dispatch, override_ops

BLOCK = 64
"""A row length close to the sizes of the tiles."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float, window: int | None) -> Tensor:
    out = []
    per = q.shape[1] // k.shape[1]
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        n = len(a)
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        if window is not None:
            seen &= torch.ones(n, n, dtype=torch.bool).triu(1 - window)
        heads = (a, b.repeat_interleave(per, 1), c.repeat_interleave(per, 1))
        o = F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in heads), attn_mask=seen, scale=scale)
        out.append(o.transpose(0, 1))
    return torch.cat(out)


@pytest.mark.parametrize("name", ["torch", "tiles", "tiles32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_tokens_have_no_effect_or_output(name: str, dtype: torch.dtype) -> None:
    lengths, idle, gen = [5, 3], 4, torch.Generator().manual_seed(0)
    n = sum(lengths) + idle
    x, cos, sin, g = (torch.randn(n, *shape, generator=gen).to(dtype) for shape in ((4, 16), (8,), (8,), (2, 16)))
    plain, padded = (x[:-idle].clone().requires_grad_(), x.clone().requires_grad_())
    with override_ops(rope_varlen_attention=name):
        out = rope_varlen_attention(plain, cos[:-idle], sin[:-idle], 1, VarlenSettings(RowLayout(lengths), 0.5))
        more = rope_varlen_attention(padded, cos, sin, 1, VarlenSettings(RowLayout(lengths, idle=idle), 0.5))
    out.backward(g[:-idle])
    more.backward(g)
    for short, long in ((out, more), (plain.grad, padded.grad)):
        torch.testing.assert_close(long[:-idle], short)
        assert not long[-idle:].any()


def check(
    dtype: torch.dtype, lengths: list[int], heads: int, kv: int, dim: int, window: int | None, slack: float = 1.0
) -> None:
    n = sum(lengths)
    gen = torch.Generator().manual_seed(n)
    x, cos, sin, g = (
        torch.randn(*shape, dtype=torch.float64, generator=gen).to(dtype)
        for shape in ((n, heads + 2 * kv, dim), (n, dim // 2), (n, dim // 2), (n, heads, dim))
    )
    x.requires_grad_()
    scale = dim**-0.5
    made = []
    for name in ("torch", "tiles", "tiles32"):
        with override_ops(rope_varlen_attention=name):
            out = rope_varlen_attention(x, cos, sin, kv, VarlenSettings(RowLayout(lengths), scale, window))
            made.append((out, *torch.autograd.grad(out, x, g)))
    xd = x.detach().double().requires_grad_()
    q, k, v = xd.split([heads, kv, kv], 1)
    cd, sd = cos.double(), sin.double()
    wanted = reference(rotate(q, cd, sd), rotate(k, cd, sd), v, lengths, scale, window)
    (dxd,) = torch.autograd.grad(wanted, xd, g.double())
    for out, dx in made:
        for a, b in ((out, wanted), (dx, dxd)):
            assert (a.double() - b).norm() <= slack * TOLERANCE[dtype] * b.norm()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("window", [None, 1, 4, BLOCK + 22])
@pytest.mark.parametrize("lengths", [[1], [7, 7], [BLOCK, BLOCK], [3, BLOCK * 2 + 44, 40, 299, 260, 39]], ids=str)
def test_rows_attend_to_themselves(dtype: torch.dtype, lengths: list[int], window: int | None) -> None:
    check(dtype, lengths, heads=6, kv=2, dim=16, window=window)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 3), (3, 3)]),
    dim=st.sampled_from([2, 8, 34]),
    window=st.none() | st.integers(1, 50),
)
def test_attention_of_random_rows_heads_and_windows(
    lengths: list[int], heads: tuple[int, int], dim: int, window: int | None
) -> None:
    check(torch.float32, lengths, *heads, dim, window)
    # with a head dimension of 2, rounding the scores alone changes a softmax by several percent
    check(torch.bfloat16, lengths, *heads, dim, window, slack=5.0)


def test_attention_is_causal_and_separate_per_row() -> None:
    """The Jacobian is exactly zero outside each row's lower triangle."""
    lengths, n = [4, 3, 6], 13
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 1, 4, generator=gen) for _ in range(3))

    def outputs(value: Tensor) -> Tensor:
        return varlen_attention(q, k, value, VarlenSettings(RowLayout(lengths), 0.5))[:, 0, 0]

    jacobian = torch.stack(
        [torch.autograd.grad(outputs(w := v.clone().requires_grad_())[i], w)[0][:, 0, 0] for i in range(n)]
    )
    row = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    allowed = (row[:, None] == row[None]) & torch.ones(n, n, dtype=torch.bool).tril()
    assert (jacobian[~allowed] == 0).all()
    assert (jacobian[allowed] != 0).all()


@pytest.mark.parametrize("name", ["tiles", "tiles32"])
def test_large_scores_and_non_finite_values(name: str) -> None:
    """A dominant key gets all the weight, wherever it is in the row.

    NaN and infinity reach exactly the tokens that attend to them."""
    q, k = torch.full((300, 1, 16), 8.0).bfloat16(), torch.full((300, 1, 16), -8.0).bfloat16()
    v = torch.arange(300.0).bfloat16()[:, None, None].expand(300, 1, 16).contiguous()
    with override_ops(rope_varlen_attention=name):
        for high in (0, 70, 299):
            keys = k.clone()
            keys[high] = 8.0
            out = varlen_attention(q, keys, v, VarlenSettings(RowLayout([300]), 1.0))
            assert torch.equal(out[high:], v[high].expand(300 - high, 1, 16))
        for bad in (float("nan"), float("inf")):
            keys = k.clone()
            keys[100, 0, 3] = bad
            out = varlen_attention(q, keys, v, VarlenSettings(RowLayout([300]), 1.0))
            assert out[:100].isfinite().all()
            assert not out[100:].isfinite().any()


def test_without_onednn_rows_use_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without oneDNN, libtorch has no small bfloat16 products."""
    qkv = torch.randn(40, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = qkv.split([2, 1, 1], 1)
    want = varlen_attention(q, k, v, VarlenSettings(RowLayout([40]), 0.25))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with override_ops(rope_varlen_attention="tiles"):
        got = varlen_attention(q, k, v, VarlenSettings(RowLayout([40]), 0.25))
    assert (got.double() - want.double()).norm() <= 1e-2 * want.double().norm()


def one_and_three_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            yield threads
    finally:
        torch.set_num_threads(before)


def test_rows_in_tiles_do_not_depend_on_threads() -> None:
    gen = torch.Generator().manual_seed(0)
    qkv = torch.randn(1201, 4, 16, generator=gen).bfloat16().requires_grad_()
    cos, sin = torch.randn(2, 1201, 8, generator=gen).bfloat16()
    made = []
    for _ in one_and_three_threads():
        with override_ops(rope_varlen_attention="tiles"):
            out = rope_varlen_attention(qkv, cos, sin, 1, VarlenSettings(RowLayout([1201]), 0.25))
            made.append((out.detach(), *torch.autograd.grad(out, qkv, torch.ones_like(out))))
    if dispatch("rope_varlen_attention", qkv, cos, sin) is not None:
        assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
def test_head_norms_before_rope_match_reference(dtype: torch.dtype) -> None:
    lengths, heads, kv, dim, gen = [5, 70], 4, 2, 16, torch.Generator().manual_seed(0)
    shapes = (75, heads + 2 * kv, dim), (75, dim // 2), (75, heads, dim), (2, dim)
    x, angles, g, weight = (torch.randn(*shape, dtype=torch.float64, generator=gen) for shape in shapes)
    cos, sin, weight = angles.cos().to(dtype), angles.sin().to(dtype), (1 + weight / 3).to(dtype)
    x = x.to(dtype).requires_grad_()
    out = rope_varlen_attention(x, cos, sin, kv, VarlenSettings(RowLayout(lengths), 0.25, 30), HeadNorms(weight, 1e-3))
    xd = x.detach().double().requires_grad_()
    *both, v = xd.split([heads, kv, kv], 1)
    normed = [F.rms_norm(t, (dim,), w.double(), 1e-3) for t, w in zip(both, weight, strict=True)]
    wanted = reference(*(rotate(t, cos.double(), sin.double()) for t in normed), v, lengths, 0.25, 30)
    pairs = (out, wanted), (*torch.autograd.grad(out, x, g.to(dtype)), *torch.autograd.grad(wanted, xd, g))
    assert all((a.double() - b).norm() <= TOLERANCE[dtype] * b.norm() for a, b in pairs)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_caps_and_sinks_match_transformers(family: str, window: int | None) -> None:
    """Values and gradients equal those of transformers' eager attention per row."""
    eager = importlib.import_module(f"transformers.models.{family}.modeling_{family}").eager_attention_forward
    heads, kv, dim, lengths, gen = 4, 2, 8, [5, 9, 1], torch.Generator().manual_seed(0)
    shapes = (15, heads, dim), (15, kv, dim), (15, kv, dim), (heads,), (15, heads, dim)
    q, k, v, sinks, g = (torch.randn(*shape, dtype=torch.float64, generator=gen) for shape in shapes)
    cap = {"gemma2": 2.0, "gpt_oss": 0.0}[family]
    given = [t.requires_grad_() for t in (q, k, v, *([] if cap else [sinks]))]
    module = SimpleNamespace(num_key_value_groups=heads // kv, head_dim=dim, training=False, sinks=sinks)
    out = []
    for rows in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        n = len(rows[0])
        seen = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - (window or n))
        added = torch.zeros(n, n, dtype=torch.float64).masked_fill(~seen, -torch.inf)
        padded = (t.transpose(0, 1)[None] for t in rows)
        out.append(eager(module, *padded, added, scaling=0.5, softcap=cap or None)[0][0])
    wanted = torch.cat(out)
    got = varlen_attention(q, k, v, VarlenSettings(RowLayout(lengths), 0.5, window, cap, None if cap else sinks))
    pairs = [(got, wanted)]
    pairs += zip(torch.autograd.grad(got, given, g), torch.autograd.grad(wanted, given, g), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # Gemma computes the softmax in float32


# -- denoisers ---------------------------------------------------------------------------------------------------------


def near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool((got - want).double().norm() <= tolerance * want.double().norm())


def assert_joint(qkv: Tensor, weight: Tensor | None, turn: Tensor | None, out: Tensor, tolerance: float) -> None:
    """Assert that values and gradients equal those of the reference."""
    results = []
    for function in (joint_attention, joint_attention_reference):
        x = qkv.clone().requires_grad_(True)
        y = function(x, weight, 1e-6, turn)
        results.append((y.detach(), *torch.autograd.grad(y, x, out)))
    for got, want in zip(*results, strict=True):
        assert got.dtype == qkv.dtype
        assert near(got, want, tolerance)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("norms", ["none", "one", "by token"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_joint_attention(norms: str, rotated: bool, dtype: torch.dtype, tolerance: float) -> None:
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 9, 3, 4, 8, generator=g).to(dtype)
    weight = None if norms == "none" else 1 + torch.randn(2, 1, 1, 9 if norms == "by token" else 1, 8, generator=g) / 3
    turn = torch.polar(torch.ones(9, 4), torch.randn(9, 4, generator=g)) if rotated else None
    assert_joint(qkv, weight, turn, torch.randn(2, 9, 32, generator=g).to(dtype), tolerance)


@pytest.mark.parametrize("chunk", [9 * 9 * 4, 3 * 9 * 9 * 4, 1 << 20])
def test_recomputed_probabilities_give_equal_gradients(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK_BYTES", chunk)
    qkv = torch.randn(2, 9, 3, 4, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    turn = torch.polar(torch.ones(9, 4), torch.linspace(0, 3, 36).view(9, 4))
    out = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(4))
    kept = torch.autograd.grad(joint_attention(qkv, turn=turn), qkv, out)[0]
    monkeypatch.setattr(attention, "KEPT_TOKENS", 0)
    assert near(torch.autograd.grad(joint_attention(qkv, turn=turn), qkv, out)[0], kept, 1e-5)


def test_reference_matches_flux() -> None:
    """q̂ = rope(rms_norm(q)) as in diffusers' FluxAttention, with torch's own norm."""
    from diffusers.models.embeddings import apply_rotary_emb

    g = torch.Generator().manual_seed(1)
    qkv = torch.randn(2, 5, 3, 2, 8, generator=g)
    w, angles = torch.randn(2, 8, generator=g), torch.randn(5, 4, generator=g).repeat_interleave(2, -1)
    q, k = (F.rms_norm(qkv[:, :, i], (8,), w[i], 1e-6) for i in (0, 1))
    q, k = (apply_rotary_emb(t, (angles.cos(), angles.sin()), sequence_dim=1) for t in (q, k))
    v = qkv[:, :, 2]
    want = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    turn = torch.complex(angles[:, ::2].cos(), angles[:, ::2].sin())
    assert near(joint_attention_reference(qkv, w.view(2, 1, 1, 1, 8), 1e-6, turn), want, 1e-5)


@pytest.mark.parametrize("most", [0, 1 << 20])
def test_cross_attention_gradients_match_torch(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEPT_BYTES", most)
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, n, 3, 8, generator=g, requires_grad=True) for n in (6, 4, 4))
    out = torch.randn(2, 6, 24, generator=g)
    got = torch.autograd.grad(cross_attention(q, k, v), (q, k, v), out)
    exactly = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    want = torch.autograd.grad(exactly, (q, k, v), out)
    assert all(near(a, b, 1e-5) for a, b in zip(got, want, strict=True))


def test_large_attention_falls_back_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.randn(1, 6, 3, 2, 8, requires_grad=True)
    through: list[Tensor] = []

    def reference_seen(x: Tensor, *how: Any) -> Tensor:
        through.append(x)
        return joint_attention_reference(x, *how)

    monkeypatch.setattr(attention, "joint_attention_reference", reference_seen)
    joint_attention(qkv)
    assert not through
    monkeypatch.setattr(attention, "CHUNK_BYTES", 6 * 6 * 4 - 1)
    joint_attention(qkv)
    assert len(through) == 1


tiled = pytest.mark.skipif(
    dispatch("attend", torch.empty(1, 16, dtype=torch.bfloat16)) is None,
    reason="no compiler, or no processor with AVX512-BF16",
)


TILES = [
    (1, 1, 1, 1, 16), (2, 16, 20, 3, 40), (1, 47, 63, 2, 32), (1, 48, 64, 3, 6), (1, 49, 65, 2, 64),
    (2, 130, 257, 1, 80), (1, 300, 513, 1, 128),
]  # fmt: skip


@tiled
@pytest.mark.parametrize("together", [False, True], ids=["apart", "in one"])
@pytest.mark.parametrize(("n", "S", "T", "heads", "d"), TILES)
def test_tiles_against_float64(n: int, S: int, T: int, heads: int, d: int, together: bool) -> None:
    """Covers sizes at, below and above the sizes of tiles.

    A tile has 48 queries and 256 keys, in panels of 64 and steps of 4 and 16. `together`: k and v are views
    of one tensor. The tolerance is the accuracy of torch's own attention."""
    g = torch.Generator().manual_seed(S)
    q, out_gradient = (torch.randn(n, S, heads, d, generator=g).bfloat16() for _ in range(2))
    k, v = torch.randn(n, T, 2, heads, d, generator=g).bfloat16().unbind(2)
    if not together:
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    exact = [t.double().transpose(1, 2).requires_grad_(True) for t in (q, k, v)]
    scores = exact[0] @ exact[1].mT * d**-0.5
    want = scores.softmax(-1) @ exact[2]
    gradients = torch.autograd.grad(want, exact, out_gradient.double().transpose(1, 2))
    out, lse = dispatch("attend", q, k, v)(q, k, v)
    made = torch.full_like(q, torch.nan), *torch.full((n, T, 2, heads, d), torch.nan).bfloat16().unbind(2)
    dispatch("attend_backward", out_gradient)(out_gradient, out, q, k, v, lse, *made)
    assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    for got, exactly in zip([out.view_as(q), *made], [want, *gradients], strict=True):
        assert near(got, exactly.transpose(1, 2), 6e-3)


@tiled
def test_tiles_handle_scores_of_any_size() -> None:
    """Covers equal scores, and a late dominant key that makes earlier sums vanish."""
    q, k = torch.full((1, 50, 1, 16), 8.0).bfloat16(), torch.full((1, 600, 1, 16), -8.0).bfloat16()
    k[0, 500] = 8.0
    v = torch.arange(600.0).bfloat16()[None, :, None, None].expand(1, 600, 1, 16).contiguous()
    out, _ = dispatch("attend", q, k, v)(q, k, v)
    assert torch.equal(out, v[0, 500].expand_as(out))
    out, _ = dispatch("attend", q, k, v)(q, torch.zeros_like(k), v)
    assert torch.allclose(out.float(), v.float().mean(), rtol=1e-2)


@tiled
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("norms", [False, True])
def test_joint_attention_of_many_tokens_in_tiles(norms: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEPT_TOKENS", 0)
    monkeypatch.setattr(torch, "bmm", None)  # only the implementation without a kernel uses bmm
    monkeypatch.setattr(attention, "CHUNK_BYTES", 0)
    g = torch.Generator().manual_seed(5)
    qkv = torch.randn(rows, 70, 3, 3, 16, generator=g).bfloat16()
    weight = 1 + torch.randn(2, 1, 1, 1, 16, generator=g) / 3 if norms else None
    turn = torch.polar(torch.ones(70, 8), torch.randn(70, 8, generator=g)) if norms else None
    assert_joint(qkv, weight, turn, torch.randn(rows, 70, 48, generator=g).bfloat16(), 1e-2)


@tiled
def test_tiles_do_not_depend_on_the_number_of_threads() -> None:
    g = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 100, 5, 32, generator=g).bfloat16() for _ in range(3))
    assert torch.equal(*(dispatch("attend", q, k, v)(q, k, v)[0] for _ in one_and_three_threads()))
