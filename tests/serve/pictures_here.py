"""Helpers: a picture engine on a tiny base, a source of adapters, a catalog, and a server."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI

from tests.image_twins import random_adapter
from tests.serve.http.toy import ToyText
from tests.tiny_image_base import SIZE
from veneer.adapters.use import load_adapter
from veneer.core.adapter import Adapter
from veneer.errors import MismatchError
from veneer.models.image.base import ImageBase
from veneer.models.image.generate import PictureSettings
from veneer.serve.access import ModelCard, OpenAccess, ResolvedModel, Tenancy
from veneer.serve.http.app import create_app
from veneer.serve.http.service import Service
from veneer.serve.pictures.engine import PictureEngine
from veneer.serve.pictures.request import FinishedPicture, PictureEvent, PictureRequest
from veneer.serve.principal import Principal
from veneer.serve.request import Refused, make_mix
from veneer.serve.settings import HttpSettings


class Shelf:
    """Provides adapters by digest and records each read."""

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


def settings(**changes: Any) -> PictureSettings:
    return PictureSettings(**({"width": SIZE, "height": SIZE, "steps": 3, "guidance": 3.5} | changes))


def ask(seed: int = 0, *mix: tuple[str, float], prompt: str = "a red cat", **more: Any) -> PictureRequest:
    own = {key: more.pop(key) for key in list(more) if key in PictureSettings.__dataclass_fields__}
    return PictureRequest(prompt, settings(**own), seed=seed, mix=tuple(sorted(mix)), **more)


async def collect(
    engine: PictureEngine, *requests: PictureRequest, on_event: Callable[[int, PictureEvent], None] | None = None
) -> list[FinishedPicture]:
    """Return the finished pictures in the order of the requests."""
    found: dict[int, FinishedPicture] = {}
    async for i, event in engine.events(requests):
        if on_event is not None:
            on_event(i, event)
        if isinstance(event, FinishedPicture):
            found[i] = event
    return [found[i] for i in range(len(requests))]


def drawn(engine: PictureEngine, *requests: PictureRequest) -> list[FinishedPicture]:
    """Return the pictures of requests that run concurrently, each as a separate client.

    A single request does not wait for others to batch with.
    """

    async def all_of() -> Sequence[list[FinishedPicture]]:
        return await asyncio.gather(*(collect(engine, request) for request in requests))

    window = engine.window
    engine.window = window if len(requests) > 1 else 0.0
    try:
        return [one for (one,) in asyncio.run(all_of())]
    finally:
        engine.window = window


class Names:
    """A catalog of the shelf's adapters, and of adapter files that are checked when requested."""

    base = "tiny"

    def __init__(self, base: ImageBase, shelf: Shelf, files: dict[str, str] | None = None) -> None:
        self.of, self.shelf, self.files = base, shelf, files or {}

    async def fresh(self) -> None:
        """Do nothing, because the names never change."""

    def in_memory(self) -> list[Any]:
        return []

    def resolve(self, model: str, caller: Principal) -> ResolvedModel:
        name = model.removeprefix("tiny:")
        if name in ("", "tiny"):
            return ResolvedModel((), model, self.base)
        if name in self.files:
            try:
                load_adapter(self.of, self.files[name])
            except MismatchError as error:
                raise Refused(error.what, status=400, code="adapter_unusable", param="model") from error
        if name not in self.shelf.digest or not caller.sees(name):
            raise Refused(f"the model {model!r} does not exist", status=404, code="model_not_found", param="model")
        return ResolvedModel(((self.shelf.digest[name], 1.0),), model, name)

    def resolve_mix(self, parts: Sequence[tuple[str, float]], caller: Principal) -> ResolvedModel:
        found = [self.resolve(name, caller).mix for name, _ in parts]
        mix = [(d, s * own) for one, (_, s) in zip(found, parts, strict=True) for d, own in one]
        return ResolvedModel(make_mix(mix), "mix", "mix", digests=tuple(one[0][0] if one else "" for one in found))

    def models(self, caller: Principal) -> list[ModelCard]:
        return [ModelCard(name, name, self.base, 0, digest) for name, digest in self.shelf.digest.items()]


def picture_app(
    engine: PictureEngine, names: Names, tenancy: Tenancy | None = None, settings: HttpSettings | None = None
) -> FastAPI:
    limits = settings or HttpSettings(max_body=64 << 20)
    return create_app(Service(engine, names, tenancy or OpenAccess(), ToyText(), limits))
