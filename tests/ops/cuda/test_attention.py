"""torch's varlen and flex attention on packed rows, compared with float64 attention per row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from veneer.ops.attention import RowLayout, VarlenSettings, varlen_attention, varlen_attention_reference
from veneer.ops.cuda import attention
from veneer.ops.cuda.implementations import IMPLEMENTATIONS
from veneer.ops.dispatch import dispatch

VARLEN = IMPLEMENTATIONS["varlen_attention"]
FLEX = VARLEN.alternatives[0]
LENGTHS = [5, 1, 140, 17]


def heads(dtype: torch.dtype, device: str = "cpu", idle: int = 0) -> list[Tensor]:
    generator, n = torch.Generator().manual_seed(0), sum(LENGTHS) + idle
    return [torch.randn(n, h, 16, generator=generator).to(device, dtype) for h in (4, 2, 2)]


def as_documented(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, *_: int, scale: float,
    window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """Implement torch's varlen_attn according to its documentation.

    Query i sees keys i − left … i + right; −1 means unbounded."""
    assert torch.equal(starts, key_starts)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    out = torch.empty_like(q)
    for a, b in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        keys, values = (t[a:b].repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for t in (k, v))
        back = torch.arange(b - a)[:, None] - torch.arange(b - a)
        hidden = (back < -right) | ((back > left) if left >= 0 else torch.zeros_like(back, dtype=torch.bool))
        scores = (q[a:b].transpose(0, 1) @ keys.mT * scale).masked_fill(hidden, -math.inf)
        out[a:b] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out


@pytest.mark.parametrize("window", [None, 1, 20, 1000])
def test_varlen_gets_causal_rows_and_their_window(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "varlen_attention", lambda: as_documented)
    q, k, v = heads(torch.float64)
    settings = VarlenSettings(RowLayout(LENGTHS), 0.3, window)
    want = varlen_attention_reference(q, k, v, settings)
    torch.testing.assert_close(VARLEN.run(q, k, v, settings), want)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(("cap", "sunk"), [(2.0, False), (0.0, True), (3.0, True)])
def test_flex_supports_caps_windows_and_sinks(window: int | None, cap: float, sunk: bool) -> None:
    q, k, v = heads(torch.float32)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if sunk else None
    settings = VarlenSettings(RowLayout(LENGTHS), 0.3, window, cap, sinks)
    want = varlen_attention_reference(q.double(), k.double(), v.double(), settings)
    for _ in range(2):  # the second layer reuses the first one's mask
        got = FLEX.run(q, k, v, settings)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    assert list(settings.layout.masks) == [window]


ATTENTIONS = [
    (torch.bfloat16, 0.0, False, "varlen"),
    (torch.float32, 0.0, False, "torch"),
    (torch.bfloat16, 4.0, False, "flex"),
    (torch.float32, 4.0, True, "flex"),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "cap", "sunk", "name"), ATTENTIONS)
@pytest.mark.parametrize("window", [None, 20])
def test_attention_on_a_gpu_matches_the_cpu(
    dtype: torch.dtype, cap: float, sunk: bool, name: str, window: int | None
) -> None:
    given: list[Any] = [t.requires_grad_() for t in heads(dtype, "cuda", idle=3)]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], device="cuda", dtype=dtype) if sunk else None
    runs = {None: "torch", VARLEN.run: "varlen", FLEX.run: "flex"}
    settings = VarlenSettings(RowLayout(LENGTHS, "cuda", idle=3), 0.3, window, cap, sinks)
    assert runs[dispatch("varlen_attention", *given, settings)] == name
    wide = [t.detach().cpu().double().requires_grad_() for t in given]
    wide_sinks = None if sinks is None else sinks.cpu().double()
    want = varlen_attention(*wide, VarlenSettings(RowLayout(LENGTHS, idle=3), 0.3, window, cap, wide_sinks))
    got = varlen_attention(*given, settings)
    g = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    found = [got, *torch.autograd.grad(got, given, g.to("cuda", dtype))]
    for a, b in zip(found, [want, *torch.autograd.grad(want, wide, g.double())], strict=True):
        assert (a.cpu().double() - b).norm() <= tolerance * b.norm()
