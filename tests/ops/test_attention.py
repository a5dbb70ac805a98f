"""Row attention against torch's own, row by row, in float64; and that no row ever sees another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from veneer.ops.attention import RowLayout, _sdpa, attention, rotary_attention, rotate
from veneer.ops.sizes import ATTENTION_BLOCK as BLOCK

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
    out = rotary_attention(x, cos, sin, kv, RowLayout(lengths), scale, window)
    (dx,) = torch.autograd.grad(out, x, g)
    xd = x.detach().double().requires_grad_()
    q, k, v = xd.split([heads, kv, kv], 1)
    cd, sd = cos.double(), sin.double()
    wanted = reference(rotate(q, cd, sd), rotate(k, cd, sd), v, lengths, scale, window)
    (dxd,) = torch.autograd.grad(wanted, xd, g.double())
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
def test_any_rows_heads_and_windows(lengths: list[int], heads: tuple[int, int], dim: int, window: int | None) -> None:
    check(torch.float32, lengths, *heads, dim, window)
    # two dimensions make scores whose rounding alone moves a softmax by several percent
    check(torch.bfloat16, lengths, *heads, dim, window, slack=5.0)


def test_no_row_sees_another_and_no_token_a_later_one() -> None:
    """The Jacobian is zero outside each row's lower triangle: exactly, not nearly."""
    lengths, n = [4, 3, 6], 13
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 1, 4, generator=gen) for _ in range(3))

    def outputs(value: Tensor) -> Tensor:
        return attention(q, k, value, RowLayout(lengths), 0.5)[:, 0, 0]

    jacobian = torch.stack(
        [torch.autograd.grad(outputs(w := v.clone().requires_grad_())[i], w)[0][:, 0, 0] for i in range(n)]
    )
    row = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    allowed = (row[:, None] == row[None]) & torch.ones(n, n, dtype=torch.bool).tril()
    assert (jacobian[~allowed] == 0).all()
    assert (jacobian[allowed] != 0).all()


def test_every_token_has_one_place() -> None:
    layout = RowLayout([5, 1, 9, 8, 2, 9])
    tokens = torch.cat([g.tokens for g in layout.groups])
    assert sorted(tokens.tolist()) == list(range(34))
    assert all(len(set(g.slots.tolist())) == len(g.slots) for g in layout.groups)
    assert layout.positions.tolist() == [p for n in (5, 1, 9, 8, 2, 9) for p in range(n)]
    padded = sum(g.rows * g.length for g in layout.groups)
    assert padded <= 34 / 0.75


@pytest.mark.parametrize("window", [None, 4, 500])
def test_what_runs_on_a_gpu_is_the_same_attention(window: int | None) -> None:
    """The path through torch's fused attention, which picks its own kernel on each device, here on the CPU."""
    lengths, gen = [5, 9, 40, 41, 9], torch.Generator().manual_seed(0)
    qkv = torch.randn(104, 6 + 4, 8, dtype=torch.float64, generator=gen, requires_grad=True)
    out = _sdpa(qkv, 2, RowLayout(lengths), 0.3, window)
    wanted = reference(*qkv.split([6, 2, 2], 1), lengths, 0.3, window)
    torch.testing.assert_close(out, wanted)
    g = torch.randn(104, 6, 8, dtype=torch.float64, generator=gen)
    torch.testing.assert_close(torch.autograd.grad(out, qkv, g), torch.autograd.grad(wanted, qkv, g))
