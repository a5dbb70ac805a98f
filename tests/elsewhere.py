"""Tensors that claim to be on a device that this machine lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OnMps(Tensor):
    """A tensor that claims to be on MPS and refuses float64. `cpu()` returns the plain tensor."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("mps", 0)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cpu:
            return args[0].as_subclass(Tensor)
        out = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(out, Tensor) and out.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return out


class OnCuda(Tensor):
    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)
