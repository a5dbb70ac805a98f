"""Images and errors in the Studio equal those of the HTTP route."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.serve.http.test_telemetry import collector  # noqa: F401
from tests.serve.http.test_traces import spans
from tests.serve.http.toy import responses, served, wait_for
from tests.serve.pictures_here import Names, picture_app, shelf_of
from tests.tiny_image_base import tiny_image_base
from veneer.models.image.base import load_image
from veneer.serve.http.image_requests import ImageBody, ask_pictures, checked_image_body
from veneer.serve.http.service import Service
from veneer.serve.pictures.engine import PictureEngine
from veneer.serve.pictures.request import FinishedPicture, PictureStep
from veneer.serve.principal import Principal
from veneer.serve.request import Refused


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    base = load_image(str(tiny_image_base(tmp_path_factory.getbasetemp(), "flux1")))
    names = Names(base, shelf_of(base))
    with PictureEngine(base, names.shelf.read, window=0.01) as engine:
        made: Service = picture_app(engine, names).state.service
        yield made


def test_an_image_request_has_the_spans_of_a_text_request(service: Service, collector: Any) -> None:  # noqa: F811
    engine: Any = service.engine
    app = picture_app(engine, service.catalog)  # type: ignore[arg-type]
    (answer,) = responses(app, [{"method": "POST", "url": "/v1/images/generations", "json": BODY}])
    assert answer.status_code == 200
    wait_for(lambda: len(spans(collector[1])) == 4, 60)
    found = {span.name: span for span in spans(collector[1])}
    door = found.pop("POST /v1/images/generations")
    assert set(found) == {"queue", "engine", "ledger"}
    assert {span.parent_span_id for span in found.values()} == {door.span_id}
    values = {each.key: each.value for each in door.attributes}
    assert values["gen_ai.operation.name"].string_value == "generate_content"
    assert values["gen_ai.usage.output_tokens"].int_value > 0
    assert not any(b"a red cat" in body for body in collector[1])


BODY = {"prompt": "a red cat", "mix": ["look:0.7", "brand:-0.2"], "num_inference_steps": 2, "seed": 7, "n": 2}


def test_the_studio_gets_the_same_pictures_as_the_route(service: Service) -> None:
    asked = checked_image_body(ImageBody, BODY, 4)

    async def drawn(caller: Principal) -> tuple[list[int], list[bytes]]:
        plan, events = await ask_pictures(service, caller, asked, "view-1")
        made: dict[int, bytes] = {}
        steps: list[int] = []
        async with aclosing(events):
            async for i, event in events:
                if isinstance(event, PictureStep):
                    steps.append(i)
                if isinstance(event, FinishedPicture):
                    made[i] = event.picture.image.tobytes()
        assert [request.seed for request in plan.requests] == [7, 8]
        return steps, [made[0], made[1]]

    steps, mine = asyncio.run(drawn(Principal("open")))
    assert {0, 1} <= set(steps)
    engine: Any = service.engine
    with served(picture_app(engine, service.catalog)) as at:  # type: ignore[arg-type]
        sent = httpx.post(f"{at}/v1/images/generations", json=BODY, timeout=60).json()["data"]
    assert mine == [Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).tobytes() for one in sent]
    with pytest.raises(Refused) as caught:
        asyncio.run(drawn(Principal("tenant", "acme", sees=lambda name: name == "look")))
    assert caught.value.status == 404
