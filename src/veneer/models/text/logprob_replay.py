"""Combine log-probabilities of another forward pass with this model's gradient.

    x_i = output of layer i in the other forward pass    ∂x_i/∂x_{i-1}, ∂x_i/∂θ by this model's own layer i, at x_{i-1}

The other forward pass is the server's, which samples completions. The log-probabilities are then
bit-identical to the sampler's, even if this model sums in another order. Each layer is differentiated at the
values of the other forward pass, so the result is the gradient of that forward pass, up to the rounding of a
backward pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from veneer.errors import ConfigError
from veneer.models.patching import fast_report
from veneer.models.text.loss import token_logps
from veneer.ops.attention import SharedRows


class Replay(Protocol):
    """Another forward pass over some rows, which runs only once, layer by layer."""

    @abstractmethod
    def layer(self) -> Tensor:
        """Return the next layer's output, (tokens, dim). The next call can overwrite it."""

    @abstractmethod
    def logps(self) -> Tensor:
        """Return log p of each trained token, (M,) float32.

        Call this either after the last layer, or without any call of `layer`."""


def replayed_logps(
    model: Any,
    input_ids: Tensor,
    lengths: Sequence[int],
    trained: Tensor,
    replay: Replay,
    shared: SharedRows | None = None,
) -> Tensor:
    """Return log p of each trained token, (M,).

    The values come from the replay. The gradient comes from this model, evaluated at the replay's values. The
    arguments are those of `token_logps`. Raises ConfigError unless the model is inside `fast` and supports
    packed rows."""
    if not fast_report(model).rows:
        why = fast_report(model).skipped.get("rows", "the fast paths are not active")
        message = f"values of this base's layers cannot be replaced: {why}"
        raise ConfigError(message, fix="set reinforcement.exact to false")
    at = trained.nonzero()[:, 0].to(input_ids.device)
    source_rows = at - 1 if shared is None else shared.sent(at.device).before[at]
    with _replayed_outputs(model.model.layers, replay, source_rows if fast_report(model).keeps else None):
        logps = token_logps(model, input_ids, lengths, trained, shared)
        return _with_values(logps, replay.logps())


class _Valued(torch.autograd.Function):
    """Replace the values of y's first rows; pass the gradient to y unchanged."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, values: Tensor) -> Tensor:
        out = y.detach().clone()
        out.view(-1, y.shape[-1])[: len(values)] = values
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _with_values(y: Tensor, values: Tensor) -> Tensor:
    out: Tensor = _Valued.apply(y[..., None], values[..., None])[..., 0]  # type: ignore[no-untyped-call]
    return out


@contextmanager
def _replayed_outputs(layers: Sequence[nn.Module], replay: Replay, source_rows: Tensor | None) -> Iterator[None]:
    """Replace the layers' outputs with the replay's values, inside the with-block.

    Activation checkpointing recomputes layers after the with-block, but uses only their inputs.
    `source_rows`: the tokens that the last layer returns, if it does not return all tokens."""

    def valued(i: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        values = replay.layer()
        if i == len(layers) - 1 and source_rows is not None:
            values = values[source_rows]
        out: Tensor = _Valued.apply(output, values)  # type: ignore[no-untyped-call]
        return out

    with ExitStack() as undo:
        for i, layer in enumerate(layers):
            undo.callback(layer.register_forward_hook(partial(valued, i)).remove)
        yield
