"""Tinker's losses, computed from a row's log-probabilities and per-token inputs.

p is the trained policy, q the sampler (`logprobs`), A the `advantages`, r = exp(log p − log q). Each loss is a
sum over tokens:

    cross_entropy          −w·log p                                                 `weights`
    importance_sampling    −r·A
    ppo                    −min(r·A, clip(r, low, high)·A)
    cispo                  −sg[clip(r, low, high)]·A·log p
    dro                    −(A·log p − β/2·(log p − log q)²)

Options: low is `clip_low_threshold` (default 0.8), high is `clip_high_threshold` (1.2), and β is `beta` (0.05).
sg stops gradients. A custom loss is cross_entropy with the weights −∂loss/∂log p, which the SDK computes.
Source: https://tinker-docs.thinkingmachines.ai/tinker/losses
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from veneer.errors import ConfigError, one_of

Inputs = Mapping[str, Tensor]
Options = Mapping[str, float | str]
_CLIPS = ("clip_low_threshold", "clip_high_threshold")


def _cross_entropy(logps: Tensor, row: Inputs, options: Options) -> Tensor:
    return -logps * row["weights"]


def _importance_sampling(logps: Tensor, row: Inputs, options: Options) -> Tensor:
    return -torch.exp(logps - row["logprobs"]) * row["advantages"]


def _ppo(logps: Tensor, row: Inputs, options: Options) -> Tensor:
    ratio, advantages = torch.exp(logps - row["logprobs"]), row["advantages"]
    return -torch.minimum(ratio * advantages, _clip(ratio, options) * advantages)


def _clip(ratio: Tensor, options: Options) -> Tensor:
    return ratio.clamp(float(options.get("clip_low_threshold", 0.8)), float(options.get("clip_high_threshold", 1.2)))


def _cispo(logps: Tensor, row: Inputs, options: Options) -> Tensor:
    ratio = torch.exp(logps.detach() - row["logprobs"])
    return -_clip(ratio, options) * row["advantages"] * logps


def _dro(logps: Tensor, row: Inputs, options: Options) -> Tensor:
    beta = float(options.get("beta", 0.05))
    return -(logps * row["advantages"] - 0.5 * beta * (logps - row["logprobs"]) ** 2)


_SAMPLED = ("logprobs", "advantages")
_LOSSES: Mapping[str, tuple[Callable[[Tensor, Inputs, Options], Tensor], tuple[str, ...], tuple[str, ...]]] = {
    "cross_entropy": (_cross_entropy, ("weights",), ()),
    "importance_sampling": (_importance_sampling, _SAMPLED, ()),
    "ppo": (_ppo, _SAMPLED, _CLIPS),
    "cispo": (_cispo, _SAMPLED, _CLIPS),
    "dro": (_dro, _SAMPLED, ("beta",)),
}
"""Loss -> (function, tensors that a row needs besides its targets, names of options)."""


def row_loss(name: str, logps: Tensor, row: Inputs, options: Options) -> Tensor:
    """Return the loss of one row, a scalar.

    `logps` and the row's tensors have the shape (n,), or (n, k) for k targets per token."""
    return _LOSSES[name][0](logps, row, options).sum()


def needed_inputs(name: str, options: Options) -> tuple[str, ...]:
    """Return the tensors that a loss needs from each row besides the targets.

    Raises ConfigError for an unknown loss or option."""
    one_of(name, _LOSSES, "a loss", "loss_fn")
    allowed = _LOSSES[name][2]
    if wrong := [key for key in options if key not in allowed]:
        has = f"it has {', '.join(allowed)}" if allowed else "it has none"
        raise ConfigError(f"{name} has no option {wrong[0][:50]!r}", where="loss_fn_config", fix=has)
    if wrong := [key for key, value in options.items() if isinstance(value, str)]:
        raise ConfigError(f"{wrong[0]} must be a number", where="loss_fn_config")
    return _LOSSES[name][1]
