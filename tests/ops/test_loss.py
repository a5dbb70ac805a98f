"""Preference and token losses match their formulas and TRL."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.core.exact import DTYPES, TOLERANCE, draw, same, seeded, wide  # noqa: F401, seeded acts by itself
from veneer.ops.loss import dpo, ipo, kto, kto_reference, orpo, simpo, token_nll

ratio = st.floats(-20, 20)
mean = st.floats(-12, -1e-3)
LAW = settings(max_examples=60, deadline=None, derandomize=True)


def one(*values: float) -> list[Tensor]:
    return [torch.tensor([v], dtype=torch.float64) for v in values]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@LAW
@given(ratio, ratio, st.floats(0.01, 1), st.floats(0, 0.4))
def test_dpo_matches_its_formula(w: float, l: float, beta: float, eps: float) -> None:
    p = sigmoid(beta * (w - l))
    wanted = -(1 - eps) * math.log(p) - eps * math.log(1 - p)
    assert dpo(*one(w, l), beta=beta, smoothing=eps).item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@LAW
@given(ratio, ratio, st.floats(0.05, 1))
def test_ipo_matches_its_formula(w: float, l: float, beta: float) -> None:
    assert ipo(*one(w, l), beta=beta).item() == pytest.approx((w - l - 0.5 / beta) ** 2, rel=1e-12, abs=1e-12)
    assert ipo(*one(l + 0.5 / beta, l), beta=beta).item() == pytest.approx(0, abs=1e-18)


@LAW
@given(mean, mean, st.floats(0.05, 1))
def test_orpo_matches_its_formula(w: float, l: float, beta: float) -> None:
    odds = [math.exp(m) / -math.expm1(m) for m in (w, l)]
    wanted = -beta * math.log(odds[0] / (odds[0] + odds[1]))  # σ(log a − log b) = a / (a + b)
    assert orpo(*one(w, l), beta=beta).item() == pytest.approx(wanted, rel=1e-7, abs=1e-12)


@LAW
@given(mean, mean, st.floats(1, 3), st.floats(0, 2))
def test_simpo_matches_its_formula(w: float, l: float, beta: float, gamma: float) -> None:
    wanted = -math.log(sigmoid(beta * (w - l) - gamma))
    assert simpo(*one(w, l), beta=beta, gamma=gamma).item() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@LAW
@given(ratio, ratio, st.floats(0.05, 1), st.floats(0.5, 2), st.floats(0.5, 2))
def test_kto_matches_its_formula(r: float, z: float, beta: float, d: float, u: float) -> None:
    both = torch.tensor([r, r], dtype=torch.float64)
    got = kto(both, torch.tensor([True, False]), z, beta=beta, weights=(d, u)).tolist()
    assert got == pytest.approx([d * (1 - sigmoid(beta * (r - z))), u * (1 - sigmoid(beta * (z - r)))], rel=1e-9)


def test_kto_reference_is_nonnegative_without_gradient() -> None:
    ratios = torch.tensor([1.0, 4.0, -2.0], requires_grad=True)
    assert kto_reference(ratios).item() == 1.0
    assert not kto_reference(ratios).requires_grad
    assert kto_reference(torch.tensor([-3.0])).item() == 0.0
    assert kto_reference(torch.tensor([])).item() == 0.0


LOSSES: dict[str, Any] = {
    "dpo": lambda w, l: dpo(w, l, beta=0.1),
    "cdpo": lambda w, l: dpo(w, l, beta=0.1, smoothing=0.2),
    "ipo": lambda w, l: ipo(w, l, beta=0.1),
    "orpo": lambda w, l: orpo(w, l, beta=0.1),
    "simpo": lambda w, l: simpo(w, l, beta=2.0, gamma=1.0),
    "kto": lambda w, l: kto(w, torch.tensor([True, False, True]), 0.3, beta=0.1, weights=(1.0, 1.3)) + 0 * l,
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_match_finite_differences(name: str) -> None:
    w = torch.tensor([-0.5, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    l = torch.tensor([-1.5, -0.4, -0.11], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LOSSES[name], (w, l))


@pytest.mark.parametrize("name", ["orpo", "dpo", "simpo"])
def test_extreme_likelihoods_have_finite_losses_and_gradients(name: str) -> None:
    w, l = torch.tensor([0.0, -1e-9, -300.0], requires_grad=True), torch.tensor([-300.0, 0.0, 0.0], requires_grad=True)
    LOSSES[name](w, l).sum().backward()
    assert torch.isfinite(LOSSES[name](w, l)).all()
    for t in (w, l):
        assert torch.isfinite(t.grad).all()


@pytest.mark.peers
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_equals_trls(smoothing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer

    w, l = torch.tensor([-0.5, -2.0, -0.1]), torch.tensor([-1.5, -0.4, -0.11])
    asked = {"alpha": 0.0, "beta": 2.0, "loss_type": "simpo", "simpo_gamma": 1.0, "label_smoothing": smoothing}
    trainer = SimpleNamespace(**asked, accelerator=SimpleNamespace(device="cpu"))
    wanted, reward, _ = CPOTrainer.cpo_loss(trainer, w, l)
    torch.testing.assert_close(simpo(w, l, beta=2.0, gamma=1.0, smoothing=smoothing), wanted)
    torch.testing.assert_close(2.0 * w, reward)


@pytest.mark.peers
def test_the_odds_ratio_of_orpo_equals_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    w, l = torch.tensor([-0.5, -2.0, -0.1]), torch.tensor([-1.5, -0.4, -0.11])
    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    wanted = ORPOTrainer.odds_ratio_loss(trainer, w, l)[0]  # TRL subtracts this value
    torch.testing.assert_close(orpo(w, l, beta=0.1), -wanted)


# -- token losses ------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_token_nll(dtype: torch.dtype, chunk: int) -> None:
    h, W = draw(18, 32, dtype=dtype).requires_grad_(), draw(1000, 32, dtype=dtype)
    y = torch.randint(0, 1000, (18,))
    weights = torch.linspace(-1, 2, 18, dtype=torch.float64)  # one weight per token, as preference losses use
    loss = token_nll(h, W, y, chunk)
    (got,) = torch.autograd.grad(loss @ weights.float(), h)
    hd = wide(h)
    wanted = F.cross_entropy(hd @ W.double().T, y, reduction="none")
    (grad,) = torch.autograd.grad(wanted @ weights, hd)
    assert loss.shape == (18,)
    torch.testing.assert_close(loss.double(), wanted, rtol=max(TOLERANCE[dtype], 1e-6), atol=0.0)
    same([got], [grad], TOLERANCE[dtype] if dtype != torch.float64 else 1e-7)  # the returned loss is float32


@DTYPES
@pytest.mark.parametrize("chunk", [4, 100])
def test_token_nll_marks_most_likely_targets(dtype: torch.dtype, chunk: int) -> None:
    """`correct` agrees with argmax of the logits; ties count, ignored targets do not.

    The loss and the gradient do not change."""
    h, W = draw(40, 32, dtype=dtype).requires_grad_(), draw(300, 32, dtype=dtype)
    logits = (h @ W.T).detach()
    y = torch.where(torch.arange(40) % 2 == 0, logits.argmax(1), torch.randint(0, 300, (40,)))
    y[::7] = -100
    W[y[1]] = W[logits[1].argmax()]  # its equal
    right = torch.ones(40, dtype=torch.bool)
    loss = token_nll(h, W, y, chunk, correct=right)
    logits = (h @ W.T).detach()
    best = logits.amax(1) == logits.gather(1, y.clamp(min=0)[:, None])[:, 0]
    assert right.tolist() == (best & (y >= 0)).tolist()
    assert right[1]
    assert right.sum() > 10
    (got,) = torch.autograd.grad(loss.sum(), h)
    plain = token_nll(h, W, y, chunk)
    assert torch.equal(plain, loss)
    assert torch.equal(torch.autograd.grad(plain.sum(), h)[0], got)


def test_token_nll_gradient_of_near_certain_token() -> None:
    """Rounding p = 1 − 1.2e-4 to bfloat16 before 1 − p would lose the gradient."""
    h = torch.tensor([[9.0]], dtype=torch.bfloat16, requires_grad=True)
    W = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    token_nll(h, W, torch.tensor([0])).sum().backward()
    assert h.grad.item() == pytest.approx(-1.0 / (1.0 + torch.tensor(9.0).exp().item()), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ignored_and_invalid_targets(dtype: torch.dtype) -> None:
    """Covers the compiled kernel and torch's operations; int32 targets are valid too."""
    hidden = torch.randn(6, 16).to(dtype).requires_grad_()
    weight = torch.randn(40, 16).to(dtype)
    targets = torch.tensor([3, -100, 0, 39, -100, 7], dtype=torch.int32)
    nll = token_nll(hidden, weight, targets, chunk=4)
    want = F.cross_entropy((hidden @ weight.t()).float(), targets.long(), reduction="none")
    torch.testing.assert_close(nll, want, rtol=1e-2, atol=1e-2)
    assert nll[1] == nll[4] == 0
    nll.sum().backward()
    assert not hidden.grad[[1, 4]].any()
    assert hidden.grad[[0, 2, 3, 5]].any(1).all()
    for wrong in (40, -1, -101):
        with pytest.raises(IndexError, match="not a token of the vocabulary"):
            token_nll(hidden, weight, torch.tensor([1, wrong, 2, 3, 4, 5]))


def test_no_gradient_is_computed_under_no_grad() -> None:
    with torch.no_grad():
        out = token_nll(draw(4, 8, dtype=torch.float32), draw(20, 8, dtype=torch.float32), torch.arange(4))
    assert not out.requires_grad
