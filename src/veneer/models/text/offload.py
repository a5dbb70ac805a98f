"""Keep the inputs of recomputed layers in CPU memory until the backward pass.

    store = ActivationOffloader(CudaCopyStream(device))
    y = store.checkpoint(layer, x)        like torch.utils.checkpoint; x is on the host until y's gradient

A recomputed layer keeps only its input: e·tokens·hidden bytes. Over all layers these inputs are the memory
that grows with a micro-batch (70B, 8,192 tokens: 10.7 GB). Each input is copied to the host while the next
layer computes, on a separate stream, and copied back while the layer after it computes backward. The device
holds at most `COPIES_OUT` outgoing inputs, the current layer's input, the requested input and the one before
it. Host buffers are page-locked and reused by later steps once autograd has released them.

Copies on one stream run in order, so a buffer is never overwritten before it was read, and is filled before
it is copied back. Events order the two streams; device memory that the other stream reads is not
freed before (record_stream).
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from veneer.ops.step_sizes import COPIES_OUT

_LEAST = 1 << 20
"""Minimum size in bytes of a tensor to offload."""


class CopyStream(Protocol):
    """A copy stream next to the compute stream.

    A returned event is recorded at the end of a copy."""

    def to_host(self, source: Tensor, into: Tensor) -> Any:
        """Copy to the host after all work issued so far.

        The caller can drop `source` at once."""

    def to_device(self, source: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """Copy to the device; return the tensor and its event.

        The tensor can be read after the event."""

    def wait(self, event: Any) -> None:
        """Make subsequent compute wait for the event."""

    def record_use(self, tensor: Tensor) -> None:
        """Keep a copied tensor allocated until the compute stream has used it."""


class CudaCopyStream:
    """A copy stream on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def to_host(self, source: Tensor, into: Tensor) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
        source.record_stream(self._stream)
        return self._stream.record_event()

    def to_device(self, source: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        with torch.cuda.stream(self._stream):
            out = source.to(device, non_blocking=True)
        return out, self._stream.record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def record_use(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self._device))


class _Waiting:
    """A tensor on the host.

    `previous`: the tensor offloaded just before it, which the backward pass needs next."""

    def __init__(self, host: Tensor, device: torch.device, previous: weakref.ref[_Waiting] | None) -> None:
        self.host, self.device, self.previous = host, device, previous
        self.coming: tuple[Tensor, Any] | None = None


class ActivationOffloader:
    """Offloads layer inputs to the host.

    `least`: minimum size in bytes of a tensor to offload."""

    def __init__(self, stream: CopyStream, *, least: int = _LEAST) -> None:
        self._copies, self._least = stream, least
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._out: deque[Any] = deque()
        self._last: weakref.ref[_Waiting] | None = None

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run torch.utils.checkpoint on `function`, with its arguments saved on the host."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    def release(self) -> None:
        """Free the unused host buffers."""
        self._free.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Waiting:
        if tensor.nbytes < self._least or not tensor.is_floating_point():
            return tensor
        free = self._free[tensor.shape, tensor.dtype]
        host = free.pop() if free else _on_host(tensor)
        if len(self._out) == COPIES_OUT:
            self._copies.wait(self._out.popleft())
        self._out.append(self._copies.to_host(tensor.detach(), host))
        waiting = _Waiting(host, tensor.device, self._last)
        weakref.finalize(waiting, free.append, host)
        self._last = weakref.ref(waiting)
        return waiting

    def _unpack(self, saved: Tensor | _Waiting) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        tensor, event = self._coming(saved)
        saved.coming = None
        previous = saved.previous() if saved.previous is not None else None
        if previous is not None:
            self._coming(previous)
        self._copies.wait(event)
        self._copies.record_use(tensor)
        return tensor

    def _coming(self, waiting: _Waiting) -> tuple[Tensor, Any]:
        if waiting.coming is None:
            waiting.coming = self._copies.to_device(waiting.host, waiting.device)
        return waiting.coming


def _on_host(like: Tensor) -> Tensor:
    """Allocate a host tensor like `like`, page-locked if `like` is on a GPU."""
    pin = like.device.type == "cuda"
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pin)
