"""The losses of preference training: pure functions of log-probabilities, a loss for each pair or each answer.

| loss   | takes of each answer                           | loss of a pair (w: chosen, l: rejected)                   |
| dpo    | r = log π(y|x) − log π_ref(y|x)                | −log σ(β·(r_w − r_l))                                     |
| ipo    | r, by default divided by |y|                   | (r_w − r_l − 1/(2β))²                                     |
| orpo   | m = log π(y|x) / |y|                           | −β·log σ(log odds(m_w) − log odds(m_l))                   |
| simpo  | m                                              | −log σ(β·(m_w − m_l) − γ)                                 |
| kto    | r, and whether the answer is desirable         | λ·(1 − σ(±β·(r − z₀))), of an answer alone                |

All of shape (n,) and differentiable; nothing is summed or averaged here. Knows neither models nor data.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dpo", "ipo", "kto", "kto_reference", "orpo", "simpo"]

_CERTAIN = -1e-7  # the largest mean log p that float32 can tell from 0, whose odds are infinite


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float, smoothing: float = 0.0) -> Tensor:
    """−(1−ε)·log σ(β·(chosen − rejected)) − ε·log σ(−β·(chosen − rejected)).

    chosen, rejected: log-ratios log π − log π_ref in nats. Direct preference optimisation (arXiv 2305.18290, eq. 7);
    `smoothing` ε is the share of labels believed to be the wrong way round: conservative DPO, in the authors' note on
    it and their code. With log-ratios for each token it is the length-normalised one of Tülu 3 (arXiv 2411.15124)."""
    return _preferred(beta * (chosen - rejected), smoothing)


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """(chosen − rejected − 1/(2β))², β the paper's τ (arXiv 2310.12036, eq. 17).

    chosen, rejected: log-ratios. The paper writes them for whole answers; its authors' results, and TRL, divide them
    by the answers' lengths."""
    return (chosen - rejected - 1 / (2 * beta)).square()


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """−β·log σ(log odds(chosen) − log odds(rejected)), odds(m) = e^m / (1 − e^m), β the paper's λ.

    chosen, rejected: mean log-probabilities of an answer's tokens. The odds-ratio term alone (arXiv 2403.07691, eq. 4
    and 7): ORPO adds to it the likelihood of the chosen answer, −chosen."""
    return -beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float, smoothing: float = 0.0) -> Tensor:
    """−log σ(β·(chosen − rejected) − γ), with `smoothing` as `dpo` (arXiv 2405.14734, eq. 6).

    chosen, rejected: mean log-probabilities of an answer's tokens. γ: the margin that a pair should have."""
    return _preferred(beta * (chosen - rejected) - gamma, smoothing)


def kto(
    ratios: Tensor, desirable: Tensor, reference: Tensor | float, *, beta: float, weights: tuple[float, float]
) -> Tensor:
    """λ_D·(1 − σ(β·(r − z₀))) of a desirable answer, λ_U·(1 − σ(β·(z₀ − r))) of another (arXiv 2402.01306, eq. 8).

    ratios: r, log-ratios. desirable: (n,) bool. reference: z₀, see `kto_reference`. weights: (λ_D, λ_U)."""
    gain = beta * (ratios - reference)
    return torch.where(desirable, weights[0] * torch.sigmoid(-gain), weights[1] * torch.sigmoid(gain))


def kto_reference(ratios: Tensor) -> Tensor:
    """z₀ = max(0, mean r) over prompts with answers that belong to other prompts: the paper's estimate of
    KL(π ‖ π_ref). It has no gradient. 0 without any."""
    return ratios.detach().mean().clamp(min=0.0) if len(ratios) else ratios.new_zeros(())


def _preferred(margin: Tensor, smoothing: float) -> Tensor:
    loss = -(1 - smoothing) * F.logsigmoid(margin)
    return loss - smoothing * F.logsigmoid(-margin) if smoothing else loss


def _log_odds(mean: Tensor) -> Tensor:
    """m − log(1 − e^m), by whichever of the two forms keeps its digits; m just below 0 where it is 0."""
    m = mean.clamp(max=_CERTAIN)
    rest = torch.where(m < -0.6931, torch.log1p(-torch.exp(m)), torch.log(-torch.expm1(m)))
    return m - rest
