"""Context managers that attach adapters to a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from veneer.core.adapter import Adapter
from veneer.core.attach import Attachment, attach


@contextmanager
def holding(model: nn.Module, *, trainable: bool = False, **adapters: Adapter) -> Iterator[Attachment]:
    """Attach adapters by name inside a with-block, without using any of them yet."""
    with attach(model) as attachment:
        for name, adapter in adapters.items():
            attachment.add(name, adapter, trainable=trainable)
        yield attachment


@contextmanager
def attached(
    model: nn.Module, adapter: Adapter, strength: float = 1.0, *, name: str = "a", trainable: bool = False
) -> Iterator[Attachment]:
    """Attach an adapter inside a with-block, and use it with the given strength."""
    with holding(model, trainable=trainable, **{name: adapter}) as attachment:
        attachment.use((name, strength))
        yield attachment
