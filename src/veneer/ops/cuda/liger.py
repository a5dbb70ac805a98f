"""Liger-Kernel's functions as ops: RMS norm, rotary positions, cross-entropy.

Liger's gated MLPs are not used. They require gate and up as two contiguous tensors and overwrite both in the
backward pass, but a fused projection returns gate and up side by side. With the necessary copies, a forward
pass would move 7 values for every 5 that torch moves.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from veneer.compat import LIGER, MissingInternalError
from veneer.errors import install_command
from veneer.ops.device_transfer import is_fake

_MOST_COLUMNS = 65536
"""Maximum number of values per row that Liger's norms support."""


@functools.cache
def why_missing() -> str:
    """Return why Liger's functions cannot run on this machine, or "" if they can."""
    try:
        LIGER.check()
    except MissingInternalError as error:
        return str(error)
    except ImportError as error:  # liger_kernel, or its dependency triton, is missing
        return f"{error.name} is not installed ({install_command('gpu')})"
    return _trouble_on(torch.cuda.current_device()) if torch.cuda.is_available() else ""


@functools.cache
def _trouble_on(index: int) -> str:
    """Return why Liger's functions fail on this GPU, or "" if a small norm is correct."""
    try:
        x = torch.full((2, 32), 3.0, device=torch.device("cuda", index))
        is_correct = torch.allclose(rms_norm(x, x[0], 0.0), x)
    except Exception as error:  # raised by Triton, by the C compiler that Triton calls, or by the driver
        first_line = (str(error).strip().splitlines() or [""])[0]
        return f"a small norm failed: {type(error).__name__}: {first_line}"
    return "" if is_correct else "a small norm gave wrong numbers"


def _runs_on(*tensors: Tensor) -> bool:
    """Return whether Liger supports these tensors.

    They must be contiguous and on one GPU, and must not be fake or float64."""
    device = tensors[0].device
    if device.type != "cuda" or is_fake(tensors[0]):
        return False
    fits = all(t.device == device and t.is_contiguous() and t.dtype != torch.float64 for t in tensors)
    return fits and not why_missing() and not _trouble_on(device.index or 0)


# -- RMS norm ----------------------------------------------------------------------------------------------------------


def takes_norm(x: Tensor, weight: Tensor) -> bool:
    return x.numel() > 0 and x.shape[-1] <= _MOST_COLUMNS and _runs_on(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return w ⊙ x / √(mean x² + ε), differentiable with respect to x.

    Computed in float32 and rounded once (Liger's "gemma" mode)."""
    norm = LIGER("liger_kernel.ops.rms_norm.LigerRMSNormFunction")
    y: Tensor = norm.apply(x, weight, eps, 0.0, "gemma", False, None)
    return y


# -- rotary positions --------------------------------------------------------------------------------------------------


def takes_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return len(q) > 0 and q.dtype == k.dtype != torch.float64 and _runs_on(cos, sin) and q.device == cos.device


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return q and k with rotary positions applied.

    q: (N, heads, dim).
    k: (N, kv heads, dim).
    cos, sin: (N, dim/2); converted to float32, so that the results are rounded once.

    Liger rotates in place, so this function passes copies of q and k."""
    rotation = LIGER("liger_kernel.ops.rope.LigerRopeFunction")
    inputs = (x.clone(memory_format=torch.contiguous_format)[None].transpose(1, 2) for x in (q, k))
    rotated = rotation.apply(*inputs, cos.float(), sin.float(), None, 1, q.shape[2])
    q, k = (x.transpose(1, 2)[0] for x in rotated)
    return q, k


# -- loss --------------------------------------------------------------------------------------------------------------


def takes_loss(hidden: Tensor, weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, torch.nn.Parameter) and hidden.dtype == weight.dtype
    return plain and len(hidden) > 0 and _runs_on(hidden, weight)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, gradient: bool, correct: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return −log softmax(hidden·Wᵀ) at the targets, (M,) float32, and row gradients.

    Row i of the gradients, (M, d), is the gradient of loss i; without `gradient`, None is returned instead.
    Liger chooses how many logits to compute at a time.

    correct: overwritten with whether each target is the most likely token (the first of equally likely
        tokens)."""
    loss = LIGER("liger_kernel.ops.fused_linear_cross_entropy.fused_linear_cross_entropy_forward")
    targets = targets.long().contiguous()
    # Liger would read out of bounds for an invalid target; index_select raises an error instead.
    weight.select(1, 0).index_select(0, targets.masked_fill(targets == -100, 0))
    nll, _, _, predicted, grad, _, _ = loss(
        hidden,
        weight,
        targets,
        reduction="none",
        compute_gradients=gradient,
        weight_requires_grad=False,
        return_predicted_tokens=correct is not None,
    )
    if correct is not None:
        correct.copy_(predicted == targets)
    return nll, grad if gradient else None
