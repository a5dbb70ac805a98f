"""−log softmax at the targets, and its gradient in place of the logits: a token a program, its logits read twice."""

from __future__ import annotations

import torch
from torch import Tensor

from veneer.ops.cuda.launch import kernel, rounded, run_kernel, tl
from veneer.ops.sizes import power_of_2


@kernel
def _token_nll(
    logits,
    targets,
    nll,
    right,
    width,
    IGNORED: tl.constexpr,
    RIGHT: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """nan at a target that is neither IGNORED nor a column."""
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * width
    target = tl.load(targets + token)
    known = (target >= 0) & (target < width)
    # before the sums, which every thread waits for: later another one may have written the gradient here
    own = tl.load(row + tl.where(known, target, 0)).to(tl.float32)
    most = -float("inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(row + at, mask=at < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(most, tl.max(z, 0))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(z - higher), 0)
        most = higher
    loss = tl.log(total) - (own - most)
    ignored = target == IGNORED
    tl.store(nll + token, tl.where(ignored, 0.0, tl.where(known, loss, float("nan"))))
    if RIGHT:
        tl.store(right + token, (known & (own >= most)).to(tl.uint8))
    if GRADIENT:
        # the target's p − 1 comes from the loss: p near 1 in float32 would leave few digits of it
        slope = tl.where(ignored, 0.0, 1.0 / total)
        below = tl.where(ignored, 0.0, tl.exp(-loss) - 1.0)
        small = loss * (loss * (0.5 - loss * 0.16666667) - 1.0)  # e^−l − 1 = −l + l²/2 − l³/6, where l is small
        below = tl.where(ignored | (loss > 0.01), below, small)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = tl.load(row + at, mask=at < width, other=-float("inf")).to(tl.float32)
            p = tl.where(at == target, below, tl.exp(z - most) * slope)
            tl.store(row + at, rounded(p, row), mask=at < width)


def token_nll(logits: Tensor, targets: Tensor, gradient: bool, right: Tensor | None = None) -> Tensor:
    nll = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    width = logits.shape[1]
    constants = {
        "IGNORED": -100,
        "RIGHT": right is not None,
        "GRADIENT": gradient,
        "BLOCK": min(8192, power_of_2(width)),
    }
    seen = nll if right is None else right.view(torch.uint8)
    run_kernel(_token_nll, (len(logits),), logits, targets, nll, seen, width, **constants, num_warps=8)
    return nll
