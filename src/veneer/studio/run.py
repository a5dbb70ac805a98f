"""The view of one run: live charts, key numbers, checkpoints, images and actions.

All data comes from the job's events and checkpoints; the link is the only state."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from veneer.jobs.checkpoints import store_checkpoint
from veneer.jobs.openai import METRIC_KINDS, error_to_openai, event_to_openai
from veneer.jobs.store import ENDS, Job, UnknownJob
from veneer.library.queries import Version
from veneer.serve.http.surfaces.adapters import audit_added
from veneer.studio import elements
from veneer.studio.page import NotFound, ViewPage, short_path
from veneer.train.config.load import settings_of
from veneer.train.events import loss_text, mean_rewards, parts_text
from veneer.train.report.log import duration, size
from veneer.train.report.page import Series, chart, smooth

_POLL = 0.7
"""Seconds between two polls of a run."""
_SHEETS = 12
"""Number of sample images shown, newest first."""
_Events = list[dict[str, Any]]


async def job_of(page: ViewPage) -> Job:
    """Return the link's job. Raises NotFound if it does not exist or is not visible."""
    try:
        return await asyncio.to_thread(page.studio.jobs.get, page.principal.owner, page.query.get("job"))
    except UnknownJob:
        raise NotFound("There is no such run.", fix="see `veneer jobs list`") from None


def _base_name(job: Job) -> str:
    base = job.config["base"]
    return Path(base["name"] if isinstance(base, dict) else base).name


def trains_images(job: Job) -> bool:
    """Return whether a job trains an image base."""
    return "pictures" in job.config.get("data", {}) or "slider" in job.config


@dataclass
class _RunEvents:
    """Data collected from a job's events. `last`: number of the last event read."""

    last: int = 0
    steps: _Events = field(default_factory=list)
    scores: _Events = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    checked: dict[str, Any] = field(default_factory=dict)

    def read(self, page: ViewPage, job: Job) -> None:
        """Read new events. Tenants get the events without server paths."""
        more = True
        while more:
            events, more = page.studio.jobs.events(page.principal.owner, job.id, after=self.last)
            for event in events:
                self.last = event.number
                if not page.principal.can("operate") and event.kind not in METRIC_KINDS:
                    visible = event_to_openai(job, event)
                    event = replace(event, message=visible["message"], data=visible["data"])
                if event.kind == "metrics":
                    self.steps.append(event.data)
                elif event.kind == "validation":
                    self.scores.append(event.data)
                elif event.kind == "sample":
                    self.samples.append(int(event.data["step"]))
                elif event.kind == "preflight":
                    self.checked = event.data
                else:
                    self.notes.append((event.level, event.message))

    @property
    def rewarded(self) -> bool:
        return any(mean_rewards(each) is not None for each in [*self.steps, *self.scores])

    @property
    def score_key(self) -> str:
        return "reward" if self.rewarded else "validation_loss"

    def charts(self, images: bool) -> list[tuple[str, list[Markup], list[tuple[str, str]]]]:
        """Return (title, [wide SVG, narrow SVG], legend) for each chart, starting with the loss."""
        if not self.steps:
            return []
        loss = _points(self.steps, "reward" if self.rewarded else "loss")
        series = [Series("each step", loss, "faint"), Series("smoothed", smooth(loss, [1.0] * len(loss)))]
        if scores := _points(self.scores, self.score_key):
            series.append(Series("held out", scores, "dots", "b"))
        best = _points([each for each in self.scores if each.get("best")], self.score_key)
        title = "Loss, mean squared error" if images else "Reward" if self.rewarded else "Loss"
        legend = [(each.name, each.colour + ("-faint" if each.kind == "faint" else "")) for each in series]
        mark = best[-1] if best else None
        charts = [Markup(chart(series, wide=wide, marked=mark, label=title)) for wide in (True, False)]
        out = [(title, charts, legend)]
        for name, key, scale in (
            (f"{'Images' if images else 'Tokens'} per second", "tokens_per_second", 1.0),
            ("Memory, GB", "memory_bytes", 1e-9),
            ("Learning rate", "learning_rate", 1.0),
            ("Token accuracy", "token_accuracy", 1.0),
        ):
            if points := _points(self.steps, key, scale):
                svg = chart([Series(name, points)], wide=False, label=name, from_zero=key != "learning_rate")
                out.append((name, [Markup(svg)], []))
        return out

    def figures(self, job: Job) -> list[tuple[str, str, str]]:
        """Return (label, value, remark) for each figure."""
        out: list[tuple[str, str, str]] = []
        if self.steps:
            newest, rewards = self.steps[-1], mean_rewards(self.steps[-1])
            after = f"after step {newest['step']:,}"
            if rewards is None:
                out.append(("Loss", loss_text(float(newest["loss"])), after))
            elif "reward" in rewards:
                out.append(("Reward", f"{rewards['reward']:.3f}", parts_text(rewards) or after))
        if scores := [each for each in self.scores if self.score_key in each]:
            ends = (scores[0][self.score_key], scores[-1][self.score_key])
            first, last = (f"{score:.3f}" if self.rewarded else loss_text(score) for score in ends)
            name = "Held-out reward" if self.rewarded else "Held-out loss"
            out.append((name, last, f"{first} before training" if scores[0]["step"] == 0 else ""))
        if self.steps and "memory_bytes" in self.steps[-1]:
            newest, unit = self.steps[-1], "images" if trains_images(job) else "tokens"
            out.append(("Memory", size(int(newest["memory_bytes"])), "peak so far"))
            out.append(("Speed", f"{newest.get('tokens_per_second', 0):,.0f}", f"{unit} per second"))
        left, recent = "", [float(each["seconds"]) for each in self.steps[-50:]]
        if recent and job.state == "running" and job.steps:
            left = f"{duration(sum(recent) / len(recent) * (job.steps - job.step))} left"
        out.append(("Step", f"{job.step:,} of {job.steps:,}" if job.steps else "not started", left))
        return out

    def checkpoints(self, page: ViewPage, job: Job) -> dict[str, Any]:
        """Return the values for the template steps.html.j2."""
        scores = {each["step"]: each[self.score_key] for each in self.scores if self.score_key in each}
        points = page.studio.jobs.checkpoints(page.principal.owner, job.id)
        scored = [point.step for point in points if point.step in scores]
        best = (max if self.rewarded else min)(scored, key=scores.__getitem__, default=None)
        rows = [(point, scores.get(point.step)) for point in points]
        return {"rows": rows, "best": best, "before": scores.get(0), "rewarded": self.rewarded, "link": page.link}


def _points(events: _Events, key: str, scale: float = 1.0) -> list[tuple[float, float]]:
    return [(float(each["step"]), scale * float(each[key])) for each in events if key in each]


async def run_view(page: ViewPage) -> None:
    job, jobs, events = await job_of(page), page.studio.jobs, _RunEvents()
    images, operator = trains_images(job), page.principal.can("operate")
    page.title(job.name)
    data = job.config.get("data") or {}
    rows = data.get("train") or data.get("pictures")
    elements.line(f"Trains {_base_name(job)}" + (f" on {short_path(str(rows))}" if rows and operator else ""), "lede")
    same_base = _base_name(job) == Path(page.studio.base).name
    head: dict[str, Any] = {"trains": page.studio.trains, "link": page.link}
    head_fragment = elements.Fragment("run_head.html.j2")
    bar = elements.progress("Progress")
    with elements.box("div", "row below"):
        pause = elements.button("Pause", elements.permit("train", lambda: change("pause")), key="p")
        resume = elements.button("Resume", elements.permit("train", lambda: change("resume")), key="p", kind="filled")
        stop = elements.button("Stop…", elements.permit("train", lambda: ask_to_stop()), kind="danger")
        if operator:
            settings = settings_of({**job.config, "output": f"runs/{job.name.rpartition('/')[2]}"})
            elements.button(
                "Edit and train again…", elements.permit("operate", lambda: page.go("train", s=settings)), kind="word"
            )
    same = elements.Command()
    figures = elements.Fragment("figures.html.j2")
    charts = elements.Fragment("charts.html.j2")
    use = elements.permit("train", lambda data: ask_to_use(int(data["step"])))
    table = elements.Fragment("steps.html.j2", actions={"use": use})
    choose_sheet = elements.permit("train", lambda data: show_sheet(data["step"]))
    sheets = elements.Fragment("sheets.html.j2", actions={"sheet": choose_sheet})
    notes = elements.Fragment("notes.html.j2")

    def read() -> tuple[Job, dict[str, Any], Any]:
        events.read(page, job)
        return jobs.get(page.principal.owner, job.id), events.checkpoints(page, job), events.charts(images)

    async def refill() -> None:
        now, checkpoints, chart_list = await asyncio.to_thread(read)
        finished = now.state in ENDS
        published = any(point.reference for point, _ in checkpoints["rows"])
        compare = page.link("compare", job=job.id) if same_base and published else ""
        head_fragment.show(job=now, error=now.error if operator else error_to_openai(now), compare=compare, **head)
        elements.set_progress(bar, now.step / now.steps if now.steps else None)
        for element, visible in (
            (bar, not finished),
            (pause, now.state in ("queued", "running")),
            (resume, now.state == "paused"),
            (stop, not finished),
        ):
            elements.set_visible(element, visible)
        same.show(text=elements.command("jobs", "show" if finished else "watch", now.id))
        figures.show(figures=events.figures(now))
        charts.show(charts=chart_list)
        table.show(**checkpoints)
        show_sheet(page.query.get("sheet"))
        notes.show(notes=events.notes, checked=events.checked)

    def show_sheet(step: str) -> None:
        steps = events.samples
        selected = int(step) if step.isdecimal() and int(step) in steps else steps[-1] if steps else None
        page.set_query(sheet=step if step == str(selected) else None)
        source = page.api(f"/v1/jobs/{job.id}/samples/{selected}")
        sheets.show(steps=steps[-_SHEETS:], chosen=selected, source=source)

    async def change(action: str) -> None:
        await asyncio.to_thread(jobs.pause if action == "pause" else jobs.resume, page.principal.owner, job.id)
        await refill()
        page.notify("Pausing: the run saves its state" if action == "pause" else "Resuming from the last checkpoint")

    def ask_to_stop() -> None:
        async def do() -> None:
            await asyncio.to_thread(jobs.cancel, page.principal.owner, job.id)
            await refill()

        sentence = "The run ends without a final adapter. Published checkpoints stay in the library."
        same = elements.command("jobs", "cancel", job.id)
        elements.confirm(
            f"Stop {job.name}?", sentence, elements.permit("train", do), button_text="Stop", command=same, danger=True
        )

    def ask_to_use(step: int) -> None:
        def keep() -> Version:
            version = store_checkpoint(jobs, job.id, step, tenant=page.principal.owner)
            audit_added(page.studio.service.tenancy, page.principal, version)
            return version

        async def do() -> None:
            version = await asyncio.to_thread(keep)
            await page.go("adapter", ref=version.reference)
            page.notify(f"{version.reference} is step {step:,} of the run")

        sentence = f"This checkpoint becomes the newest version of {job.name}."
        same = elements.command("jobs", "keep", job.id, step=step)
        elements.confirm(
            f"Use step {step:,}", sentence, elements.permit("train", do), button_text="Use this step", command=same
        )

    def mark() -> object:
        newest = jobs.events(page.principal.owner, job.id, newest=True, limit=1)[0]
        points = jobs.checkpoints(page.principal.owner, job.id)
        return jobs.get(page.principal.owner, job.id), [each.number for each in newest], [p.reference for p in points]

    await refill()  # before the timer is created, because its creation sends the page to the browser
    page.on_change(mark, _POLL, refill)
