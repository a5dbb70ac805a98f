"""A second module tree over the tensors of a base, independent of the first.

    trained = copy_modules(base)        attach, `fast` and hooks, while `base` is served; weights are shared

A server and a training run each modify modules in their own way; neither writes to the weights.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from veneer.models.text.attention import restore_attention
from veneer.models.text.base import TextBase
from veneer.ops.quantized import Quantized


def copy_modules(base: TextBase) -> TextBase:
    """Return the base with modules of its own, over the same weights.

    Changes made to the base's modules are not copied; adapters must not be attached to them."""
    model: Any = base.model
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        shared: Any = tensor
        if isinstance(tensor, nn.Parameter) and not isinstance(tensor, Quantized):
            shared = nn.Parameter(tensor.detach(), requires_grad=False)
        memo[id(tensor)] = shared
    with torch.no_grad():
        copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        module.__dict__.pop("forward", None)  # remove another replacement of the forward
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    restore_attention(copied)
    copied.eval()
    return replace(base, model=copied)
