"""Losses: −log p of each token in chunks of logits, and preference losses.

`token_nll` reads logits once and computes its gradient in the same pass. The preference losses are pure
functions of log-probabilities, with one loss per pair or per completion y:

| loss   | value of each completion                       | loss of a pair (w: chosen, l: rejected)                   |
| dpo    | r = log π(y|x) − log π_ref(y|x)                | −log σ(β·(r_w − r_l))                                     |
| ipo    | r, by default divided by |y|                   | (r_w − r_l − 1/(2β))²                                     |
| orpo   | m = log π(y|x) / |y|                           | −β·log σ(log odds(m_w) − log odds(m_l))                   |
| simpo  | m                                              | −log σ(β·(m_w − m_l) − γ)                                 |
| kto    | r, and whether the completion is desirable     | λ·(1 − σ(±β·(r − z₀))), per completion                    |

All losses have shape (n,) and are differentiable; no loss is summed or averaged here. This module does not
depend on models or data.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from veneer.ops.dispatch import dispatch
from veneer.ops.prepacked import PrepackedWeights
from veneer.ops.products import in_float32, product
from veneer.ops.step_sizes import logits_chunk

_IGNORED = -100
_CERTAIN = -1e-7  # the largest mean log p that float32 distinguishes from 0; at 0 the odds are infinite


class _TokenNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        copies: PrepackedWeights | None,
        correct: Tensor | None,
    ) -> Tensor:
        run = dispatch("linear_cross_entropy", hidden, weight)
        if run is not None:
            nll_of_kernel: Tensor
            nll_of_kernel, grad = run(hidden, weight, targets, ctx.needs_input_grad[0], correct)
            ctx.save_for_backward(grad)
            return nll_of_kernel
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dtype = torch.float32 if in_float32(hidden, weight) else hidden.dtype
        for i in range(0, len(hidden), chunk):
            part = slice(i, i + chunk)
            logits = None if copies is None else copies.product(hidden[part], weight)
            logits = product(hidden[part], weight.t(), dtype=dtype) if logits is None else logits
            nll[part] = _row_nll_(logits, targets[part], grad is not None, None if correct is None else correct[part])
            if grad is not None:
                by_copy = None if copies is None else copies.product(logits, weight, transposed=False)
                if by_copy is None:
                    product(logits, weight, out=grad[part])
                else:
                    grad[part] = by_copy
            del logits  # free the logits before the next chunk allocates its own
        ctx.save_for_backward(grad)
        return nll

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        (grad,) = ctx.saved_tensors
        return grad * g.to(grad.dtype)[:, None], None, None, None, None, None


def _row_nll_(logits: Tensor, targets: Tensor, gradient: bool, correct: Tensor | None = None) -> Tensor:
    """Return −log softmax at the targets, in float32 or wider.

    gradient: also overwrite `logits` with softmax − onehot.
    correct: as in `token_nll`.

    A target of −100 is ignored, as in F.cross_entropy: loss 0, no gradient. Raises IndexError for any other
    invalid target."""
    targets = targets.to(torch.int64).contiguous()
    run = dispatch("token_nll", logits)
    if run is not None:
        nll_of_kernel: Tensor = run(logits, targets, gradient, correct)
        return nll_of_kernel
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ignored = targets == _IGNORED
    y = targets.masked_fill(ignored, 0)[:, None]
    # A GPU kernel reports an invalid index itself, asynchronously.
    if y.device.type == "cpu" and bool(((y < 0) | (y >= logits.shape[1])).any()):
        raise IndexError("token_nll: a target is not a token of the vocabulary")
    nll = torch.logsumexp(wide, 1, keepdim=True) - wide.gather(1, y)
    if correct is not None:
        correct.copy_(is_top_token(wide, y[:, 0]) & ~ignored)
    if gradient:
        # Compute the target's p − 1 in the wide dtype: with p near 1 rounded to 16 bits, p − 1 would be 0.
        slope = torch.softmax(wide, 1).scatter_(1, y, torch.expm1(-nll))
        logits.copy_(slope.masked_fill_(ignored[:, None], 0))
    return nll[:, 0].masked_fill_(ignored, 0)


def is_top_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Return whether each target's logit is the largest: (M,) bool.

    logits: (M, vocabulary), targets: (M,)."""
    return logits.gather(1, targets[:, None])[:, 0] >= logits.amax(1)


def token_nll(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    copies: PrepackedWeights | None = None,
    correct: Tensor | None = None,
) -> Tensor:
    """Return −log softmax(hidden_i·Wᵀ)[target_i] for each i, (M,) float32.

    hidden: (M, d).
    weight: (vocabulary, d), frozen.
    targets: (M,). A target of −100 is ignored: loss 0, no gradient.
    chunk: positions per chunk, by default `logits_chunk` of the device.
    copies: the weight's prepacked copies.
    correct: (M,) bool, overwritten with `is_top_token` of the logits.

    The gradient is computed in the forward pass, chunk by chunk, so that at most chunk × vocabulary logits
    exist; the backward pass only scales row i by the gradient of loss i.

    Raises IndexError for any other invalid target (on a GPU, the device's error). Reference:
    F.cross_entropy((hidden @ W.T).float(), targets, reduction="none")."""
    out: Tensor = _TokenNll.apply(hidden, weight, targets, chunk or logits_chunk(hidden.device.type), copies, correct)
    return out


# -- preferences -------------------------------------------------------------------------------------------------------


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float, smoothing: float = 0.0) -> Tensor:
    """Return −(1−ε)·log σ(β·(chosen − rejected)) − ε·log σ(−β·(chosen − rejected)).

    chosen, rejected: log-ratios log π − log π_ref in nats.
    smoothing: ε, the share of labels assumed to be flipped: conservative DPO, from the authors' note and
        code.

    Direct preference optimization (arXiv 2305.18290, eq. 7). With log-ratios divided by the number of tokens,
    this is Tülu 3's length-normalized DPO (arXiv 2411.15124)."""
    return _preferred(beta * (chosen - rejected), smoothing)


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Return the IPO loss (chosen − rejected − 1/(2β))².

    arXiv 2310.12036, eq. 17; β is the paper's τ.

    chosen, rejected: log-ratios. The paper defines log-ratios of whole completions; the authors' experiments,
        and TRL, divide each log-ratio by the completion's length."""
    return (chosen - rejected - 1 / (2 * beta)).square()


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Return the ORPO odds-ratio term −β·log σ(log odds(chosen) − log odds(rejected)).

    odds(m) = e^m / (1 − e^m). β is the paper's λ (arXiv 2403.07691, eq. 4 and 7). The full ORPO loss adds the
    negative log-likelihood of the chosen completion, −chosen.

    chosen, rejected: mean log-probabilities of a completion's tokens."""
    return -beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float, smoothing: float = 0.0) -> Tensor:
    """Return −log σ(β·(chosen − rejected) − γ) (arXiv 2405.14734, eq. 6).

    chosen, rejected: mean log-probabilities of a completion's tokens.
    gamma: γ, the target margin of a pair.
    smoothing: as in `dpo`."""
    return _preferred(beta * (chosen - rejected) - gamma, smoothing)


def kto(
    ratios: Tensor, desirable: Tensor, reference: Tensor | float, *, beta: float, weights: tuple[float, float]
) -> Tensor:
    """Return λ_D·(1 − σ(β·(r − z₀))) if desirable, else λ_U·(1 − σ(β·(z₀ − r))).

    The KTO loss (arXiv 2402.01306, eq. 8).

    ratios: r, log-ratios.
    desirable: (n,) bool.
    reference: z₀, see `kto_reference`.
    weights: (λ_D, λ_U)."""
    reward = beta * (ratios - reference)
    return torch.where(desirable, weights[0] * torch.sigmoid(-reward), weights[1] * torch.sigmoid(reward))


def kto_reference(ratios: Tensor) -> Tensor:
    """Return z₀ = max(0, mean r), the paper's estimate of KL(π ‖ π_ref).

    ratios: log-ratios of prompts paired with other prompts' completions.

    The result has no gradient. It is 0 for empty input."""
    return ratios.detach().mean().clamp(min=0.0) if len(ratios) else ratios.new_zeros(())


def _preferred(margin: Tensor, smoothing: float) -> Tensor:
    loss = -(1 - smoothing) * F.logsigmoid(margin)
    return loss - smoothing * F.logsigmoid(-margin) if smoothing else loss


def _log_odds(mean: Tensor) -> Tensor:
    """Return m − log(1 − e^m), computed stably; m is clamped to just below 0."""
    m = mean.clamp(max=_CERTAIN)
    log_complement = torch.where(m < -0.6931, torch.log1p(-torch.exp(m)), torch.log(-torch.expm1(m)))
    return m - log_complement
