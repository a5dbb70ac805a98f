"""A route's shadow on an image base: its picture is compared and never sent."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator

import httpx
import pytest
from PIL import Image

from tests.serve.http.toy import Noting
from tests.serve.pictures_here import Names, picture_app, served, shelf_of
from tests.tiny_image_base import tiny_image_base
from veneer.models.image.base import load_image
from veneer.serve.access import BEHIND, ResolvedModel
from veneer.serve.pictures.engine import PictureEngine
from veneer.serve.pictures.request import PictureRequest
from veneer.serve.principal import Principal


class Shadowed(Names):
    """`stable` names look and has a shadow."""

    shadow = ("", "")

    def resolve(self, model: str, caller: Principal) -> ResolvedModel:
        if model != "stable":
            return super().resolve(model, caller)
        name, digest = self.shadow
        return ResolvedModel(((self.shelf.digest["look"], 1.0),), model, "look", (name, ((digest, 1.0),)))


def pixels(b64: str) -> bytes:
    return Image.open(io.BytesIO(base64.b64decode(b64))).tobytes()


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Shadowed:
    base = load_image(str(tiny_image_base(tmp_path_factory.getbasetemp(), "flux1")))
    return Shadowed(base, shelf_of(base))


@pytest.fixture(scope="module")
def engine(names: Shadowed) -> Iterator[PictureEngine]:
    with PictureEngine(names.of, names.shelf.read, window=0.01) as opened:
        yield opened


@pytest.mark.parametrize("shadow", ["brand", "look", "gone"])
def test_an_image_shadow_runs_and_is_never_sent(
    engine: PictureEngine, names: Shadowed, shadow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another adapter's picture differs, the same adapter's is equal, and a failed one changes no answer."""
    tenancy = Noting()
    answers = tenancy.answers
    drawn: list[PictureRequest] = []
    own = engine.events
    monkeypatch.setattr(engine, "events", lambda requests: drawn.extend(requests) or own(requests))
    names.shadow = shadow, names.shelf.digest.get(shadow, "gone")
    with served(picture_app(engine, names, tenancy)) as at:

        def ask(model: str) -> str:
            body = {"prompt": "a cat", "model": model, "num_inference_steps": 2, "seed": 7}
            return str(httpx.post(f"{at}/v1/images/generations", json=body).json()["data"][0]["b64_json"])

        sent, plain = ask("stable"), ask("look")
        assert pixels(sent) == pixels(plain)
        until = time.monotonic() + 60
        while not answers and time.monotonic() < until:
            time.sleep(0.02)
    assert {r.tenant for r in drawn if r.id.endswith("-shadow")} == {BEHIND}, "a shadow takes no tenant's turn"
    (answer,) = answers
    assert (answer.name, answer.target, answer.shadow) == ("stable", "look", shadow)
    assert bool(answer.error) == (shadow == "gone")
    assert (answer.sent == answer.answer) == (shadow == "look")
    assert (answer.distance == 0) == (shadow == "look")
    assert 0 <= answer.distance <= 1
