"""The Compare view on an image base.

Images of equal seeds for base, adapters and mixes; a series of strengths; an overlay of two images; a control
image."""

from __future__ import annotations

import asyncio
import base64
import uuid
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from veneer.errors import ConfigError
from veneer.imaging.infotext import encoded
from veneer.models.image.generate import default_settings
from veneer.serve.http.errors import message_of
from veneer.serve.http.image_requests import ImageBody, ask_pictures, checked_image_body
from veneer.serve.pictures.engine import PictureEngine
from veneer.serve.pictures.request import FinishedPicture, PictureStep
from veneer.serve.request import Refused
from veneer.studio import parts
from veneer.studio.columns import MOST_COLUMNS, Board, Column
from veneer.studio.commands import command, command_base
from veneer.studio.frame import ViewPage
from veneer.studio.moving import Drawn, Sketch, Wipe
from veneer.studio.parts import box, button, dialog, line, permit

_SEEDS = 4
_STEPS = (0.25, 0.5, 0.75, 1.0, 1.25)
"""Strengths of an adapter's series."""


async def pictures_view(page: ViewPage) -> None:
    board = _Pictures(page)
    page.title("Compare", "One prompt and the same seeds, drawn by the base, by adapters and by mixes of them.")
    board.draw()


@dataclass
class _Picture:
    """An image of a column. `source`: a data: URL, once the image is generated."""

    seed: int
    source: str = ""


class _Pictures(Board):
    """The Compare view of one visit. `over`: column and index of the image to overlay."""

    def __init__(self, page: ViewPage) -> None:
        super().__init__(page)
        self.engine = cast(PictureEngine, page.studio.service.engine)
        self.over: tuple[Column, int] | None = None
        self.sketch = ""

    def draw(self) -> None:
        query = self.page.query
        steps, guidance = default_settings(self.engine.base)
        with box("div", "ask"):
            self.draw_prompt("Describe a picture. Every column draws it.")
            with box("details", "how"):
                line("Image settings", tag="summary")
                with box("div", "settings"):
                    self.seed = self.number("First seed", "seed", 7, low=0, high=2**32 - 1, step=1)
                    self.n = self.number("Seeds", "n", 1, low=1, high=_SEEDS, step=1)
                    self.steps = self.number("Steps", "steps", steps, low=1, high=200, step=1)
                    self.guidance = self.number("Guidance", "guidance", guidance, low=0, high=50, step=0.5)
                    self.size = parts.form_field("Size", query.get("size"), self.kept("size"), hint="auto, or 512x512")
                    self.negative = parts.form_field("Negative prompt", query.get("not"), self.kept("not"))
                    self._control()
            with box("div", "row"):
                button("Draw", permit("infer", self.ask_all), kind="filled", key="ctrl+enter")
                button("Stop", permit("infer", self.stop), kind="word", key="Escape")
                line("Ctrl+Enter draws.", "soft small by-keys", "span")
                line("Mark two pictures to overlay them.", "soft small", "span")
        self.draw_all()

    def _control(self) -> None:
        """Draw the control image's fields, if the base has ControlNets."""
        self.kind: parts.Field | None = None
        if not (kinds := self.engine.control_kinds()):
            return
        query = self.page.query
        self.kind = parts.form_field(
            "Control", query.get("control", kinds[0]), self.kept("control"), kind="choice", options=kinds
        )
        self.hold = self.number("Its strength", "hold", 1.0, low=0, high=2, step=0.05)

        def picked(data: str) -> None:
            self.sketch = data

        Sketch("Control picture", permit("infer", picked))

    def draw_answers(self, place: int, column: Column) -> None:
        with box("div"):  # one row of the column's grid
            column.shown = Drawn(
                column.named(self.page.studio.base), permit("read", lambda i: self.marked(column, int(i)))
            )
            if len(column.mix) == 1 and len(self.columns) <= MOST_COLUMNS:
                button("The same at five strengths", permit("infer", lambda: self.spread(column)), kind="word")

    def same_command(self, column: Column) -> str:
        kind = self.kind.value if self.kind is not None and self.sketch else None
        return command(
            "image",
            str(self.prompt.value),
            base=command_base(self.page),
            adapter=column.specs(),
            seed=int(self.seed.value or 0),
            count=int(self.n.value or 1),
            steps=int(self.steps.value or 1),
            guidance=self.guidance.value,
            size=self.size.value,
            negative=self.negative.value,
            control=f"{kind}=PICTURE:{self.hold.value:g}" if kind else None,
            out="picture.png",
        )

    def spread(self, column: Column) -> None:
        """Replace an adapter's column by one column per strength of `_STEPS`."""
        ((name, now),) = column.mix
        at = self.columns.index(column)
        there = {each.mix[0][1] for each in self.columns if len(each.mix) == 1 and each.mix[0][0] == name}
        more = [Column([(name, strength)]) for strength in _STEPS if strength not in there - {now}]
        self.columns[at : at + 1] = more or [column]
        del self.columns[MOST_COLUMNS + 1 :]
        self.changed()

    # -- drawing

    def _fields(self, column: Column) -> dict[str, Any]:
        """Return the fields of a client's request body."""
        fields: dict[str, Any] = {
            "prompt": str(self.prompt.value),
            "negative_prompt": str(self.negative.value or ""),
            "mix": [{"adapter": name, "strength": strength} for name, strength in column.mix],
            "n": max(1, min(_SEEDS, int(self.n.value or 1))),
            "seed": int(self.seed.value or 0),
            "num_inference_steps": int(self.steps.value or 1),
            "guidance_scale": self.guidance.value,
            "size": str(self.size.value or "auto").lower().replace("×", "x"),
        }
        if self.sketch and self.kind is not None:
            fields["control"] = [{"type": self.kind.value, "image": self.sketch, "strength": self.hold.value}]
        return fields

    async def answer(self, column: Column) -> None:
        shown: Drawn = column.shown
        service = self.page.studio.service
        try:
            asked = checked_image_body(ImageBody, self._fields(column), service.settings.max_pictures)
            plan, events = await ask_pictures(service, self.page.caller, asked, f"image-{uuid.uuid4().hex}", trial=True)
            self._begin(column, [request.seed for request in plan.requests], plan.width, plan.height)
            async with aclosing(events):
                async for i, event in events:
                    if isinstance(event, PictureStep):
                        shown.step(i, event.done / event.of)
                    elif isinstance(event, FinishedPicture):
                        column.answers[i].source = await asyncio.to_thread(_source, event)
                        shown.show(i, column.answers[i].source, "; ".join([*plan.notes, *event.notes]))
        except Refused as error:
            self._begin(column, [], 1, 1)
            raise ConfigError(f"{column.named(self.page.studio.base)}: {message_of(error)}") from error

    def _begin(self, column: Column, seeds: list[int], width: int, height: int) -> None:
        """Clear a column for new images, and drop its pending overlay."""
        column.answers = [_Picture(seed) for seed in seeds]
        column.shown.begin(seeds, width, height)
        if self.over is not None and self.over[0] is column:
            self.over = None

    def marked(self, column: Column, i: int) -> None:
        """Mark an image; a second mark shows both images as an overlay."""
        if i >= len(column.answers):
            return  # the image is gone meanwhile
        if self.over is None or self.over[0] not in self.columns:
            self.over = column, i
            column.shown.lay(i, True)
            return
        other, k = self.over
        self.over = None
        other.shown.lay(k, False)
        left, right = other.answers[k], column.answers[i]
        if (other, k) == (column, i) or not (left.source and right.source):
            return
        base = self.page.studio.base
        names = _titled(other, base, left.seed), _titled(column, base, right.seed)
        with self.place, dialog("Overlay") as window:
            window.classes("roomy")
            Wipe(left.source, right.source, names)
            with box("div", "row end"):
                button("Close", permit("public", lambda: parts.closed(window)), kind="word")
        parts.opened(window)


def _titled(column: Column, base: str, seed: int) -> str:
    return f"{' + '.join(column.specs()) or base}, seed {seed}"


def _source(drawn: FinishedPicture) -> str:
    """Return an image as a small data: URL, without the record that PNG files have."""
    data = encoded(drawn.made.image, drawn.made.text, {}, "webp", 92)
    return f"data:image/webp;base64,{base64.b64encode(data).decode()}"
