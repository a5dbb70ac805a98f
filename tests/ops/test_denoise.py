"""Attention of denoisers: values and gradients of the fast function against torch's own operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops import denoise
from veneer.ops.cpu import compiled
from veneer.ops.denoise import attention, joint_attention, joint_attention_reference


def near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool((got - want).double().norm() <= tolerance * want.double().norm())


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("norms", ["none", "one", "by token"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_joint_attention(norms: str, turned: bool, dtype: torch.dtype, tolerance: float) -> None:
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 9, 3, 4, 8, generator=g).to(dtype)
    weight = None if norms == "none" else 1 + torch.randn(2, 1, 1, 9 if norms == "by token" else 1, 8, generator=g) / 3
    turn = torch.polar(torch.ones(9, 4), torch.randn(9, 4, generator=g)) if turned else None
    out_gradient = torch.randn(2, 9, 32, generator=g).to(dtype)
    results = []
    for function in (joint_attention, joint_attention_reference):
        x = qkv.clone().requires_grad_(True)
        y = function(x, weight, 1e-6, turn)
        y.backward(out_gradient)
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        assert near(got, want, tolerance)


@pytest.mark.parametrize("chunk", [9 * 9 * 4, 3 * 9 * 9 * 4, 1 << 20])
def test_probabilities_made_again(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoise, "CHUNK", chunk)
    qkv = torch.randn(2, 9, 3, 4, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    turn = torch.polar(torch.ones(9, 4), torch.linspace(0, 3, 36).view(9, 4))
    out = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(4))
    kept = torch.autograd.grad(joint_attention(qkv, turn=turn), qkv, out)[0]
    monkeypatch.setattr(denoise, "_keeps", lambda *_: False)
    assert near(torch.autograd.grad(joint_attention(qkv, turn=turn), qkv, out)[0], kept, 1e-5)


def test_the_reference_is_what_flux_does() -> None:
    """q̂ = rope(rms_norm(q)) as diffusers' FluxAttention has it, with torch's own norm."""
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
def test_attention_over_other_tokens(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoise, "MOST", most)
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, n, 3, 8, generator=g, requires_grad=True) for n in (6, 4, 4))
    out = torch.randn(2, 6, 24, generator=g)
    got = torch.autograd.grad(attention(q, k, v), (q, k, v), out)
    exactly = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
    want = torch.autograd.grad(exactly, (q, k, v), out)
    assert all(near(a, b, 1e-5) for a, b in zip(got, want, strict=True))


def test_too_many_probabilities_to_keep_go_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = torch.randn(1, 6, 3, 2, 8, requires_grad=True)
    assert type(joint_attention(qkv).grad_fn).__name__ == "_JointBackward"
    monkeypatch.setattr(denoise, "CHUNK", 6 * 6 * 4 - 1)
    assert type(joint_attention(qkv).grad_fn).__name__ != "_JointBackward"


tiled = pytest.mark.skipif(
    compiled.usable_attention(torch.empty(1, 16, dtype=torch.bfloat16)) is None,
    reason="no compiler, or no processor with AVX512-BF16",
)


@tiled
@pytest.mark.parametrize("together", [False, True], ids=["apart", "in one"])
@pytest.mark.parametrize(
    ("n", "S", "T", "heads", "d"),
    [(1, 1, 1, 1, 16), (2, 16, 20, 3, 40), (1, 47, 63, 2, 32), (1, 48, 64, 3, 6), (1, 49, 65, 2, 64),
     (2, 130, 257, 1, 80), (1, 300, 513, 1, 128)],
)  # fmt: skip
def test_tiles_against_float64(n: int, S: int, T: int, heads: int, d: int, together: bool) -> None:
    """Tiles are of 48 queries and 256 keys in panels of 64, all in steps of 4 and 16: at, below and above each. Heads
    may lie apart, or side by side in what one projection made. As near as torch's own."""
    g = torch.Generator().manual_seed(S)
    q, out_gradient = (torch.randn(n, S, heads, d, generator=g).bfloat16() for _ in range(2))
    k, v = torch.randn(n, T, 2, heads, d, generator=g).bfloat16().unbind(2)
    if not together:
        k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v))
    exact = [t.double().transpose(1, 2).requires_grad_(True) for t in (q, k, v)]
    scores = exact[0] @ exact[1].mT * d**-0.5
    want = scores.softmax(-1) @ exact[2]
    gradients = torch.autograd.grad(want, exact, out_gradient.double().transpose(1, 2))
    out, lse, _ = denoise._attend(q, k, v, keep=False)
    assert lse is not None
    made = torch.full_like(q, torch.nan), *torch.full((n, T, 2, heads, d), torch.nan).bfloat16().unbind(2)
    denoise._attend_backward(out_gradient.flatten(2), out, q, k, v, lse, None, *made)
    assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    for got, exactly in zip([out.view_as(q), *made], [want, *gradients], strict=True):
        assert near(got, exactly.transpose(1, 2), 6e-3)


@tiled
def test_tiles_bear_scores_of_any_size() -> None:
    """One key far above the others, late enough that what was summed before it vanishes; and equal scores."""
    q, k = torch.full((1, 50, 1, 16), 8.0).bfloat16(), torch.full((1, 600, 1, 16), -8.0).bfloat16()
    k[0, 500] = 8.0
    v = torch.arange(600.0).bfloat16()[None, :, None, None].expand(1, 600, 1, 16).contiguous()
    out, _, _ = denoise._attend(q, k, v, keep=False)
    assert torch.equal(out, v[0, 500].expand_as(out))
    out, _, _ = denoise._attend(q, torch.zeros_like(k), v, keep=False)
    assert torch.allclose(out.float(), v.float().mean(), rtol=1e-2)


@tiled
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("norms", [False, True])
def test_joint_attention_of_many_tokens_in_tiles(norms: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(denoise, "_keeps", lambda *_: False)
    monkeypatch.setattr(denoise, "_chunks", None)  # what runs without a kernel
    monkeypatch.setattr(denoise, "CHUNK", 0)
    g = torch.Generator().manual_seed(5)
    qkv = torch.randn(rows, 70, 3, 3, 16, generator=g).bfloat16()
    weight = 1 + torch.randn(2, 1, 1, 1, 16, generator=g) / 3 if norms else None
    turn = torch.polar(torch.ones(70, 8), torch.randn(70, 8, generator=g)) if norms else None
    out_gradient = torch.randn(rows, 70, 48, generator=g).bfloat16()
    results = []
    for function in (joint_attention, joint_attention_reference):
        x = qkv.clone().requires_grad_(True)
        y = function(x, weight, 1e-6, turn)
        results.append((y.detach(), *torch.autograd.grad(y, x, out_gradient)))
    assert all(near(got, want, 1e-2) for got, want in zip(*results, strict=True))


@tiled
def test_tiles_do_not_depend_on_the_number_of_threads() -> None:
    g = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 100, 5, 32, generator=g).bfloat16() for _ in range(3))
    made = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            made.append(denoise._attend(q, k, v, keep=False)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)
