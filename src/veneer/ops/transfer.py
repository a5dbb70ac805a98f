"""What is known of a tensor before its values are: whether it has any."""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def made_up(tensor: Tensor) -> bool:
    """Whether it has a shape, a dtype and a device, but no values: a fake or meta tensor, by which a step is traced.

    A kernel is not launched on it; what its host function allocated is the result, of the right shape."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta
