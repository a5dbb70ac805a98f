"""Draws that a thread makes while what was drawn before is trained on: off-policy by one draw.

    draw  1        2        3                 from the pairs before draw 1, before draw 1, before draw 2, …
    train          1        2        3

What is drawn from is a copy of the pairs, made when training on a draw begins, beside them on the attachment: a few
megabytes. It is a part of a run's state, so that a run that is resumed draws again what it would have had, bit for bit.
Known elsewhere as one-step off-policy (verl) or an asynchrony of level 1 (PRIME-RL).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from veneer.train.prefetch import Prefetcher

if TYPE_CHECKING:
    from veneer.core.attach import Attachment

DRAWN_FROM = "@drawn from"
"""What the names of the copy's tensors end with in a checkpoint."""


@dataclass
class OffPolicyDraws:
    """`name`: of the adapter that is trained. `ahead`: the thread, open as long as this is used."""

    attachment: Attachment
    name: str
    ahead: Prefetcher
    _begun: tuple[int, Callable[[], Any]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.attachment.add(self.copy, self.attachment.adapter(self.name))

    @property
    def copy(self) -> str:
        """The adapter that answers are drawn from."""
        return f"{self.name}, as it was"

    @property
    def state(self) -> dict[str, Tensor]:
        """The copy's tensors, under names that no trained one has."""
        return {f"{key}{DRAWN_FROM}": tensor for key, tensor in self.attachment.adapters[self.copy].tensors()}

    def take(self, number: int, make: Callable[[], Any]) -> Any:
        """The draw of step `number`: the one that was begun, or what `make` makes now."""
        begun, self._begun = self._begun, None
        return self.ahead.take(begun[1] if begun is not None and begun[0] == number else make)

    def follow(self, number: int, make: Callable[[], Any]) -> None:
        """The copy becomes the adapter as it is now, and the thread makes the draw of step `number` from it."""
        now = dict(self.attachment.adapter(self.name).tensors())
        for key, tensor in self.attachment.adapters[self.copy].tensors():
            tensor.copy_(now[key])
        self._begun = number, make
        self.ahead.begin(make)
