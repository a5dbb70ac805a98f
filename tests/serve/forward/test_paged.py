"""Paged attention equals float64 attention for any block layout, even if blocks contain stale values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from veneer.ops.cpu import compiled
from veneer.serve.forward.paged import BLOCK, PackedRows, Pages, Rotary

NATIVE = compiled.usable("paged_attend") is not None
CASES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, window: int, at: int) -> Tensor:
    """Return the attention of one query, computed in float64.

    q: (heads, d), at position `at`; k, v: (at + 1, kv, d)
    """
    low = max(0, at + 1 - window) if window else 0
    k, v = (t[low : at + 1].double().repeat_interleave(len(q) // t.shape[1], dim=1) for t in (k, v))
    scores = torch.einsum("hd,shd->hs", q.double(), k) * scale
    if cap:
        scores = cap * torch.tanh(scores / cap)
    return torch.einsum("hs,shd->hd", scores.softmax(-1), v)


@pytest.mark.parametrize(("dtype", "tolerance"), CASES, ids=["f32", "bf16"])
@pytest.mark.parametrize(("heads", "kv", "d"), [(3, 1, 16), (9, 3, 64), (4, 4, 32), (32, 1, 16)])
@pytest.mark.parametrize(("cap", "window"), [(0.0, 0), (20.0, 0), (0.0, 7)])
def test_against_float64(dtype, tolerance, heads, kv, d, cap, window):
    generator = torch.Generator().manual_seed(0)
    pages = Pages(2, 20, heads, kv, d, dtype, torch.device("cpu"))
    for t in (pages.K, pages.V):
        t.fill_(float("nan"))  # NaN, as a broken adapter could leave in the cache
    blocks = torch.randperm(20, generator=generator).tolist()
    lengths = [1, 16, 37, 50]
    tables = [blocks[i * 4 : i * 4 + 4] for i in range(4)]
    k, v, q = ([torch.randn(n, h, d, generator=generator).to(dtype) for n in lengths] for h in (kv, kv, heads))
    done = [0, 0, 0, 0]
    outs: list[list[Tensor]] = [[], [], [], []]
    while any(a < n for a, n in zip(done, lengths, strict=True)):
        rows = []
        for s, n in enumerate(lengths):
            if done[s] < n:
                rows.append((s, done[s], min(n, done[s] + [1, 5, 30, 17][s])))
        batch = PackedRows.build([(a, b, tables[s]) for s, a, b in rows], torch.device("cpu"))
        pages.store(1, *(torch.cat([t[s][a:b] for s, a, b in rows]) for t in (k, v)), batch)
        out = pages.attend(1, torch.cat([q[s][a:b].flatten(1) for s, a, b in rows]), batch, 0.3, cap, window)
        for (s, a, b), i in zip(rows, batch.bounds, strict=False):
            outs[s].append(out[i : i + b - a])
            done[s] = b
    for s in range(4):
        got = torch.cat(outs[s]).view(lengths[s], heads, d).double()
        want = torch.stack([exact(q[s][t], k[s], v[s], 0.3, cap, window, t) for t in range(lengths[s])])
        assert (got - want).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_keys_are_stored_as_computed_by_hand(dtype: torch.dtype, normed: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    heads, kv, d, n = 4, 2, 32, 21
    pages, plain = (Pages(1, 4, heads, kv, d, dtype, torch.device("cpu")) for _ in range(2))
    angles = torch.outer(torch.arange(64.0), 0.5 ** torch.arange(d // 2))
    norms = [torch.rand(d, generator=generator).to(dtype) + 0.5 for _ in range(2)] if normed else [None, None]
    rotary = Rotary(angles.cos(), angles.sin(), *norms, eps=1e-6)
    qkv = torch.randn(n, (heads + 2 * kv) * d, generator=generator).to(dtype)
    batch = PackedRows.build([(3, 24, [2, 0])], torch.device("cpu"))
    whole = qkv.double().view(n, -1, d)

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
        a, b = x.chunk(2, -1)
        c, s = (t.double()[3:24, None] for t in (angles.cos(), angles.sin()))
        return torch.cat([a * c - b * s, b * c + a * s], -1)

    q, k = turned(whole[:, :heads], norms[0]), turned(whole[:, heads : heads + kv], norms[1])
    pages.rope_and_cache(0, qkv, rotary, batch)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(qkv.double().view(n, -1, d)[:, :heads], q, rtol=2 * eps, atol=4 * eps)
    plain.store(0, k.to(dtype), whole[:, heads + kv :].to(dtype), batch)
    assert torch.equal(pages.V, plain.V)
    assert torch.allclose(pages.K.double(), plain.K.double(), rtol=2 * eps, atol=4 * eps)


@pytest.mark.skipif(not NATIVE, reason="needs the compiled kernels and AVX512-BF16")
def test_a_tokens_result_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(2)
    heads, kv, d = 9, 3, 64
    pages = Pages(1, 30, heads, kv, d, torch.bfloat16, torch.device("cpu"))
    rows = [(0, n, list(range(i * 5, i * 5 + 5))) for i, n in enumerate((3, 70, 33, 16, 1, 12))]
    batch = PackedRows.build(rows, torch.device("cpu"))
    q, k, v = (torch.randn(sum(n for _, n, _ in rows), h * d, generator=generator).bfloat16() for h in (heads, kv, kv))
    pages.store(0, k.view(-1, kv, d), v.view(-1, kv, d), batch)
    together = pages.attend(0, q, batch, 0.125)
    for (_, n, blocks), at in zip(rows, batch.bounds, strict=False):
        for t in {0, n // 2, n - 1}:  # compute each of these tokens alone
            alone = pages.attend(
                0, q[at + t : at + t + 1], PackedRows.build([(t, t + 1, blocks)], torch.device("cpu")), 0.125
            )
            assert torch.equal(alone[0], together[at + t])
    assert BLOCK == 16
