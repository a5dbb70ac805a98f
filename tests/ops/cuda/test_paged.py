"""Attention over pages and what is put there, by the kernels, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.cuda.laws import DTYPES, FEW, SEEDS, close, drawn
from tests.serve.forward.test_paged import exact
from veneer.ops.cuda import paged
from veneer.ops.sizes import tile_tokens

HEADS = st.sampled_from([(4, 4, 16), (3, 1, 24), (4, 2, 64)])


def attended(
    device: str,
    seed: int,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    rows: list[tuple[int, int]],
    page: int,
    cap: float,
    window: int,
) -> None:
    """`rows`: (tokens before this step, tokens in it) of each sequence."""
    heads, kv, d = sizes
    lengths = [before + now for before, now in rows]
    widest = max(-(-n // page) for n in lengths)
    tables = torch.randperm(widest * len(rows), generator=torch.Generator().manual_seed(seed))
    tables = tables.view(len(rows), widest).to(device)
    K, V = (torch.full((tables.numel() * page, kv, d), torch.nan, dtype=dtype, device=device) for _ in range(2))
    keys, values = (
        [drawn(seed + i, n, kv, d, dtype=dtype, device=device) for i, n in enumerate(lengths, at)] for at in (1, 100)
    )
    for s, n in enumerate(lengths):
        places = (tables[s][:, None] * page + torch.arange(page, device=device)).flatten()[:n]
        K[places], V[places] = keys[s], values[s]
    count = sum(now for _, now in rows)
    q = drawn(seed + 999, count, heads + 2 * kv, d, dtype=dtype, device=device)[:, :heads]
    tokens = tile_tokens(heads, kv, max(now for _, now in rows))
    tiles, want, at = [], [], 0
    for s, (before, now) in enumerate(rows):
        tiles += [(s, at + t, min(tokens, now - t), before + t) for t in range(0, now, tokens)]
        want += [exact(q[at + t], keys[s], values[s], 0.3, cap, window, before + t) for t in range(now)]
        at += now
    got = paged.paged_attention(
        q, K, V, torch.tensor(tiles, device=device), tables, max(lengths), tokens, page, 0.3, cap, window
    )
    close(got, torch.stack(want), dtype, 2.0)


@FEW
@given(
    SEEDS,
    DTYPES,
    HEADS,
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), min_size=1, max_size=3),
    st.sampled_from([4, 16]),
    st.sampled_from([0.0, 5.0]),
    st.sampled_from([0, 7]),
)
def test_attention(
    device: str,
    seed: int,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    rows: list[tuple[int, int]],
    page: int,
    cap: float,
    window: int,
) -> None:
    attended(device, seed, dtype, sizes, rows, page, cap, window)


@pytest.mark.parametrize("window", [0, 100])
def test_many_keys_go_in_parts(device: str, window: int) -> None:
    """Some sequences have no key in a part, and a window leaves out whole ones."""
    attended(device, 5, torch.float32, (4, 2, 16), [(1100, 1), (3, 1), (600, 2)], 16, 0.0, window)


@FEW
@given(SEEDS, DTYPES, HEADS, st.integers(1, 5), st.booleans())
def test_turned_and_stored(
    device: str, seed: int, dtype: torch.dtype, sizes: tuple[int, int, int], n: int, normed: bool
) -> None:
    heads, kv, d = sizes
    qkv = drawn(seed, n, (heads + 2 * kv) * d, dtype=dtype, device=device)
    angles = drawn(seed + 1, 12, d // 2, dtype=torch.float32, device=device)
    weights = [drawn(seed + 2 + i, d, dtype=dtype, device=device) if normed else None for i in range(2)]
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 12, (n,), generator=generator).to(device)
    slots = torch.randperm(16, generator=generator)[:n].to(device)
    K, V = (torch.zeros(16, kv, d, dtype=dtype, device=device) for _ in range(2))
    whole = qkv.double().view(n, -1, d)
    want = []
    for part, weight in ((whole[:, :heads], weights[0]), (whole[:, heads : heads + kv], weights[1])):
        x = part
        if weight is not None:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
        a, b = x.chunk(2, -1)
        c, s = (t.double()[positions][:, None] for t in (angles.cos(), angles.sin()))
        want.append(torch.cat([a * c - b * s, b * c + a * s], -1))
    paged.turn_and_store(qkv, K, V, angles.cos(), angles.sin(), *weights, 1e-6, positions, slots)
    close(qkv.view(n, -1, d)[:, :heads], want[0], dtype)
    close(K[slots], want[1], dtype)
    assert torch.equal(V[slots], whole[:, heads + kv :].to(dtype))
    left = torch.ones(16, dtype=torch.bool, device=device)
    left[slots] = False
    assert not K[left].any()
