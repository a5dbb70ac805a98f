"""Sample in a thread while the previous samples are trained on.

Sampling is off-policy by one step.

    sample  1        2        3               from the pairs before step 1, before step 1, before step 2, …
    train            1        2        3

The sampler uses a copy of the pairs, made when training on samples begins and attached next to them: a few
megabytes. The copy is part of a run's state, so a resumed run samples the same, bit for bit. Also called
one-step off-policy (verl) or asynchrony level 1 (PRIME-RL).
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
"""The suffix of the copy's tensor names in a checkpoint."""


@dataclass
class OffPolicyDraws:
    """Samples one step ahead of training.

    `name`: the trained adapter. `ahead`: the thread, open during the run."""

    attachment: Attachment
    name: str
    ahead: Prefetcher
    _begun: tuple[int, Callable[[], Any]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.attachment.add(self.copy, self.attachment.adapter(self.name))

    @property
    def copy(self) -> str:
        """Return the name of the adapter that completions are sampled from."""
        return f"{self.name}, as it was"

    @property
    def state(self) -> dict[str, Tensor]:
        """Return the copy's tensors, under names that no trained tensor has."""
        return {f"{key}{DRAWN_FROM}": tensor for key, tensor in self.attachment.adapters[self.copy].tensors()}

    def take(self, number: int, make: Callable[[], Any]) -> Any:
        """Return the samples of step `number`: prefetched, or made by `make` now."""
        begun, self._begun = self._begun, None
        return self.ahead.take(begun[1] if begun is not None and begun[0] == number else make)

    def follow(self, number: int, make: Callable[[], Any]) -> None:
        """Copy the current adapter, and start sampling step `number` from the copy."""
        now = dict(self.attachment.adapter(self.name).tensors())
        for key, tensor in self.attachment.adapters[self.copy].tensors():
            tensor.copy_(now[key])
        self._begun = number, make
        self.ahead.begin(make)
