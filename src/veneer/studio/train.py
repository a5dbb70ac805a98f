"""The Train view: uploaded rows (form.py), files of the server, newest runs.

Only the operator can train on files of the server; this form previews the run's plan, and each row and
image."""

from __future__ import annotations

import asyncio
import base64
import functools
import itertools
import os
import threading
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from veneer.errors import ConfigError, VeneerError, counted, gigabytes
from veneer.jobs.openai import error_to_openai
from veneer.jobs.store import Job
from veneer.jobs.validate import device_of, submit_job
from veneer.plan.plan import Plan
from veneer.plan.render import rough_duration
from veneer.plan.tables import Device
from veneer.studio import parts
from veneer.studio.commands import command, command_base
from veneer.studio.form import train_form
from veneer.studio.frame import Studio, ViewPage
from veneer.studio.parts import (
    Command,
    Fragment,
    box,
    button,
    dialog,
    enable,
    form_field,
    heading,
    line,
    once,
    permit,
    progress,
    show,
)
from veneer.studio.watch import on_change
from veneer.train.config.image import ImageTrainConfig
from veneer.train.config.load import RunConfig, common_settings, load_config, settings_of, short_names
from veneer.train.image.captions import write_caption
from veneer.train.inspect import VERDICTS, RowVerdict, SeenPicture, inspect_run, picture_of, pictures_seen, rows_seen
from veneer.train.preflight import Report, free_memory

_ROWS = 20
"""Rows per page of the table."""
_SHOWN = 48
"""Images per page of the grid."""
_RUNS = 8
"""Number of runs listed below the forms."""
_SIDE = 260
"""Side of a thumbnail, in pixels."""
_POINTS = 8
"""Number of checkpoints of a short run."""
_EXAMPLE = Path("examples/tickets/config.yaml")


@functools.lru_cache(maxsize=1)
def _device() -> Device:
    return device_of()


_looking = threading.Lock()
"""Lock for one preview at a time: of several requested previews, the last counts."""


async def train_view(page: ViewPage) -> None:
    studio = page.studio
    page.title("Train", "Bring rows with questions and answers, look at them, and start a run.")
    page.when_loaded(lambda: page.again() if studio.service.engine.makes == "pictures" else None)
    if studio.queue is not None and studio.service.engine.makes == "texts":
        await train_form(page, studio.queue)
    elif not page.caller.can("operate"):
        line("This server does not train on rows; its operator can start it with --train.", "soft")
    form = None
    if page.caller.can("operate"):
        form = _ServerForm(page)
        form.draw()
    await _runs(page)
    if form is not None:
        page.task(form.changed())
        page.when_loaded(form.changed)


class _ServerForm:
    """The form of a run on server files. Its link has the settings: section.key=value.

    number: number of the last change, so that an older preview never replaces a newer one
    settled: set unless a preview is being made; `start` waits for it, since a click can follow the last key at once"""

    def __init__(self, page: ViewPage) -> None:
        self.page, self.studio = page, page.studio
        self.config: RunConfig | None = None
        self.preview: Report | None = None
        self.number, self.verdict, self.offset = 0, "", 0
        self.looked_at, self.settled = list[str](), asyncio.Event()
        self.settled.set()

    def draw(self) -> None:
        changed = permit("operate", lambda: self.changed())
        start = once(permit("operate", self.start))
        given, rest = short_names(self.page.query.all("s"))
        pictures = self.studio.service.engine.makes == "pictures"

        def field(name: str, label: str, hint: str = "", usual: str = "", **options: Any) -> parts.Field:
            return form_field(label, given.get(name, usual), changed, hint=hint, wait=0.3, **options)

        heading("From files on the server")
        with box("div", "split asking"):
            with box("div", "stack"):
                self.begins = Fragment(
                    "begins.html.j2",
                    acts={"take": permit("operate", lambda data: self.take(int(data["number"])))},
                    begins=[what for what, _ in beginnings(self.studio)],
                    here=_short_path(os.getcwd()),
                )
                what = "Folder of pictures" if pictures else "File of rows"
                with box("div", "row foot"):
                    self.fields = {
                        "base": field("base", "Base", usual=command_base(self.page)),
                        "data": field("data", what, "photos" if pictures else "tickets.jsonl", key="/"),
                        "output": field("output", "Name", "as the data"),
                    }
                with box("div", "row foot"):
                    self.fields |= {
                        "rank": field("rank", "Rank", "16"),
                        "epochs": field("epochs", "Epochs"),
                        "steps": field("steps", "Steps"),
                        "learning_rate": field("learning_rate", "Learning rate"),
                    }
                self.more = form_field(
                    "Other settings, one a line",
                    "\n".join(rest),
                    changed,
                    kind="area",
                    most=20_000,
                    hint="data.split=10%\noptimizer.name=adafactor",
                    wait=0.3,
                    entered=start,
                )
                self.wrong = Fragment("wrong.html.j2", wrong=None)
                with box("div", "row"):
                    self.button = button("Start", start, kind="filled", key="ctrl+enter")
                    self.talk = form_field(
                        "Draw with checkpoints during training"
                        if pictures
                        else "Chat with checkpoints during training",
                        self.page.query.get("talk") != "no",
                        permit("operate", self.asking),
                        kind="check",
                    )
                self.same = Command()
            self.plan = Fragment(
                "plan.html.j2", look="side", look_at=None, plan=None, says=_says, busy=False, guesses=()
            )
            with box("div", "under"):
                self.bar = progress("Looking at the rows")
                self.found = Fragment("findings.html.j2", findings=(), sample=())
        acts = {
            "only": permit("operate", lambda data: self.only(data["verdict"])),
            "page": permit("operate", lambda data: self.turn(data["offset"])),
        }
        self.table = Fragment("rows.html.j2", acts=acts, **_NO_ROWS)
        caption = permit("operate", lambda data: self.caption(data.get("id", "")))
        self.sheet = Fragment("sheet.html.j2", acts={"caption": caption}, pictures=(), more=0)
        self.same_rows = Command()
        self.show()

    # -- settings

    def settings(self) -> list[str]:
        """Return the fields' settings as `section.key=value`."""
        given = {name: str(field.value or "").strip() for name, field in self.fields.items()}
        return [*common_settings(**given), *filter(None, map(str.strip, str(self.more.value or "").splitlines()))]

    def whole(self) -> bool:
        sections = {setting.partition("=")[0].partition(".")[0] for setting in self.settings()}
        return "base" in sections and bool(sections & {"data", "slider"})

    def for_checkpoints(self) -> list[str]:
        """Return defaults that let users compare and chat with checkpoints in training."""
        given = {setting.partition("=")[0] for setting in self.settings()}
        out = ["checkpoint.adapters=true"] if self.talk.value and "checkpoint.adapters" not in given else []
        plan = None if self.preview is None else self.preview.plan
        if plan is None or "checkpoint.every" in given:
            return out
        every = min(100, max(1, plan.job.total_steps // _POINTS))
        out += [f"checkpoint.every={every}"] if every < 100 else []
        return out + ([] if "evaluation.every" in given else [f"evaluation.every={every}"])

    def take(self, number: int) -> Any:
        """Fill in one of the suggestions."""
        return self.page.go("train", s=beginnings(self.studio)[number][1])

    def asking(self, on: bool) -> None:
        self.page.keep(talk=None if on else "no")
        self.show()

    # -- what the run would be

    async def changed(self) -> None:
        """Plan the run and read its rows again; a later change discards this preview."""
        self.page.keep(s=self.settings())
        self.number += 1
        number, self.looked_at = self.number, self.settings()
        self.settled.clear()
        try:
            await self._look(number, self.looked_at)
        finally:
            if number == self.number:
                self.settled.set()

    async def _look(self, number: int, settings: list[str]) -> None:
        self.config = self.preview = None
        self.offset = 0
        self.same_rows.show("")
        self.table.show(**_NO_ROWS)
        self.sheet.show(pictures=(), more=0)
        if not self.whole() or self.studio.loading:
            return self.show()
        self.show(busy=True)

        def do() -> tuple[RunConfig, Report] | None:
            with _looking:
                if number != self.number:
                    return None
                config, _ = load_config(None, settings)
                return config, inspect_run(config, device=_device())

        try:
            done = await asyncio.to_thread(do)
        except VeneerError as error:
            if number == self.number:
                self.show(wrong=error)
            return
        if done is not None and number == self.number:
            self.config, self.preview = done
            self.show()
            await self.show_rows()

    def show(self, busy: bool = False, wrong: VeneerError | None = None) -> None:
        preview = self.preview
        why = "" if self.whole() else "give a base, and the data"
        if self.studio.loading:
            why = self.studio.loading
        elif wrong is not None:
            why = wrong.what
        elif preview is not None and not preview.starts:
            why = "what was found has to be mended first"
        self.wrong.show(wrong=wrong)
        enable(self.button, not why, why)
        plan, guesses = (None, ()) if preview is None else (preview.plan, preview.guesses)
        self.plan.show(look_at=preview, plan=plan, says=_says, busy=busy, guesses=guesses)
        self.found.show(
            findings=() if preview is None else preview.findings, sample=() if preview is None else preview.sample
        )
        show(self.bar, busy)
        self.same.show(command("jobs", "submit", *self.settings(), *self.for_checkpoints()) if self.whole() else "")

    async def show_rows(self) -> None:
        """Show the rows or images one by one."""
        config, number = self.config, self.number
        if config is None or (isinstance(config, ImageTrainConfig) and config.slider.wanted):
            return
        try:
            if isinstance(config, ImageTrainConfig):
                pictures = await asyncio.to_thread(pictures_seen, config)
                shown = await asyncio.to_thread(_thumbnails, pictures[:_SHOWN])
                if number == self.number:
                    self.sheet.show(pictures=shown, more=len(pictures) - len(shown))
            else:
                verdicts = cast("list[RowVerdict]", [self.verdict] if self.verdict else [])
                rows = await asyncio.to_thread(rows_seen, config, offset=self.offset, limit=_ROWS, verdicts=verdicts)
                if number == self.number:
                    self.table.show(
                        **_NO_ROWS
                        | {"seen": rows, "verdict": self.verdict, "offset": self.offset, "said": _rows_said(rows)}
                    )
        except VeneerError:
            return  # the findings already show the error
        if number == self.number:
            self.same_rows.show(command("data", "show", *self.settings(), only=self.verdict, offset=self.offset or ""))

    async def only(self, verdict: str) -> None:
        self.verdict, self.offset = ("" if verdict == self.verdict else verdict), 0
        await self.show_rows()

    async def turn(self, offset: str) -> None:
        self.offset = max(0, int(offset))
        await self.show_rows()

    async def caption(self, id: str) -> None:
        """Edit the caption of the image with this id."""
        if isinstance(self.config, ImageTrainConfig):
            picture = await asyncio.to_thread(picture_of, self.config, id)
            await _ask_caption(self.page, picture, self.config, self.changed)

    async def start(self) -> None:
        """Start the run that the fields describe, once its preview is there."""
        if self.settings() != self.looked_at:
            await self.changed()
        await self.settled.wait()
        preview = self.preview
        if preview is None or not preview.starts:
            raise ConfigError("this run cannot begin yet", fix="see what was found")
        settings = [*self.settings(), *self.for_checkpoints()]

        def do() -> Job:
            config, _ = load_config(None, settings)
            return submit_job(self.studio.jobs, config, device=_device(), tenants=self.studio.tenants)

        show(self.bar, True)
        try:
            job = await asyncio.to_thread(do)
        finally:
            show(self.bar, False)
        if job.state == "failed":
            error = job.error or {}
            raise VeneerError(str(error.get("message")), where=error.get("where"), fix=error.get("fix"))
        await self.page.go("run", job=job.id)
        self.page.say(f"{job.name} is queued")


_NO_ROWS: dict[str, Any] = {
    "seen": None, "verdicts": VERDICTS, "verdict": "", "offset": 0, "some": _ROWS, "said": "",
}  # fmt: skip


def beginnings(studio: Studio) -> list[tuple[str, list[str]]]:
    """Return suggestions from files in the working directory: (description, settings)."""
    base = str(studio.service.catalog.shelf.base.name)
    with os.scandir() as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, 2000) if not entry.name.startswith("."))
    if studio.service.engine.makes == "pictures":
        folders = [name for name in names if next(Path(name).glob("*.png"), None) is not None][:2]
        return [(name, [*common_settings(base=base, data=name), "data.trigger=sks"]) for name in folders]
    rows = [name for name in names if name.endswith((".jsonl", ".csv", ".parquet"))][:2]
    out = [(name, common_settings(base=base, data=name)) for name in rows]
    if _EXAMPLE.is_file():  # the quickstart's tickets, in a checkout
        config, _ = load_config(_EXAMPLE, [*common_settings(base=base), "output=runs/support-tickets"])
        values = config.model_dump(mode="json", exclude_unset=True)
        out.append(("1,200 answered support tickets", settings_of(values)))
    return out[:2]


def _short_path(path: str) -> str:
    home = str(Path.home())
    return f"~{path[len(home) :]}" if path == home or path.startswith(home + "/") else path


def _says(plan: Plan) -> dict[str, str]:
    """Return a plan's figures as text."""
    import torch  # late: a page without a plan needs no device

    cost = plan.cost
    return {
        "time": "not known" if plan.seconds is None else rough_duration(plan.seconds),
        "cost": "" if cost is None else f"${cost:,.2f}" if cost >= 0.01 else f"{cost * 100:.2g} cents",
        "steps": counted(plan.job.total_steps, "step"),
        "free": gigabytes(free_memory(torch.device(plan.device.kind))),
    }


def _rows_said(seen: Any) -> str:
    of = "" if seen.total in (None, seen.looked) else f", the first of {seen.total:,}"
    return f"{counted(seen.looked, 'row')}{of}, read as {seen.format}"


def _thumbnails(pictures: tuple[SeenPicture, ...]) -> list[dict[str, Any]]:
    """Return images with thumbnails as data: URLs, so that no path leaves the process."""
    return [{"picture": picture, "source": _thumbnail(picture.path, picture.id)} for picture in pictures]


@functools.lru_cache(maxsize=512)
def _thumbnail(path: Path, id: str) -> str:
    from PIL import Image

    with Image.open(path) as opened:
        small = opened.convert("RGBA")
        small.thumbnail((_SIDE, _SIDE))
        flat = Image.new("RGB", small.size, "white")
        flat.paste(small, mask=small.getchannel("A"))
    held = BytesIO()
    flat.save(held, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(held.getvalue()).decode()


async def _ask_caption(page: ViewPage, picture: SeenPicture, config: ImageTrainConfig, done: Callable[[], Any]) -> None:
    with dialog(picture.name) as window:
        text = form_field(
            "Caption",
            picture.caption,
            permit("operate", lambda now: same.show(command("data", "caption", str(picture.path), now))),
            kind="area",
            most=2000,
        )
        line("Saved as a text file next to the picture, which counts before metadata.", "soft small")
        same = Command(command("data", "caption", str(picture.path), picture.caption))

        async def keep() -> None:
            folder = next((f for f in config.data.folders if picture.path.is_relative_to(f)), None)
            await asyncio.to_thread(write_caption, picture.path, str(text.value), folder)
            parts.closed(window)
            await done()
            page.say(f"{picture.name} has another caption")

        parts.decide(window, "Keep", permit("operate", keep))
    parts.opened(window)


async def _runs(page: ViewPage) -> None:
    """Draw the newest runs."""
    runs = Fragment("runs.html.j2", jobs=(), errors={}, link=page.link)

    def newest() -> list[Job]:
        return page.studio.jobs.jobs(page.caller.owner, limit=_RUNS)[0]

    async def fill() -> None:
        jobs = await asyncio.to_thread(newest)
        errors = {job.id: job.error if page.caller.can("operate") else error_to_openai(job) for job in jobs}
        runs.show(jobs=jobs, errors=errors, link=page.link)

    await fill()
    on_change(lambda: [(job.id, job.state, job.step) for job in newest()], 2.0, fill)
