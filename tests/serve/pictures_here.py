"""A picture engine on a tiny base, adapters by digest, and asking it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from tests.image_twins import random_adapter
from tests.tiny_image_base import SIZE
from veneer.core.adapter import Adapter
from veneer.models.image import ImageBase
from veneer.models.image_generate import Settings
from veneer.serve.pictures import Drawn, PictureEngine, PictureEvent, PictureRequest
from veneer.serve.request import Refused


class Shelf:
    """Adapters by digest, and how often each was read."""

    def __init__(self, **adapters: Adapter) -> None:
        self.adapters = {adapter.digest(): adapter for adapter in adapters.values()}
        self.digest = {name: adapter.digest() for name, adapter in adapters.items()}
        self.read_of: list[str] = []

    def read(self, digest: str) -> Adapter:
        self.read_of.append(digest)
        if digest not in self.adapters:
            raise Refused(f"no adapter {digest}", status=404, code="model_not_found")
        return self.adapters[digest]


def shelf_of(base: ImageBase) -> Shelf:
    return Shelf(
        brand=random_adapter(base.model, 1),
        look=random_adapter(base.model, 2),
        dora=random_adapter(base.model, 3, dora=True),
    )


def settings(**changes: Any) -> Settings:
    return Settings(**({"width": SIZE, "height": SIZE, "steps": 3, "guidance": 3.5} | changes))


def ask(seed: int = 0, *mix: tuple[str, float], prompt: str = "a red cat", **more: Any) -> PictureRequest:
    own = {key: more.pop(key) for key in list(more) if key in Settings.__dataclass_fields__}
    return PictureRequest(prompt, settings(**own), seed=seed, mix=tuple(sorted(mix)), **more)


async def collect(
    engine: PictureEngine, *requests: PictureRequest, on_event: Callable[[int, PictureEvent], None] | None = None
) -> list[Drawn]:
    """What was drawn, in the order of the requests."""
    found: dict[int, Drawn] = {}
    async for i, event in engine.events(requests):
        if on_event is not None:
            on_event(i, event)
        if isinstance(event, Drawn):
            found[i] = event
    return [found[i] for i in range(len(requests))]


def drawn(engine: PictureEngine, *requests: PictureRequest) -> list[Drawn]:
    """All at once, each as a caller of its own."""

    async def all_of() -> Sequence[list[Drawn]]:
        return await asyncio.gather(*(collect(engine, request) for request in requests))

    return [one for (one,) in asyncio.run(all_of())]
