"""Start a run that multiplies by frozen weights in 8 bits (`base.compute: int8`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from veneer.errors import PreflightError
from veneer.models.patching import fast_report, recording_int8
from veneer.models.text.base import TextBase
from veneer.models.text.loss import text_loss
from veneer.ops.device_transfer import sent
from veneer.train.checkpoint import rng_restore, rng_state
from veneer.train.preflight import Finding, Report
from veneer.train.text.batches import Batch

_WIDEST = 30.0
"""Angle between the gradients, in degrees, above which the preflight warns."""


def use_int8(
    base: TextBase, call: Callable[..., Tensor], parameters: Sequence[Tensor], batches: Sequence[Batch], checks: Report
) -> str:
    """Quantize the base's weights, and return the effect on the loss and the gradient of the first step, as text.

    call: calls a function on the model, as in training. parameters: the trained parameters. batches: the first
        step. checks: the preflight's report, to which the result is added.

    The first step's rows run once in 16 bits, which also finds the outlier channels (ops/int8.py), and once
    in 8 bits. A resumed run finds the same channels, because its adapter is not restored yet. Raises
    PreflightError if no layer of the base can use 8-bit products."""
    report = fast_report(base.model)
    if not report.joins:
        problem = f"no layer of this base can run int8 products: {report.swaps()}"
        raise PreflightError(problem, where="base.compute", fix="remove base.compute")
    random = rng_state()
    with recording_int8(report):
        exact_loss, exact = _gradient(base, call, parameters, batches)
    rng_restore(random)
    loss, gradient = _gradient(base, call, parameters, batches)
    rng_restore(random)
    cosine = float(torch.dot(exact, gradient) / (exact.norm() * gradient.norm()))
    angle = math.degrees(math.acos(max(min(cosine, 1.0), -1.0)))
    kept = [projection.int8.outliers for projection in report.joins if projection.int8 is not None]
    line = f"int8 products: the first step's loss is {loss:.4f} ({exact_loss:.4f} in 16 bits), and its gradient is "
    line += f"{angle:.1f}° from that in 16 bits; {sum(kept)} outlier channels of {len(kept)} weights stay in 16 bits"
    is_near = angle <= _WIDEST
    checks.add(Finding("ok" if is_near else "warn", "int8", line, "" if is_near else "remove base.compute"))
    return line if is_near else f"warning: {line}"


def _gradient(
    base: TextBase, call: Callable[..., Tensor], parameters: Sequence[Tensor], batches: Sequence[Batch]
) -> tuple[float, Tensor]:
    """Return the loss per trained token of these batches, and the gradient of all parameters in one vector."""
    total = 0.0
    count = sum(batch.trained_tokens for batch in batches)
    for batch in batches:
        loss = call(text_loss, base.model, sent(batch.input_ids, base.device), batch.lengths, batch.trained)
        (loss / count).backward()
        total += float(loss.detach())
    gradient = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return total / count, gradient
