"""What a step on a GPU allocates, waits for and computes in float32, followed operation by operation without a GPU.

    with traced() as trace:                          CUDA tensors are made up; those of the CPU are what they are
        model = …on "cuda"…
        trace.hold("weights", model.parameters())
        step()
    trace.peak · trace.at_peak · trace.waits · trace.wide · trace.work · trace.seconds(rates)

Bytes are those of storages, from the operation that makes one to when the last tensor of it is gone, each rounded up to
512 as CUDA's caching allocator does. What an operation takes for itself while it runs (workspaces of cuBLAS) is not
seen, nor what the allocator cannot place between blocks.

A value that the host reads, a copy to the host, and one from it that is not `non_blocking`, or not from pinned memory
(`transfer.sent`), make the host wait for the device: each is noted with the line that asked for it, and answered (with
1, or with as many as there can be), so that the trace goes on. Two devices that meet in an operation raise what torch
raises.

Every kernel is noted with the operations of its products (torch's own formulas, torch.utils.flop_counter) and the bytes
of what goes into it and comes out, each once: what caches save, and what a kernel reads twice, is not seen. At given
rates a kernel takes the longer of the two, one after another.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from veneer.ops import transfer
from veneer.ops.quantised import Quantised
from veneer.ops.transfer import hearing_launches
from veneer.plan.fake_cuda import fake_cuda
from veneer.plan.time import KERNEL_BEGUN, Rates

_BLOCK = 512
"""Bytes that CUDA's caching allocator rounds every tensor up to."""
_aten = torch.ops.aten


def rounded(count: int) -> int:
    """Bytes that a tensor of `count` bytes takes of a GPU."""
    return count + -count % _BLOCK


@dataclass
class _Storage:
    """One allocation. `born`, `died`: when, on the trace's clock; 0: it lives. `made_by`: operation and line."""

    size: int
    born: int
    made_by: str
    part: str
    died: int = 0


@dataclass
class Trace:
    """What happened on the device. `wide_from`: elements from which a float32 tensor is noted.

    `waits`: places where the host waited for the device -> how often. `wide`: places that made a float32 tensor of
    `wide_from` elements -> the bytes of the largest. `casts`: places that changed a dtype -> bytes made. `work`:
    (operations, bytes) of a kernel -> how many there were. `weights`: bytes of what `hold` named so that kernels
    read."""

    wide_from: int = 1 << 22
    live: int = 0
    peak: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    wide: dict[str, int] = field(default_factory=dict)
    casts: Counter[str] = field(default_factory=Counter)
    operations: int = 0
    work: Counter[tuple[int, int]] = field(default_factory=Counter)
    weights: int = 0
    _over: bool = False
    _clock: int = 0
    _peak_at: int = 0
    _all: list[_Storage] = field(default_factory=list, repr=False)
    _living: dict[int, tuple[_Storage, Any]] = field(default_factory=dict, repr=False)

    def hold(self, part: str, tensors: Iterable[Tensor | None]) -> int:
        """Says what these tensors are ("weights", "optimizer", …), for `at_peak`; their bytes."""
        total = 0
        for tensor in tensors:
            for one in _kept(tensor):
                found = self._living.get(one.untyped_storage()._cdata)
                if found is not None:
                    found[0].part = part
                    total += found[0].size
        return total

    def begin(self) -> None:
        """What is noted begins here; what lives goes on."""
        self.peak, self._peak_at = self.live, self._clock
        self.waits, self.wide, self.casts, self.operations = Counter(), {}, Counter(), 0
        self.work, self.weights = Counter(), 0
        self._all = [storage for storage, _ in self._living.values()]

    def end(self) -> None:
        """What is noted ends here: undoing a step's swaps makes tensors too."""
        self._over = True

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes at the peak by part: those named to `hold`, and of the rest "forward" and "backward", by when they were
        made."""
        out: Counter[str] = Counter()
        for storage in self._standing():
            out[storage.part] += storage.size
        return dict(out.most_common())

    def makers(self, part: str) -> dict[str, int]:
        """Bytes of a part at the peak by what made them."""
        out: Counter[str] = Counter()
        for storage in self._standing():
            if storage.part == part:
                out[storage.made_by] += storage.size
        return dict(out.most_common())

    @property
    def kernels(self) -> int:
        """How many were begun."""
        return self.work.total()

    def seconds(self, rates: Rates) -> float:
        """Σ over kernels max(operations / rate, bytes / bandwidth)"""
        return sum(n * max(o / rates.operations, b / rates.bandwidth) for (o, b), n in self.work.items())

    @property
    def begun_seconds(self) -> float:
        """What the host takes to begin them, beside which the device works."""
        return self.kernels * KERNEL_BEGUN

    def _standing(self) -> Iterator[_Storage]:
        at = self._peak_at
        return (s for s in self._all if s.born <= at and (not s.died or s.died > at))

    # -- what the mode tells

    def made(self, tensor: Tensor, operation: str) -> None:
        """`tensor` came out of an operation."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if self._over or key in self._living:
            return
        self._clock += 1
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        part = "forward" if node is None else "backward"
        new = _Storage(rounded(storage.nbytes()), self._clock, f"{operation} {place()}", part)
        self._all.append(new)
        self._living[key] = new, weakref.ref(storage, lambda _: self._gone(key))
        self.live += new.size
        if self.live > self.peak:
            self.peak, self._peak_at = self.live, self._clock
        if tensor.dtype in (torch.float32, torch.float64) and tensor.numel() >= self.wide_from:
            self.wide[new.made_by] = max(new.size, self.wide.get(new.made_by, 0))

    def _gone(self, key: int) -> None:
        storage, _ = self._living.pop(key)
        self._clock += 1
        storage.died = self._clock
        self.live -= storage.size

    def ran(self, tensors: Iterable[Tensor], operations: int = 0) -> None:
        """A kernel read or wrote these."""
        if self._over:
            return
        size = 0
        for tensor in tensors:
            own = _elements(tensor) * tensor.element_size()
            size += own
            found = self._living.get(tensor.untyped_storage()._cdata)
            self.weights += own * (found is not None and found[0].part == "weights")
        self.work[operations, size] += 1

    def waited(self, operation: str) -> None:
        if not self._over:
            self.waits[f"{operation} {place()}"] += 1


def _kept(tensor: Tensor | None) -> list[Tensor]:
    if tensor is None:
        return []
    return list(tensor.stored.tensors().values()) if isinstance(tensor, Quantised) else [tensor]


def _elements(tensor: Tensor) -> int:
    """Those that lie in memory: one that is expanded has its own alone."""
    return math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step)


_OWN = ("/veneer/plan/trace.py", "/veneer/plan/fake_cuda.py", "/torch/")


def place() -> str:
    """The line outside of torch that is running: package/…/file.py:line function."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not any(part in name for part in _OWN) and not name.startswith("<"):
            for top in ("/site-packages/", "/src/"):
                name = name.rpartition(top)[2]
            return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "autograd"


@contextmanager
def traced(*, wide_from: int = 1 << 22, capability: tuple[int, int] = (9, 0)) -> Iterator[Trace]:
    """A trace of the with-block, in which CUDA tensors are made up (see `fake_cuda`)."""
    trace = Trace(wide_from)

    def heard(tensors: list[Tensor]) -> None:
        trace.ran(t for t in tensors if t.device.type == "cuda")

    pins = mock.patch.object(transfer, "pinned", _pinned)
    with fake_cuda(capability=capability), pins, hearing_launches(heard), _Following(trace):
        yield trace


_PINNED = "pinned_for_a_trace"


def _pinned(tensor: Tensor) -> Tensor:
    """Of `transfer.pinned`, where there is no GPU to copy from it."""
    tensor = tensor.detach()
    setattr(tensor, _PINNED, True)
    return tensor


class _Following(TorchDispatchMode):
    """Every operation: those on the CPU as they are, those on the made-up device noted."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(t, Quantised) for t in types):
            return NotImplemented  # it makes operations on its codes of this, and those come here
        given = list(_tensors((*args, *kwargs.values())))
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        fakes = [t for t in given if isinstance(t, FakeTensor) and t.device.type == "cuda"]
        if not fakes and target != "cuda":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        trace, packet, name = self.trace, func.overloadpacket, func.overloadpacket.__name__
        trace.operations += not trace._over
        answer = _ANSWERS.get(packet)
        if answer is not None:
            trace.waited(name)
            with unset_fake_temporarily() if packet in _READ else _as_is():
                return answer(*args, **kwargs)
        if packet is _aten.index and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:])):
            trace.waited("index by a mask")
            args = (args[0], [_every(i) for i in args[1]])
        queued = kwargs.get("non_blocking", len(args) > 2 and args[2] is True)
        if queued and packet in _COPIES:  # from pageable memory nobody but the host copies
            source = given[0 if packet is _aten._to_copy else 1]
            queued = source.device.type != "cpu" or hasattr(source, _PINNED)
        if packet in _COPIES and not queued:
            ends = {t.device.type for t in given} | ({target} if target else set())
            if len(ends) > 1:
                there = (target or given[0].device.type) == "cuda"
                trace.waited("copy to the device" if there else "copy to the host")
        if target == "cpu" and packet is _aten._to_copy:  # made up as well: its values are nobody's
            with unset_fake_temporarily():
                return torch.ones(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        out = func(*args, **kwargs)
        if packet is _aten._to_copy and fakes and out.dtype != fakes[0].dtype and not trace._over:
            trace.casts[f"{fakes[0].dtype} to {out.dtype} {place()}".replace("torch.", "")] += out.nbytes
        come = [t for t in _tensors((out,)) if isinstance(t, FakeTensor) and t.device.type == "cuda"]
        for tensor in come:
            trace.made(tensor, name)
        if not _free(func, name, fakes, come):
            formula = flop_registry.get(packet) or flop_registry.get(getattr(_aten, name.removesuffix("_"), None))
            operations = 0 if formula is None else formula(*args, **kwargs, out_val=out)
            trace.ran([*come, *(come if packet in _LOOKS_UP else fakes)], operations)
        return out


def _free(func: Any, name: str, given: list[Any], come: list[Any]) -> bool:
    """Whether nothing runs: a question to a tensor, a view, or memory that nobody has written yet."""
    if not (come or func._schema.is_mutable) or func.is_view or name.startswith(("empty", "new_empty")):
        return True
    inside = {t.untyped_storage()._cdata for t in given}
    return not func._schema.is_mutable and all(t.untyped_storage()._cdata in inside for t in come)


@contextmanager
def _as_is() -> Iterator[None]:
    yield


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _scalar(x: Tensor) -> Any:
    return True if x.dtype == torch.bool else 1.0 if x.dtype.is_floating_point else 1


def _every(index: Tensor | None) -> Tensor | None:
    """A mask as the indices of all that it could let through."""
    if index is None or index.dtype not in (torch.bool, torch.uint8) or index.ndim != 1:
        return index
    return torch.empty(len(index), dtype=torch.int64, device=index.device)


def _nonzero(x: Tensor) -> Tensor:
    return torch.empty(x.numel(), x.ndim, dtype=torch.int64, device=x.device)


_ANSWERS: dict[Any, Any] = {
    _aten._local_scalar_dense: _scalar,
    _aten.item: _scalar,
    _aten.equal: lambda *_: True,
    _aten.nonzero: _nonzero,
    _aten.masked_select: lambda x, mask: x.new_empty(x.numel()),
}
_READ = {_aten._local_scalar_dense, _aten.item, _aten.equal}
"""Those whose answer is no tensor."""
_COPIES = {_aten._to_copy, _aten.copy_, _aten.copy}
_LOOKS_UP = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather}
"""Those that read as much as they write, whatever they read it from."""
