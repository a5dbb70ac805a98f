"""What layers are recomputed from, in the CPU's memory between a forward and a backward pass.

    store = HostStore(CudaLane(device))
    y = store.checkpoint(layer, x)        as torch.utils.checkpoint; x waits on the host until y's gradient is there

A layer that is recomputed keeps its input alone: e·tokens·hidden bytes, of all layers together what grows with a
micro-batch (70B, 8,192 tokens: 10.7 GB). Each goes to the host while the next layer computes, on a stream of its own,
and comes back while the layer after it computes backward. On the device are at most those on their way: `COPIES_OUT`
that go and the layer's own, the one that is wanted and the one before it. Buffers on the host are pinned, and used
again by later steps once nothing of autograd's asks for what they hold.

Copies of one stream follow one another, so a buffer is never written before it was read, and what comes back was there
before. `mark`s (events) say where one stream waits for the other; memory of the device that the other stream reads is
not given away before (record_stream).
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from veneer.ops.device_transfer import sent
from veneer.ops.step_sizes import COPIES_OUT

_LEAST = 1 << 20
"""Bytes from which a tensor is worth a copy."""


class Lane(Protocol):
    """A queue of copies beside what computes. What it gives back as a mark stands for the end of a copy."""

    def out(self, source: Tensor, into: Tensor) -> Any:
        """Copies to the host, once all that was computed so far is there. `source` may be dropped at once."""

    def back(self, source: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        """Copies to the device: the tensor, and the mark from which on it may be read."""

    def wait(self, mark: Any) -> None:
        """What is computed from now on comes after the mark."""

    def handed_over(self, tensor: Tensor) -> None:
        """A tensor that came back belongs to what computes from now on."""


class CudaLane:
    """A stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def out(self, source: Tensor, into: Tensor) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
        source.record_stream(self._stream)
        return self._stream.record_event()

    def back(self, source: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        with torch.cuda.stream(self._stream):
            out = source.to(device, non_blocking=True)
        return out, self._stream.record_event()

    def wait(self, mark: Any) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def handed_over(self, tensor: Tensor) -> None:
        tensor.record_stream(torch.cuda.current_stream(self._device))


class InOrder:
    """No queue: each copy where it is asked for. For tensors without values, by which a step is traced."""

    def out(self, source: Tensor, into: Tensor) -> Any:
        into.copy_(source, non_blocking=True)

    def back(self, source: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        return sent(source, device), None

    def wait(self, mark: Any) -> None:
        """Nothing is on its way."""

    def handed_over(self, tensor: Tensor) -> None:
        """It is nobody else's."""


class _Waiting:
    """A tensor on the host. `before`: the one that went just before it, which a backward pass wants next."""

    def __init__(self, held: Tensor, device: torch.device, before: weakref.ref[_Waiting] | None) -> None:
        self.held, self.device, self.before = held, device, before
        self.coming: tuple[Tensor, Any] | None = None


class HostStore:
    """`least`: bytes from which a tensor goes to the host."""

    def __init__(self, lane: Lane, *, least: int = _LEAST) -> None:
        self._lane, self._least = lane, least
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = defaultdict(list)
        self._out: deque[Any] = deque()
        self._last: weakref.ref[_Waiting] | None = None

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """torch.utils.checkpoint's of `function`, which keeps its arguments by autograd's hooks for saved tensors."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    def let_go(self) -> None:
        """Of the buffers on the host that nobody uses."""
        self._free.clear()

    def _pack(self, tensor: Tensor) -> Tensor | _Waiting:
        if tensor.nbytes < self._least or not tensor.is_floating_point():
            return tensor
        free = self._free[tensor.shape, tensor.dtype]
        held = free.pop() if free else _on_host(tensor)
        if len(self._out) == COPIES_OUT:
            self._lane.wait(self._out.popleft())
        self._out.append(self._lane.out(tensor.detach(), held))
        waiting = _Waiting(held, tensor.device, self._last)
        weakref.finalize(waiting, free.append, held)
        self._last = weakref.ref(waiting)
        return waiting

    def _unpack(self, kept: Tensor | _Waiting) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        tensor, mark = self._coming(kept)
        kept.coming = None
        before = kept.before() if kept.before is not None else None
        if before is not None:
            self._coming(before)
        self._lane.wait(mark)
        self._lane.handed_over(tensor)
        return tensor

    def _coming(self, waiting: _Waiting) -> tuple[Tensor, Any]:
        if waiting.coming is None:
            waiting.coming = self._lane.back(waiting.held, waiting.device)
        return waiting.coming


def _on_host(like: Tensor) -> Tensor:
    """Room for such a tensor, pinned where there is a GPU."""
    pin = like.device.type == "cuda"
    return torch.empty(like.shape, dtype=like.dtype, device="cpu", pin_memory=pin)
