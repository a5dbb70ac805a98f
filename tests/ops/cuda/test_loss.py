"""Laws of the loss at tokens against float64, by the op that runs its kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.cuda.laws import DTYPES, FEW, SEEDS, TOLERANCE, close, drawn
from veneer.ops.cuda import loss
from veneer.ops.loss import likeliest, token_nll


@FEW
@given(DTYPES, st.integers(0, 6), st.integers(2, 300), st.integers(1, 4), SEEDS)
def test_token_nll(device: str, dtype: torch.dtype, tokens: int, vocabulary: int, chunk: int, seed: int) -> None:
    hidden = drawn(seed, tokens, 24, dtype=dtype, device=device).requires_grad_()
    weight, g = (
        drawn(seed + 1, vocabulary, 24, dtype=dtype, device=device),
        drawn(seed + 2, tokens, dtype=torch.float32, device=device),
    )
    targets = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed)).to(device)
    targets[::3] = -100
    right = torch.ones(tokens, dtype=torch.bool, device=device)
    nll = token_nll(hidden, weight, targets, chunk, right=right)
    logits = (hidden @ weight.t()).detach()
    found = likeliest(logits, targets.clamp(min=0)) & (targets >= 0)
    clear = logits.float().topk(2, 1).values.diff(dim=1).abs()[:, 0] > 0.1  # products of a chunk round otherwise
    assert torch.equal(right[clear], found[clear])
    (dx,) = torch.autograd.grad(nll, hidden, g)
    wide = hidden.detach().double().requires_grad_()
    want = F.cross_entropy(wide @ weight.double().t(), targets, reduction="none")
    close(nll, want, dtype)
    assert (nll[::3] == 0).all()
    close(dx, torch.autograd.grad(want, wide, g.double())[0], dtype, 2)


@pytest.mark.parametrize("margin", [3.0, 12.0, 60.0])
def test_a_target_that_is_nearly_certain_keeps_the_digits_of_its_gradient(margin: float) -> None:
    logits = torch.zeros(1, 20)
    logits[0, 7] = margin
    wide = logits.double().requires_grad_()
    want = F.cross_entropy(wide, torch.tensor([7]))
    nll = loss.token_nll(logits, torch.tensor([7]), True)
    (slope,) = torch.autograd.grad(want, wide)
    got = logits[0, 7].double()
    assert abs(float(nll) - want.item()) <= 1e-6 * max(want.item(), 1e-1)
    assert abs(float(got - slope[0, 7])) <= 2e-7
    close(logits[:, :7], slope[:, :7], torch.float32)


def test_a_target_that_is_no_token_is_seen_in_the_loss() -> None:
    nll = loss.token_nll(torch.zeros(3, 5), torch.tensor([5, -1, 2]), False)
    assert nll.isnan().tolist() == [True, True, False]
    assert abs(float(nll[2]) - 1.6094379) < 3 * TOLERANCE[torch.float32]
