"""Prepacked copies of frozen weights, in the order in which products read them.

At each call, a library's product repacks the weight into blocks that fill a vector or an AMX tile. If
repacking takes long enough to justify the memory of a copy (decided by the rule of the op
"prepacked_linear"), `PrepackedWeights` packs the weight once per direction and keeps the copies for the whole
run. `linear` and `token_nll` use the copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from veneer.ops.dispatch import dispatch

_ROWS = 1024
"""The number of rows of x that copies are optimized for."""


class ByteBudget:
    """A byte limit for copies of weights: `most` in total, of which `taken` are in use."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0

    def reserve(self, count: int) -> bool:
        """Reserve `count` bytes, and return whether enough bytes were left."""
        fits = self.taken + count <= self.most
        self.taken += count * fits
        return fits


class PrepackedWeights:
    """Packed copies of one weight (out, in), for x·Wᵀ and for g·W, created at first use.

    A copy is created only if `budget` has enough bytes left.

    parts: the parameters that `weight` was concatenated from, if any.

    A copy is never used after the weight has changed. Each use compares the address of the weight's values,
    and torch's version counters of the weight and of `parts`, as autograd does for saved tensors. After a
    change, the copies are dropped permanently. (As in autograd, writes through `.data` are not detected.)"""

    def __init__(self, weight: Tensor, budget: ByteBudget, parts: Sequence[Tensor] = ()) -> None:
        self._budget, self._parts = budget, tuple(parts)
        self._values = weight.detach()  # keeps the values alive, so that no other tensor can have their address
        self._seen = self._state(weight)
        self._copies: dict[bool, Any] = {}
        self._changed = False

    def _state(self, weight: Tensor) -> tuple[Any, ...]:
        at = weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype, weight.device, weight.requires_grad
        return (*at, weight._version, *(part._version for part in self._parts))

    def _drop_copies(self) -> None:
        self._budget.taken -= sum(self._bytes for _ in self._copies)
        self._copies.clear()
        self._changed = True
        del self._values

    @property
    def _bytes(self) -> int:
        """The size of one copy in bytes."""
        return self._values.numel() * self._values.element_size()

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = True) -> Tensor | None:
        """Return x·Wᵀ + b, or x·W if not `transposed`, computed with a copy.

        Return None if no copy can be used; the caller then uses the weight itself.

        weight: the weight in its current state."""
        if not self._changed and self._state(weight) != self._seen:
            self._drop_copies()
        run = None if self._changed else dispatch("prepacked_linear", x, weight, bias, transposed)
        if run is None or not (transposed in self._copies or self._budget.reserve(self._bytes)):
            return None
        if transposed not in self._copies:
            self._copies[transposed] = run.from_weight(weight if transposed else weight.t(), _ROWS)
        result: Tensor = self._copies[transposed](x, bias)
        return result
