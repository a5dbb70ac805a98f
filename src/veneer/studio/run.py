"""The view of one run: live charts, figures, sample images, actions and chat.

Pause, resume and stop the run, and chat with any of its steps during training. All data comes from the job's
events, so the link is the only state.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from veneer.jobs.openai import MEASURED, error_to_openai, event_to_openai
from veneer.jobs.store import ENDS, Job
from veneer.studio.commands import command
from veneer.studio.frame import ViewPage
from veneer.studio.parts import Command, Fragment, box, button, confirm, line, permit, progress, show
from veneer.studio.parts import move as moved
from veneer.studio.talk import base_name, job_of, talk_to
from veneer.studio.watch import on_change
from veneer.train.config.load import settings_of
from veneer.train.events import loss_text, mean_rewards, parts_text
from veneer.train.report.log import duration, size
from veneer.train.report.page import Series, chart, smooth

_LOOK = 0.7
"""Seconds between two polls of a run."""
_NEWEST = 6
"""Number of newest image grids and steps to choose from."""


def of_pictures(job: Job) -> bool:
    """Return whether a job trains an image base."""
    return "pictures" in job.config.get("data", {}) or "slider" in job.config


def _run_settings(job: Job, **more: Any) -> list[str]:
    """Return the settings of a run like this job, with other sections."""
    return settings_of({**job.config, "output": f"runs/{job.name.rpartition('/')[2]}", **more})


@dataclass
class _Heard:
    """Data collected from a job's events. `last`: number of the last event read."""

    last: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    checked: dict[str, Any] = field(default_factory=dict)

    def hear(self, page: ViewPage, job: Job) -> None:
        """Read new events; hide server paths from a tenant."""
        more = True
        while more:
            events, more = page.studio.jobs.events(page.caller.owner, job.id, after=self.last)
            for event in events:
                self.last = event.number
                if not page.caller.can("operate") and event.kind not in MEASURED:
                    told = event_to_openai(job, event)
                    event = replace(event, message=told["message"], data=told["data"])
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

    def charts(self, pictures: bool) -> list[tuple[str, list[Markup], list[tuple[str, str]]]]:
        """Return (title, [wide SVG, narrow SVG], legend) per chart, the loss first."""
        if not self.steps:
            return []
        rewarded = any(mean_rewards(each) is not None for each in self.steps)
        key, held = ("reward", "reward") if rewarded else ("loss", "validation_loss")
        loss = [(float(each["step"]), float(each[key])) for each in self.steps if key in each]
        series = [Series("each step", loss, "faint"), Series("smoothed", smooth(loss, [1.0] * len(loss)))]
        scores = [(float(each["step"]), float(each[held])) for each in self.scores if held in each]
        if scores:
            series.append(Series("held out", scores, "dots", "b"))
        best = [(float(each["step"]), float(each[held])) for each in self.scores if each.get("best") and held in each]
        title = "Loss, mean squared error" if pictures else "Reward" if rewarded else "Loss"
        legend = [(each.name, each.colour + ("-faint" if each.kind == "faint" else "")) for each in series]
        mark = best[-1] if best else None
        both = [Markup(chart(series, wide=wide, mark=mark, label=title)) for wide in (True, False)]
        out = [(title, both, legend)]
        unit = "Pictures" if pictures else "Tokens"
        for name, key, scale in (
            (f"{unit} a second", "tokens_per_second", 1.0),
            ("Memory, GB", "memory_bytes", 1e-9),
            ("Learning rate", "learning_rate", 1.0),
            ("Share of tokens guessed right", "token_accuracy", 1.0),
        ):
            points = [(float(each["step"]), scale * float(each[key])) for each in self.steps if key in each]
            if points:
                drawn = chart([Series(name, points)], wide=False, label=name, from_zero=key != "learning_rate")
                out.append((name, [Markup(drawn)], []))
        return out

    def figures(self, job: Job) -> list[tuple[str, str, str]]:
        """Return (label, figure, remark) tuples."""
        out = []
        rewards = mean_rewards(self.steps[-1]) if self.steps else None
        if rewards is not None:
            after = f"after step {self.steps[-1]['step']:,}"
            out += [("Reward", f"{rewards['reward']:.3f}", parts_text(rewards) or after)] * ("reward" in rewards)
            held = [each for each in self.scores if "reward" in each]
            if held:
                before = f"{held[0]['reward']:.3f} before" if held[0]["step"] == 0 else ""
                out.append(("Held-out reward", f"{held[-1]['reward']:.3f}", before))
        elif self.steps:
            newest = self.steps[-1]
            out.append(("Loss", loss_text(float(newest["loss"])), f"after step {newest['step']:,}"))
        if self.scores and rewards is None:
            first, last = self.scores[0], self.scores[-1]
            before = f"{loss_text(first['validation_loss'])} before" if first["step"] == 0 else ""
            out.append(("Held-out loss", loss_text(last["validation_loss"]), before))
        if self.steps and "memory_bytes" in self.steps[-1]:
            out.append(("Memory", size(int(self.steps[-1]["memory_bytes"])), "at most, until now"))
            unit = "pictures" if of_pictures(job) else "tokens"
            out.append(("Speed", f"{self.steps[-1].get('tokens_per_second', 0):,.0f}", f"{unit} a second"))
        left = ""
        recent = [float(each["seconds"]) for each in self.steps[-50:]]
        if recent and job.state == "running" and job.steps:
            left = f"{duration(sum(recent) / len(recent) * (job.steps - job.step))} left"
        out.append(("Step", f"{job.step:,} of {job.steps:,}" if job.steps else "not begun", left))
        return out


async def run_view(page: ViewPage) -> None:
    job, jobs, heard = await job_of(page), page.studio.jobs, _Heard()
    pictures = of_pictures(job)
    page.title(job.name)
    data = job.config.get("data") or {}
    on = data.get("train") or data.get("pictures")
    line(f"Trains {Path(base_name(job)).name}" + (f" on {on}" if on and page.caller.can("operate") else ""), "lede")
    head = Fragment("run_head.html.j2", job=job, error=None, trains=page.studio.trains, link=page.link)
    bar = progress("Steps done", None)
    with box("div", "row below"):
        pausing = button("Pause", permit("train", lambda: change("pause")), key="p")
        resuming = button("Resume", permit("train", lambda: change("resume")), key="p", kind="filled")
        stopping = button("Stop…", permit("train", lambda: ending()), kind="danger")
        if page.caller.can("operate"):
            button(
                "Change it and train again…",
                permit("operate", lambda: page.go("train", s=_run_settings(job))),
                kind="word",
            )
    same = Command()
    figures = Fragment("figures.html.j2", figures=[])
    charts = Fragment("charts.html.j2", charts=[])
    sheets = Fragment(
        "sheets.html.j2",
        acts={"sheet": permit("train", lambda data: sheet(data["step"]))},
        steps=[],
        chosen=None,
        source="",
    )
    follow = None if pictures else await talk_to(page, job)
    notes = Fragment("notes.html.j2", notes=[], checked={})

    def read() -> Job:
        heard.hear(page, job)
        return jobs.get(page.caller.owner, job.id)

    async def fill() -> None:
        now = await asyncio.to_thread(read)
        made = await asyncio.to_thread(heard.charts, pictures)
        error = now.error if page.caller.can("operate") else error_to_openai(now)
        head.show(job=now, error=error, trains=page.studio.trains, link=page.link)
        show(bar, now.state not in ENDS)
        moved(bar, now.step / now.steps if now.steps else None)
        show(pausing, now.state in ("queued", "running"))
        show(resuming, now.state == "paused")
        show(stopping, now.state not in ENDS)
        what = "watch" if now.state not in ENDS else "show"
        same.show(command("jobs", what, now.id))
        figures.show(figures=heard.figures(now))
        charts.show(charts=made)
        sheet(page.query.get("sheet"))
        notes.show(notes=heard.notes, checked=heard.checked)

    def sheet(step: str) -> None:
        drawn = heard.samples
        chosen = int(step) if step.isdecimal() and int(step) in drawn else drawn[-1] if drawn else None
        page.keep(sheet=step if chosen is not None and step == str(chosen) else None)
        source = "" if chosen is None else page.api(f"/v1/jobs/{job.id}/samples/{chosen}")
        sheets.show(steps=drawn[-2 * _NEWEST :], chosen=chosen, source=source)

    async def change(what: str) -> None:
        does = jobs.pause if what == "pause" else jobs.resume
        await asyncio.to_thread(does, page.caller.owner, job.id)
        await fill()
        page.say("Pausing: the run saves its state" if what == "pause" else "Resuming from the last checkpoint")

    def ending() -> None:
        async def do() -> None:
            await asyncio.to_thread(jobs.cancel, page.caller.owner, job.id)
            await fill()

        confirm(
            f"Stop {job.name}?",
            "The run ends without an adapter. Published steps stay in the library.",
            permit("train", do),
            button_text="Stop",
            command=command("jobs", "cancel", job.id),
            danger=True,
        )

    await fill()  # before any timer: the first timer sends the page
    on_change(lambda: (jobs.get(page.caller.owner, job.id), _newest(page, job.id)), _LOOK, fill)
    if follow is not None:
        follow()


def _newest(page: ViewPage, job: str) -> int:
    found, _ = page.studio.jobs.events(page.caller.owner, job, newest=True, limit=1)
    return found[0].number if found else 0
