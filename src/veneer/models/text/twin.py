"""A second tree of modules over the tensors of a base: what is done to the one, the other does not see.

    trained = base_twin(base)        attach, `fast`, hooks on it; `base` is served meanwhile; no weight lies there twice

An engine has its own ways of running a base, and so has training; each changes modules. What both would write to, the
values, neither does.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from veneer.errors import ConfigError
from veneer.models.text.attention import as_it_came
from veneer.models.text.base import TextBase
from veneer.ops.quantized import Quantized


def base_twin(base: TextBase) -> TextBase:
    """The base with modules of its own. What was put on the other's modules (adapters apart, which must not be there)
    is not on these. Raises ConfigError for one whose weights are not there any more as they came."""
    model: Any = base.model
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta:
            raise ConfigError("the base's weights are kept in another form alone", fix="serve it without --weights")
        same: Any = tensor
        if isinstance(tensor, nn.Parameter) and not isinstance(tensor, Quantized):
            same = nn.Parameter(tensor.detach(), requires_grad=False)
        memo[id(tensor)] = same
    with torch.no_grad():
        made = copy.deepcopy(model, memo)
    for module in made.modules():
        module.__dict__.pop("forward", None)  # another's way to compute it
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    as_it_came(made)
    made.eval()
    return replace(base, model=made)
