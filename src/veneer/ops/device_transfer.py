"""Between the CPU and a device: whether a tensor has values at all, and how numbers get there without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def made_up(tensor: Tensor) -> bool:
    """Whether it has a shape, a dtype and a device, but no values: a fake or meta tensor, by which a step is traced.

    A kernel is not launched on it; what its host function allocated is the result, of the right shape."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def put_numbers(device: torch.device, *lists: Sequence[int]) -> list[Tensor]:
    """Each list as a tensor of int64 on a device, all in one copy that nobody waits for: what a step has to tell it."""
    flat = [n for each in lists for n in each]
    return list(sent(torch.tensor(flat, dtype=torch.int64), device).split([len(each) for each in lists]))


def in_float64(tensor: Tensor) -> Tensor:
    """Return `tensor` in float64, keeping gradients: on its device, or on the CPU if the device lacks float64 (MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def pinned(tensor: Tensor) -> Tensor:
    """A tensor of the CPU in memory from which a GPU copies by itself; as it is where torch can use no GPU."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. To a GPU it goes from pinned memory, so that the copy is queued behind the work before it
    and the CPU goes on; torch keeps pinned memory until its copy is done. What comes from there has to be waited
    for."""
    if device.type == "cpu":
        return tensor.to(device)
    if made_up(tensor):
        return tensor if tensor.device.type == device.type else torch.empty_like(tensor, device=device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = pinned(tensor)
    return tensor.to(device, non_blocking=True)
