"""The Train view: forms to train on uploaded rows or on server files, and the newest runs.

upload_form.py has the form for uploaded rows. Only the operator can train on server files. The form for
server files previews the run's plan and each row or image."""

from __future__ import annotations

import asyncio
import base64
import functools
import itertools
import os
import threading
from io import BytesIO
from pathlib import Path
from typing import cast

from veneer.errors import ConfigError, VeneerError, counted, gigabytes
from veneer.jobs.openai import error_to_openai
from veneer.jobs.store import Job
from veneer.jobs.validate import submit_job, this_device
from veneer.plan.plan import Plan
from veneer.plan.render import rough_duration
from veneer.plan.tables import Device
from veneer.studio import elements
from veneer.studio.page import Studio, ViewPage, short_path
from veneer.studio.upload_form import draw_upload_form
from veneer.train.config.image import ImageTrainConfig
from veneer.train.config.load import RunConfig, common_settings, load_config, settings_of, short_names
from veneer.train.image.captions import write_caption
from veneer.train.inspect import (
    VERDICTS,
    RowVerdict,
    inspect_run,
    preview_picture,
    preview_pictures,
    preview_rows,
)
from veneer.train.preflight import Report, free_memory

_ROWS, _IMAGES, _RUNS = 20, 48, 8
"""Maximum number of rows, images and runs shown."""
_THUMBNAIL = 260
"""Maximum side of a thumbnail, in pixels."""
_CHECKPOINTS = 8
"""Number of checkpoints that a short run saves by default."""
_EXAMPLE = Path("examples/tickets/config.yaml")
_preview_lock = threading.Lock()
"""Allows one preview at a time; a preview that a newer request has replaced is skipped."""


@functools.lru_cache(maxsize=1)
def _device() -> Device:
    return this_device()


async def train_view(page: ViewPage) -> None:
    studio = page.studio
    page.title("Train", "Choose training data, check it, and start a run.")
    page.when_loaded(lambda: page.reload() if studio.makes_images else None)
    form = _ServerForm(page) if page.principal.can("operate") else None
    if studio.queue is not None and not studio.makes_images:
        if form is not None:
            elements.heading("From an uploaded file")
        await draw_upload_form(page, studio.queue)
    elif form is None:
        elements.line(
            "This server does not accept uploads for training. The operator can enable this with --train.", "soft"
        )
    await _draw_runs(page)
    if form is not None:
        page.start_task(form.changed())
        page.when_loaded(form.changed)


class _ServerForm:
    """The form for a run on server files.

    The page's link contains the settings, each as section.key=value.

    number: number of the last change, so that the preview of an earlier change never replaces a newer preview
    settled: set while no preview is running; `start` waits for it, because a user can click right after
        typing"""

    def __init__(self, page: ViewPage) -> None:
        self.page, self.studio = page, page.studio
        self.config: RunConfig | None = None
        self.preview: Report | None = None
        self.number, self.verdict = 0, ""
        self.previewed, self.settled = list[str](), asyncio.Event()
        self.settled.set()
        changed, start = elements.permit("operate", self.changed), elements.once(elements.permit("operate", self.start))
        values, rest = short_names(page.query.all("s"))

        def field(name: str, label: str, hint: str = "", default: str = "", key: str = "") -> elements.Field:
            return elements.form_field(label, values.get(name, default), changed, hint=hint, delay=0.3, key=key)

        images = self.studio.makes_images
        elements.heading("From files on the server")
        with elements.box("div", "split asking"):
            with elements.box("div", "stack"):
                elements.Fragment(
                    "begins.html.j2",
                    actions={"take": elements.permit("operate", self._take)},
                    names=[name for name, _ in suggestions(self.studio)],
                    here=short_path(os.getcwd()),
                )
                with elements.box("div", "row foot"):
                    data_texts = ("Image folder", "photos") if images else ("Data file", "tickets.jsonl")
                    self.fields = {
                        "base": field("base", "Base", default=page.base_argument),
                        "data": field("data", *data_texts, key="/"),
                        "output": field("output", "Name", "default: the data file's name"),
                    }
                with elements.box("div", "row foot"):
                    self.fields |= {
                        "rank": field("rank", "Rank", "16"),
                        "epochs": field("epochs", "Epochs"),
                        "steps": field("steps", "Steps"),
                        "learning_rate": field("learning_rate", "Learning rate"),
                    }
                hint = "data.split=10%\noptimizer.name=adafactor"
                label, other = "Other settings, one per line", "\n".join(rest)
                self.other = elements.form_field(
                    label, other, changed, kind="area", hint=hint, delay=0.3, on_enter=start
                )
                self.error = elements.Fragment("wrong.html.j2")
                with elements.box("div", "row"):
                    self.button = elements.button("Start", start, kind="filled", key="ctrl+enter")
                self.same = elements.Command()
            self.plan = elements.Fragment("plan.html.j2", classes="side")
            with elements.box("div", "under"):
                self.bar = elements.progress("Reading the data")
                self.findings = elements.Fragment("findings.html.j2")
        self.rows = elements.Fragment("rows.html.j2", actions={"only": elements.permit("operate", self._filter)})
        self.images = elements.Fragment("sheet.html.j2", actions={"caption": elements.permit("operate", self._edit)})
        self.rows_command = elements.Command()
        self.show()

    # -- settings

    def settings(self) -> list[str]:
        """Return the fields' values as settings, `section.key=value`."""
        values = {name: str(field.value or "").strip() for name, field in self.fields.items()}
        return [*common_settings(**values), *filter(None, map(str.strip, str(self.other.value or "").splitlines()))]

    def complete(self) -> bool:
        sections = {setting.partition("=")[0].partition(".")[0] for setting in self.settings()}
        return "base" in sections and bool(sections & {"data", "slider"})

    def run_settings(self) -> list[str]:
        """Return the settings, plus defaults that publish checkpoints for comparison."""
        settings, plan = self.settings(), self.preview.plan if self.preview else None
        defaults = {"checkpoint.adapters": "true"}
        keys = {setting.partition("=")[0] for setting in settings}
        if plan is not None and "checkpoint.every" not in keys:
            every = min(100, max(1, plan.job.total_steps // _CHECKPOINTS))
            defaults |= {"checkpoint.every": f"{every}"} if every < 100 else {}
            defaults["evaluation.every"] = f"{every}"
        return settings + [f"{key}={value}" for key, value in defaults.items() if key not in keys]

    async def _take(self, data: dict[str, str]) -> None:
        """Fill in the form from a suggestion."""
        await self.page.go("train", s=suggestions(self.studio)[int(data["number"])][1])

    # -- preview

    async def changed(self) -> None:
        """Update the preview: plan the run and read its rows.

        If the form changes again before the preview is ready, the preview is discarded."""
        self.page.set_query(s=self.settings())
        self.number += 1
        number, self.previewed = self.number, self.settings()
        self.settled.clear()
        try:
            await self._preview(number, self.previewed)
        finally:
            if number == self.number:
                self.settled.set()

    async def _preview(self, number: int, settings: list[str]) -> None:
        self.config = self.preview = None
        self.rows_command.show(text="")
        self.rows.show(seen=None)
        self.images.show(pictures=())
        if not self.complete() or self.studio.loading:
            return self.show()
        self.show(busy=True)

        def inspect() -> tuple[RunConfig, Report] | None:
            with _preview_lock:
                if number != self.number:
                    return None
                config, _ = load_config(None, settings)
                return config, inspect_run(config, device=_device())

        try:
            done = await asyncio.to_thread(inspect)
        except VeneerError as error:
            if number == self.number:
                self.show(error=error)
            return
        if done is not None and number == self.number:
            self.config, self.preview = done
            self.show()
            await self._show_data()

    def show(self, busy: bool = False, error: VeneerError | None = None) -> None:
        preview = self.preview
        reason = self.studio.loading or ("" if self.complete() else "enter a base and data")
        if error is not None:
            reason = error.what
        elif preview is not None and not preview.starts:
            reason = "fix the errors under Findings first"
        self.error.show(error=error)
        elements.enable(self.button, not reason, reason)
        self.plan.show(preview=preview, plan=preview.plan if preview else None, texts=_plan_texts, busy=busy)
        findings, sample = (preview.findings, preview.sample) if preview else ((), ())
        self.findings.show(findings=findings, sample=sample)
        elements.set_visible(self.bar, busy)
        self.same.show(text=elements.command("jobs", "submit", *self.run_settings()) if self.complete() else "")

    async def _show_data(self) -> None:
        """Show the rows or images of the run."""
        config, number = self.config, self.number
        if config is None or (isinstance(config, ImageTrainConfig) and config.slider.enabled):
            return
        try:
            if isinstance(config, ImageTrainConfig):
                all_images = await asyncio.to_thread(preview_pictures, config)
                shown = all_images[:_IMAGES]
                images = await asyncio.to_thread(lambda: [(e, _cached_thumbnail(e.path, e.id)) for e in shown])
                if number == self.number:
                    self.images.show(pictures=images, more=len(all_images) - len(images))
            else:
                verdicts = cast("list[RowVerdict]", [self.verdict] if self.verdict else [])
                rows = await asyncio.to_thread(preview_rows, config, limit=_ROWS, verdicts=verdicts)
                if number == self.number:
                    self.rows.show(seen=rows, verdicts=VERDICTS, verdict=self.verdict)
        except VeneerError:
            return  # the findings already report the error
        if number == self.number:
            self.rows_command.show(text=elements.command("data", "show", *self.settings(), only=self.verdict))

    async def _filter(self, data: dict[str, str]) -> None:
        self.verdict = "" if data["verdict"] == self.verdict else data["verdict"]
        await self._show_data()

    async def _edit(self, data: dict[str, str]) -> None:
        """Open a dialog to edit the caption of one image."""
        config, page = self.config, self.page
        if not isinstance(config, ImageTrainConfig):
            return
        image = await asyncio.to_thread(preview_picture, config, data["id"])
        folder = next((f for f in config.data.folders if image.path.is_relative_to(f)), None)
        path = str(image.path)
        with elements.dialog(image.name) as window:
            typed = elements.permit(
                "operate", lambda text: same.show(text=elements.command("data", "caption", path, text))
            )
            caption = elements.form_field("Caption", image.caption, typed, kind="area", max_length=2000)
            elements.line(
                "Saved where the run reads captions: next to the image, or in the folder's metadata.", "soft small"
            )
            same = elements.Command(elements.command("data", "caption", path, image.caption))

            async def save() -> None:
                await asyncio.to_thread(write_caption, image.path, str(caption.value), folder)
                elements.close_dialog(window)
                await self.changed()
                page.notify(f"Saved the caption of {image.name}")

            elements.dialog_buttons(window, "Save", elements.permit("operate", save))
        elements.open_dialog(window)

    # -- start

    async def start(self) -> None:
        """Wait for the preview and start the run."""
        if self.settings() != self.previewed:
            await self.changed()
        await self.settled.wait()
        if self.preview is None or not self.preview.starts:
            raise ConfigError("this run cannot start yet", fix="see the findings")
        settings, studio = self.run_settings(), self.studio

        def submit() -> Job:
            config, _ = load_config(None, settings)
            return submit_job(studio.jobs, config, device=_device(), tenants=studio.tenants)

        elements.set_visible(self.bar, True)
        try:
            job = await asyncio.to_thread(submit)
        finally:
            elements.set_visible(self.bar, False)
        if job.state == "failed":
            error = job.error or {}
            raise VeneerError(str(error.get("message")), where=error.get("where"), fix=error.get("fix"))
        await self.page.go("run", job=job.id)
        self.page.notify(f"{job.name} is queued")


def suggestions(studio: Studio) -> list[tuple[str, list[str]]]:
    """Return (name, settings) suggestions for files in the working directory."""
    base = str(studio.service.catalog.sources.base.name)
    with os.scandir() as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, 2000) if not entry.name.startswith("."))
    if studio.makes_images:
        folders = [name for name in names if next(Path(name).glob("*.png"), None) is not None][:2]
        return [(name, [*common_settings(base=base, data=name), "data.trigger=sks"]) for name in folders]
    rows = [name for name in names if name.endswith((".jsonl", ".csv", ".parquet"))]
    out = [(name, common_settings(base=base, data=name)) for name in rows[:2]]
    if _EXAMPLE.is_file():  # a checkout has the quickstart's example data
        values = load_config(_EXAMPLE, common_settings(base=base))[0].model_dump(mode="json", exclude_unset=True)
        values["data"]["train"], values["output"] = str(_EXAMPLE.parent / "train.jsonl"), "runs/support-tickets"
        out.append(("1,200 answered support tickets", settings_of(values)))
    return out[:2]


def _plan_texts(plan: Plan) -> dict[str, str]:
    """Return texts for a plan's time, cost, steps and free memory."""
    import torch  # imported late: a page without a plan does not need it

    cost = plan.cost
    return {
        "time": "unknown" if plan.seconds is None else rough_duration(plan.seconds),
        "cost": "" if cost is None else f"${cost:,.2f}" if cost >= 0.01 else f"{cost * 100:.2g} cents",
        "steps": counted(plan.job.total_steps, "step"),
        "free": gigabytes(free_memory(torch.device(plan.device.kind))),
    }


@functools.lru_cache(maxsize=512)
def _cached_thumbnail(path: Path, id: str) -> str:
    from PIL import Image

    with Image.open(path) as opened:
        small = opened.convert("RGBA")
        small.thumbnail((_THUMBNAIL, _THUMBNAIL))
        flat = Image.new("RGB", small.size, "white")
        flat.paste(small, mask=small.getchannel("A"))
    file = BytesIO()
    flat.save(file, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


async def _draw_runs(page: ViewPage) -> None:
    runs = elements.Fragment("runs.html.j2")

    def newest() -> list[Job]:
        return page.studio.jobs.jobs(page.principal.owner, limit=_RUNS)[0]

    async def refill() -> None:
        jobs = await asyncio.to_thread(newest)
        errors = {job.id: job.error if page.principal.can("operate") else error_to_openai(job) for job in jobs}
        runs.show(jobs=jobs, errors=errors, link=page.link)

    await refill()
    page.on_change(lambda: [(job.id, job.state, job.step) for job in newest()], 2.0, refill)
