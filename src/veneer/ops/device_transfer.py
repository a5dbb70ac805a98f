"""Asynchronous transfers between CPU and device, and detection of fake tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor has no values: a meta tensor, or a fake tensor of torch.compile."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def put_numbers(device: torch.device, *lists: Sequence[int]) -> list[Tensor]:
    """Return each list as an int64 tensor on a device, with one asynchronous copy."""
    flat = [n for each in lists for n in each]
    return list(sent(torch.tensor(flat, dtype=torch.int64), device).split([len(each) for each in lists]))


def in_float64(tensor: Tensor) -> Tensor:
    """Return `tensor` as float64, with autograd.

    MPS does not support float64, so for an MPS tensor the result is on the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def pinned(tensor: Tensor) -> Tensor:
    """Return a CPU tensor in page-locked memory, or unchanged if torch has no GPU."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; copies to a GPU are asynchronous.

    A copy to a GPU reads page-locked memory and is queued behind earlier work while the CPU continues; torch
    keeps the memory until the copy is done. A copy from a GPU to the CPU blocks until the copy is done."""
    if device.type == "cpu":
        return tensor.to(device)
    if is_fake(tensor):
        return tensor if tensor.device.type == device.type else torch.empty_like(tensor, device=device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = pinned(tensor)
    return tensor.to(device, non_blocking=True)
