"""The Compare view of a server with an image base.

The base, adapters and mixes generate images with the same seeds. One adapter can also be compared at several
strengths."""

from __future__ import annotations

import asyncio
import base64
import uuid
from contextlib import aclosing
from typing import Any, cast

from veneer.errors import ConfigError
from veneer.imaging.infotext import encoded
from veneer.models.image.generate import default_settings
from veneer.serve.http.errors import message_of
from veneer.serve.http.image_requests import ImageBody, ask_pictures, checked_image_body
from veneer.serve.pictures.engine import PictureEngine
from veneer.serve.pictures.request import FinishedPicture, PictureStep
from veneer.serve.request import Refused
from veneer.studio.compare_board import MAX_COLUMNS, Board, Column
from veneer.studio.components import Images
from veneer.studio.elements import box, button, command, details, line, permit
from veneer.studio.page import ViewPage

_SEEDS = 4
_STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25)
"""The strengths at which one adapter can be compared."""


class ImageBoard(Board):
    def __init__(self, page: ViewPage) -> None:
        super().__init__(page)
        self.engine = cast(PictureEngine, page.studio.service.engine)

    def draw(self) -> None:
        page, (steps, guidance) = self.page, default_settings(self.engine.base)
        page.title("Compare", "One prompt and the same seeds for the base, adapters and mixes.")
        with box("div", "ask"):
            self.draw_prompt("Describe an image. Every column generates it.")
            with details("Image settings"), box("div", "settings"):
                self.seed = self.number_field("First seed", "seed", 7, low=0, high=2**32 - 1, step=1)
                self.n = self.number_field("Seeds", "n", 1, low=1, high=_SEEDS, step=1)
                self.steps = self.number_field("Steps", "steps", steps, low=1, high=200, step=1)
                self.guidance = self.number_field("Guidance", "guidance", guidance, low=0, high=50, step=0.5)
                self.size = self.text_field("Size", "size", "auto, or 512x512")
                self.negative = self.text_field("Negative prompt", "not")
            with box("div", "row"):
                button("Generate", permit("infer", self.ask_all), kind="filled", key="ctrl+enter")
                button("Stop", permit("infer", self.stop), kind="word", key="Escape")
                line("Ctrl+Enter generates.", "soft small by-keys", "span")
        self.draw_board()

    def draw_answers(self, position: int, column: Column) -> None:
        with box("div"):  # one element, because the column's grid gives each element a row
            column.element = Images(column.name(self.studio.base))
            if len(column.mix) == 1 and len(self.columns) < MAX_COLUMNS:
                button("Compare five strengths", permit("infer", lambda: self._spread(column)), kind="word")

    def equivalent_command(self, column: Column) -> str:
        return command(
            "image",
            str(self.prompt.value),
            base=self.page.base_argument,
            adapter=column.specs(),
            seed=int(self.seed.value or 0),
            count=int(self.n.value or 1),
            steps=int(self.steps.value or 1),
            guidance=self.guidance.value,
            size=self.size.value,
            negative=self.negative.value,
            out="image.png",
        )

    def _spread(self, column: Column) -> None:
        """Replace an adapter's column with one column per strength in `_STRENGTHS`."""
        name = column.mix[0][0]
        at, other_mixes = self.columns.index(column), [each.mix for each in self.columns if each is not column]
        series = [Column([(name, each)]) for each in _STRENGTHS if [(name, each)] not in other_mixes]
        self.columns[at : at + 1] = series or [column]
        del self.columns[MAX_COLUMNS:]
        self.columns_changed()

    def _body(self, column: Column) -> dict[str, Any]:
        """Return the request body that a client would send for this column."""
        return {
            "prompt": str(self.prompt.value),
            "negative_prompt": str(self.negative.value or ""),
            "mix": [{"adapter": name, "strength": strength} for name, strength in column.mix],
            "n": max(1, min(_SEEDS, int(self.n.value or 1))),
            "seed": int(self.seed.value or 0),
            "num_inference_steps": int(self.steps.value or 1),
            "guidance_scale": self.guidance.value,
            "size": str(self.size.value or "auto").lower().replace("×", "x"),
        }

    async def answer(self, column: Column) -> None:
        images: Images = column.element
        service, principal = self.studio.service, self.page.principal
        try:
            body = checked_image_body(ImageBody, self._body(column), service.settings.max_pictures)
            plan, events = await ask_pictures(service, principal, body, f"image-{uuid.uuid4().hex}", trial=True)
            images.begin([request.seed for request in plan.requests], plan.width, plan.height)
            async with aclosing(events):
                async for i, event in events:
                    if isinstance(event, PictureStep):
                        images.step(i, event.done / event.total)
                    elif isinstance(event, FinishedPicture):
                        source = await asyncio.to_thread(_data_url, event)
                        images.show(i, source, "; ".join([*plan.notes, *event.notes]))
        except Refused as error:
            images.begin([], 1, 1)
            raise ConfigError(f"{column.name(self.studio.base)}: {message_of(error)}") from error


def _data_url(event: FinishedPicture) -> str:
    """Return an image as a data: URL, in WebP format and without metadata."""
    data = encoded(event.picture.image, event.picture.text, {}, "webp", 92)
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"
