"""What modules of transformers compute, found out exactly and not by their class's name.

    norm_of(module)      w and ε of an RMS norm  y = w ⊙ x / √(mean x² + ε), or why it is none
    gate_of(module)      act of a gated MLP      y = down(act(gate(x)) ⊙ up(x)), or why it is none

A formula does not depend on the weights it is given, and so is tried with weights that tell it from every other, on a
copy or for the length of a call: zeros, ones and wild ones in a norm; small matrices in float64 in an MLP. The base's
own weights cannot tell w ⊙ x̂ from (1 + w) ⊙ x̂ where a few of them are large.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.core.targets import base_of

__all__ = ["NotThis", "gate_of", "gate_parts", "norm_of"]


class NotThis(Exception):
    """Why a module is not of the kind that was asked for."""


def norm_of(module: nn.Module) -> tuple[Tensor, float]:
    """(w, ε), w in the dtype of the module's weight: the weight itself, or 1 + it where that is the convention and
    fits. Raises NotThis."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float):
        raise NotThis("it has no weight or no ε")
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        raise NotThis("it has more than a weight")
    generator = torch.Generator().manual_seed(0)
    n = len(weight)
    x, wild = torch.randn(4, n, generator=generator), torch.randn(n, generator=generator)
    x[1:, : n // 8] *= 30.0  # as real activations are: a few channels far larger than the rest,
    x[3] *= 1e-3  # and a token so small that ε matters
    wild[n // 2 :] *= 20.0
    with torch.no_grad():
        tried = [torch.zeros(n), torch.ones(n), wild]
        got = [_called_with(module, w, x) for w in tried]
        normed = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
        for plus in (0.0, 1.0):
            if all(_close(y, (w.double() + plus) * normed, 1e-5) for w, y in zip(tried, got, strict=True)):
                break
        else:
            raise NotThis("its result differs from both conventions")
        own = weight.detach()
        wide = own.double() + plus
        scale = own if not plus else wide.to(own.dtype)
        # float32 is what such a norm itself adds 1 in; fewer bits are another weight
        if own.dtype != torch.float32 and not torch.equal(scale.double(), wide):
            raise NotThis(f"1 + w does not fit {own.dtype}")
        x = x.to(own.device, own.dtype)
        y = module(x)
        normed = x.double() / (x.double().square().mean(-1, keepdim=True) + eps).sqrt()
        if y.dtype != x.dtype or not _close(y, scale.double() * normed, 4 * torch.finfo(own.dtype).eps):
            raise NotThis(f"in {own.dtype} its result differs")
    return scale, eps


def _called_with(module: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    own = module.get_parameter("weight")
    out: Tensor = torch.func.functional_call(module, {"weight": weight.to(own.device)}, (x.to(own.device),))
    return out.cpu()


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Each element within `tolerance` of its own size."""
    a, b = a.double(), b.double()
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance * b.abs() + 1e-30).all())


_PARTS = ("gate_proj", "up_proj", "gate_up_proj")


def gate_parts(module: nn.Module) -> tuple[list[nn.Module], nn.Module] | None:
    """The projections of what may be a gated MLP: [gate, up] or [both in one], and down."""
    children = dict(module.named_children())
    parts = [children[n] for n in _PARTS if n in children]
    down = children.get("down_proj")
    if down is None or not parts or not all(type(base_of(m)) is nn.Linear for m in (*parts, down)):
        return None
    return parts, down


def gate_of(module: nn.Module) -> str:
    """silu, gelu or gelu_tanh of a module with `gate_parts`. Raises NotThis."""
    act = _activation(module)
    if act is None:
        raise NotThis("its activation is not silu or gelu")
    if "forward" in module.__dict__:
        raise NotThis("its forward was replaced")
    if any(isinstance(m, nn.Dropout) and m.p for m in module.modules()):
        raise NotThis("it drops something")
    hidden, inner = 6, 10
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 4

    small = copy.copy(module)
    small._modules = dict(module._modules)
    made: dict[str, nn.Linear] = {}
    for name, child in module.named_children():
        if name not in (*_PARTS, "down_proj"):
            continue
        shape = {"down_proj": (inner, hidden), "gate_up_proj": (hidden, 2 * inner)}.get(name, (hidden, inner))
        bias = getattr(base_of(child), "bias", None) is not None
        linear = nn.Linear(*shape, bias=bias, device="meta", dtype=torch.float64)
        for key, value in linear.named_parameters():
            setattr(linear, key, nn.Parameter(random(*value.shape), requires_grad=False))
        small._modules[name] = made[name] = linear
    x = random(1, 7, hidden)
    with torch.no_grad():
        try:
            got = small(x)
        except Exception as error:  # whatever a module of another kind raises at sizes that are not its own
            raise NotThis(f"its formula could not be tried: {type(error).__name__}") from None
        if "gate_up_proj" in made:
            gate, up = made["gate_up_proj"](x).chunk(2, dim=-1)
        else:
            gate, up = made["gate_proj"](x), made["up_proj"](x)
        wanted = made["down_proj"](_ACTIVATIONS[act](gate) * up)
    if not isinstance(got, Tensor) or not _close(got, wanted, 1e-6):
        raise NotThis("its result differs from a gated MLP's")
    return act


_ACTIVATIONS: dict[str, Any] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


def _activation(module: nn.Module) -> str | None:
    function = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not callable(function):
        return None
    x = torch.linspace(-40, 40, 1001)  # to where clipped ones clip
    with torch.no_grad():
        y = function(x)
        known = _ACTIVATIONS.items()
        return next((name for name, f in known if y.shape == x.shape and torch.allclose(y, f(x), atol=1e-6)), None)
