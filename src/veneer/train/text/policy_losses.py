"""Policy loss of sampled completions with rewards: one formula for the published losses.

    L = 1/N Σ_i f_i Σ_t  w_it · max(−ρ_it·A_i, −clip(ρ_it, 1 − ε_low, 1 + ε_high)·A_i)  +  β·k_it

    A_i    `advantages`: the reward minus a baseline, optionally divided by a standard deviation
    ρ_it   `policy_ratios`: p now / p at sampling, of the token, or the geometric mean over its completion
    f_i    `length_factors`: length normalization of a completion
    k_it   `kl_estimates`: KL to the reference
    w_it   `importance_weights`: corrects for sampling from another distribution than p (temperature, grammar)

| loss                     | baseline | scale | ratio    | ε          | f_i          | source           |
| ppo (only its clip)      | batch    | batch | token    | 0.2 0.2    | batch        | arXiv 1707.06347 |
| reinforce, with baseline | batch    | none  | token    | none       | none         | Williams 1992    |
| rloo                     | others   | none  | token    | none       | none         | arXiv 2402.14740 |
| grpo                     | group    | group | token    | 0.2 0.2    | answer       | arXiv 2402.03300 |
| dr-grpo                  | group    | none  | token    | 0.2 0.2    | limit        | arXiv 2503.20783 |
| dapo                     | group    | group | token    | 0.2 0.28   | batch        | arXiv 2503.14476 |
| gspo                     | group    | group | sequence | 3e-4 4e-4  | answer       | arXiv 2507.18071 |

Without a clip and with one update, ρ is 1 and the gradient of ρ·A equals the gradient of A·log p, as in
REINFORCE. All functions are pure functions of tensors. Completions are concatenated: T tokens of N
completions, with the completion lengths as a separate argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

_Baseline = Literal["group", "others", "batch", "none"]
_Spread = Literal["group", "batch", "none"]
_Lengths = Literal["answer", "batch", "limit", "none"]

_LEAST = 1e-4
"""Constant added to a standard deviation, as in TRL."""


def advantages(rewards: Tensor, groups: Sequence[int], *, baseline: _Baseline, scale: _Spread) -> Tensor:
    """Return A_i = (r_i − b_i) / (s_i + 1e-4), float64: (N,).

    rewards: (N,); groups: the group index of each completion.

    b: the mean of the group (GRPO, eq. 1 of 2402.03300), of the group's other completions (RLOO, eq. 8 of
    2402.14740), of all completions, or 0. s: the standard deviation of the group or of all completions, with
    divisor n − 1. If scale is `none`, the denominator is 1. For the first two baselines, a group of one
    completion has advantage 0, like a group with equal rewards."""
    r = rewards.double()
    out = r.clone()
    parts: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        parts.setdefault(group, []).append(i)
    for members in parts.values():
        if baseline in ("group", "others"):
            out[members] = _centered(r[members])
        if baseline == "others" and len(members) > 1:
            out[members] *= len(members) / (len(members) - 1)
    if baseline == "batch":
        out = _centered(r)
    if scale == "group":
        for members in parts.values():
            out[members] /= _spread(r[members])
    elif scale == "batch":
        out = out / _spread(r)
    return out


def _centered(r: Tensor) -> Tensor:
    """Return r minus its mean; exactly 0 if all numbers in r are equal.

    The computed mean of equal numbers can differ from these numbers in the last bit. Dividing by a standard
    deviation near 0 would amplify the difference."""
    return r - r.mean() if bool((r != r[:1]).any()) else torch.zeros_like(r)


def _spread(r: Tensor) -> Tensor:
    return (r.std() if len(r) > 1 else r.new_zeros(())) + _LEAST


def policy_ratios(logps: Tensor, old: Tensor, lengths: Sequence[int], *, level: Literal["token", "sequence"]) -> Tensor:
    """Return ρ of each token with its gradient: (T,).

    `token`: p / p_old (PPO, eq. 6). `sequence`: exp of the completion's mean of log p − log p_old, which is
    the same number for all tokens of a completion (GSPO, eq. 7)."""
    difference = logps - old
    if level == "sequence":
        means = torch.stack([part.mean() for part in difference.split(list(lengths))])
        difference = per_token(means, lengths)
    return difference.exp()


def clipped(ratios: Tensor, advantages: Tensor, low: float | None, high: float | None) -> Tensor:
    """Return max(−ρ·A, −clip(ρ, 1 − low, 1 + high)·A) of each token (PPO, eq. 7).

    high > low is the clip-higher of DAPO (eq. 10). None means no limit on that side. advantages: (T,)."""
    plain = -ratios * advantages
    if low is None and high is None:
        return plain
    bounded = ratios.clamp(None if low is None else 1 - low, None if high is None else 1 + high)
    return torch.maximum(plain, -bounded * advantages)


def kl_estimates(logps: Tensor, reference: Tensor) -> Tensor:
    """Return the KL(p ‖ p_ref) estimate e^(−d) + d − 1 of each token, d = log p − log p_ref: (T,).

    The tokens are sampled from p. The estimate is unbiased and never below 0: GRPO (eq. 4), and k3 of
    Schulman 2020, "Approximating KL divergence"."""
    d = logps - reference
    return torch.exp(-d) + d - 1


def divergences(logits: Tensor, teacher: Tensor, direction: Literal["reverse", "forward"]) -> Tensor:
    """Return the KL between p = softmax(logits) and the teacher's q: (M, V) -> (M,).

    The sum is over the whole vocabulary:

        reverse   KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)      concentrates where q is high
        forward   KL(q ‖ p) = Σ_v q_v (log q_v − log p_v)      covers all of q

    Used for completions sampled from p (Agarwal et al. 2024, "On-policy distillation", arXiv 2306.13649)."""
    ours, theirs = logits.log_softmax(-1), teacher.log_softmax(-1)
    if direction == "forward":
        ours, theirs = theirs, ours
    return (ours.exp() * (ours - theirs)).sum(-1)


def length_factors(lengths: Sequence[int], how: _Lengths, limit: int) -> Tensor:
    """Return f_i, float64: (N,).

    answer   1/|o_i|, the mean of means of GRPO
    batch    N / Σ|o|, so that every token of the step has the same weight (DAPO)
    limit    1/limit, a constant (Dr. GRPO)
    none     1, for log p of whole completions"""
    n = torch.tensor(list(lengths), dtype=torch.float64)
    if how == "answer":
        return 1 / n
    if how == "batch":
        return (len(n) / n.sum()).expand(len(n)).clone()
    return torch.full_like(n, 1 / limit if how == "limit" else 1.0)


def importance_weights(logps: Tensor, sampling_logps: Tensor, cap: float) -> Tensor:
    """Return min(p / q, cap) of each token: (T,).

    p is the model's distribution, and q the distribution that the tokens were sampled from: truncated
    importance sampling (Ionides 2008)."""
    return (logps - sampling_logps).exp().clamp(max=cap)


def per_token(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Repeat the value of each completion for all of its tokens: (N,) -> (T,)."""
    return values.repeat_interleave(torch.tensor(list(lengths), device=values.device))
