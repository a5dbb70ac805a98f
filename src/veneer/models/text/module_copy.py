"""Copy the module tree of a base while sharing its weights.

    trained = copy_modules(base)        attach adapters, use `fast` or add hooks, while `base` is served

A server and a training run can then change their modules independently. Neither writes to the shared weights.
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
    """Return a base with copies of the modules that share the original weights.

    Replaced forward methods and hooks of the original modules are not copied. The original modules must not
    have adapters attached."""
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
        module.__dict__.pop("forward", None)  # Remove a replaced forward method.
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    restore_attention(copied)
    copied.eval()
    return replace(base, model=copied)
