"""A frozen weight laid out a second time, in the order in which products read it, for as long as a run lasts.

A library's product lays its weight out anew at each call, in blocks that fill a vector or a tile of AMX. Where that
takes time worth its memory (the rule of the op "prepacked_linear" says so), `PrepackedWeights` have it done once for
each direction. `linear` and `token_nll` ask it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from veneer.ops.dispatch import dispatch

_ROWS = 1024
"""Rows of the products that a copy is laid out for."""


class ByteBudget:
    """Bytes that copies of weights may take together: `most`, of which `taken` are gone."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, 0

    def take(self, count: int) -> bool:
        """Whether there are as many left; then they are taken."""
        fits = self.taken + count <= self.most
        self.taken += count * fits
        return fits


class PrepackedWeights:
    """The copies of one weight (out, in), for x·Wᵀ and for g·W, each made at its first use if `room` has bytes for it.

    `parts`: the parameters whose values lie in the weight, where it is several of them joined. A copy is never read
    once anything else may be in the weight: each use compares where its values lie and how many writes to it and its
    parts torch has counted, by which autograd tells that a saved tensor has changed. After a change there are no copies
    any more. (As for autograd, a write through `.data` is not counted.)"""

    def __init__(self, weight: Tensor, room: ByteBudget, parts: Sequence[Tensor] = ()) -> None:
        self._room, self._parts = room, tuple(parts)
        self._values = weight.detach()  # as long as these live nothing else can come to lie where they do
        self._seen = self._state(weight)
        self._copies: dict[bool, Any] = {}
        self._changed = False

    def _state(self, weight: Tensor) -> tuple[Any, ...]:
        at = weight.data_ptr(), tuple(weight.shape), weight.stride(), weight.dtype, weight.device, weight.requires_grad
        return (*at, weight._version, *(part._version for part in self._parts))

    def _let_go(self) -> None:
        self._room.taken -= sum(self._bytes for _ in self._copies)
        self._copies.clear()
        self._changed = True
        del self._values

    @property
    def _bytes(self) -> int:
        """Of a copy."""
        return self._values.numel() * self._values.element_size()

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = True) -> Tensor | None:
        """x·Wᵀ + b, or, not `transposed`, x·W by the copy for it; None: by the weight itself. `weight`: as it is
        now."""
        if not self._changed and self._state(weight) != self._seen:
            self._let_go()
        run = None if self._changed else dispatch("prepacked_linear", x, weight, bias, transposed)
        if run is None or not (transposed in self._copies or self._room.take(self._bytes)):
            return None
        if transposed not in self._copies:
            self._copies[transposed] = run.of(weight if transposed else weight.t(), _ROWS)
        made: Tensor = self._copies[transposed](x, bias)
        return made
