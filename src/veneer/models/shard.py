"""A frozen base split over the processes of a run: each keeps 1/N of every weight (FSDP2, torch's `fully_shard`).

    call = shard(model, model.model.layers, device)
    loss = call(text_loss, model, ids, lengths, trained)      on every process, the same number of times
    loss.backward()

The weights of a block are gathered for its forward pass and again for its backward pass, and let go of after each; what
lies outside of the blocks (embedding, head) is there for the length of a `call`; between calls there are only parts.
Parameters of any dtype can be split, packed uint8 codes too, as long as they are `nn.Parameter`s (with
requires_grad=False); buffers stay whole. Trained tensors that are no parameters of `model`, as an attachment's, are
left whole, and nothing is done to their gradients.

There is no way back: the model is of use inside `call` alone from now on. Needs torch.distributed, initialised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Call", "blocks", "held_bytes", "shard"]

T = TypeVar("T")


class Call(Protocol):
    """Calls a function while the weights are at hand."""

    def __call__(self, act: Callable[..., T], /, *args: Any) -> T: ...


class _Whole(nn.Module):
    """A module whose forward is any function over `model`: FSDP gathers weights around a forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, act: Callable[..., Any], *args: Any) -> Any:
        return act(*args)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one after another: those of the longest list of modules, a decoder's layers."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda own: sum(p.numel() for m in own for p in m.parameters()), default=[])


def shard(model: nn.Module, parts: Iterable[nn.Module], device: torch.device) -> Call:
    """Splits every parameter of `model` along its first dimension and moves the parts to `device`, block by block, so
    that no device ever holds the whole. Returns what everything that uses the model goes through."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in parts:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    whole = _Whole(model)
    fully_shard(whole, mesh=mesh, reshard_after_forward=True)
    return whole


def held_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers that this process holds."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)
