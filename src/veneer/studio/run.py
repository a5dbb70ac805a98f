"""One run: its curves as they grow, its figures, its sample pictures; pause, resume, stop, and a word with any step of
it while the next one trains. All of it is read from the job's own events, so that its link is all there is to keep.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from markupsafe import Markup

from veneer.errors import ConfigError, VeneerError
from veneer.jobs.openai import MEASURED, shown_error, shown_event
from veneer.jobs.steps import fork_config
from veneer.jobs.store import ENDS, Job, UnknownJob
from veneer.jobs.validate import job_config
from veneer.serve.http.asking import AskedTexts, ask_texts
from veneer.serve.request import Finished, Token
from veneer.studio.commands import command
from veneer.studio.frame import NothingHere, ViewPage
from veneer.studio.parts import (
    Command,
    Fragment,
    box,
    button,
    confirm,
    enable,
    form_field,
    heading,
    line,
    progress,
    put,
    show,
)
from veneer.studio.parts import move as moved
from veneer.studio.watch import on_change
from veneer.train.config.reinforcement import PROMPT_FORMATS
from veneer.train.config.sentence import sentence_of
from veneer.train.config.text import TrainConfig, preference_formats
from veneer.train.report.page import Series, chart, smooth
from veneer.train.text.rows import read_rows, split_rows

_LOOK = 0.7
"""Seconds between two looks at a run."""
_WORDS = 160
"""Tokens of an answer at most."""
_LONGEST = 300
"""Letters of a prompt that nobody typed."""
_PROMPTS = 2
"""Prompts of a run's own rows."""
_NEWEST = 6
"""Sheets and steps that are shown to choose from."""


async def job_of(page: ViewPage) -> Job:
    """The job of the link. Raises NothingHere for one that whoever looks does not see."""
    try:
        return await asyncio.to_thread(page.studio.jobs.get, page.tenant, page.query.get("job"))
    except UnknownJob:
        raise NothingHere("There is no such run, or none that you may see.", fix="see `veneer jobs list`") from None


def of_pictures(job: Job) -> bool:
    """Whether it trains a base that draws."""
    return "pictures" in job.config.get("data", {}) or "slider" in job.config


def _said_by(job: Job, **more: Any) -> str:
    """The sentence that would ask for this job."""
    last = job.name.rpartition("/")[2]
    return sentence_of({**job.config, "output": f"runs/{last}", **more})


@dataclass
class _Heard:
    """What the events of a job have said until now. `last`: the number of the last one."""

    last: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    checked: dict[str, Any] = field(default_factory=dict)

    def hear(self, page: ViewPage, job: Job) -> None:
        """Reads what is new; of where things are on the server a tenant hears nothing."""
        more = True
        while more:
            events, more = page.studio.jobs.events(page.tenant, job.id, after=self.last)
            for event in events:
                self.last = event.number
                if not page.caller.admin and event.kind not in MEASURED:
                    told = shown_event(job, event)
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
        """(title, pictures, legend), the loss first: for a wide page, and for a narrow one."""
        if not self.steps:
            return []
        loss = [(float(each["step"]), float(each["loss"])) for each in self.steps]
        series = [Series("each step", loss, "faint"), Series("smoothed", smooth(loss, [1.0] * len(loss)))]
        scores = [(float(each["step"]), float(each["validation_loss"])) for each in self.scores]
        if scores:
            series.append(Series("held out", scores, "dots", "b"))
        best = [(float(each["step"]), float(each["validation_loss"])) for each in self.scores if each.get("best")]
        title = "Loss, mean squared error" if pictures else "Loss"
        legend = [(each.name, each.colour + ("-faint" if each.kind == "faint" else "")) for each in series]
        mark = best[-1] if best else None
        both = [Markup(chart(series, wide=wide, mark=mark, label=title)) for wide in (True, False)]
        out = [(title, both, legend)]
        unit = "Pictures" if pictures else "Tokens"
        for name, key, scale in (
            (f"{unit} a second", "tokens_per_second", 1.0), ("Memory, GB", "memory_bytes", 1e-9),
            ("Learning rate", "learning_rate", 1.0), ("Share of tokens guessed right", "token_accuracy", 1.0),
        ):  # fmt: skip
            points = [(float(each["step"]), scale * float(each[key])) for each in self.steps if key in each]
            if points:
                drawn = chart([Series(name, points)], wide=False, label=name, from_zero=key != "learning_rate")
                out.append((name, [Markup(drawn)], []))
        return out

    def figures(self, job: Job) -> list[tuple[str, str, str]]:
        """(what, figure, remark)."""
        from veneer.train.report.log import duration, loss_text, size

        out = []
        if self.steps:
            newest = self.steps[-1]
            out.append(("Loss", loss_text(float(newest["loss"])), f"after step {newest['step']:,}"))
        if self.scores:
            first, last = self.scores[0], self.scores[-1]
            before = f"{loss_text(first['validation_loss'])} before" if first["step"] == 0 else ""
            out.append(("Held-out loss", loss_text(last["validation_loss"]), before))
        if self.steps and "memory_bytes" in self.steps[-1]:
            speed = f"{self.steps[-1].get('tokens_per_second', 0):,.0f} a second"
            out.append(("Memory", size(int(self.steps[-1]["memory_bytes"])), speed))
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
    said = _said_by(job) if page.caller.admin else f"taught on {Path(_base_name(job)).name}"
    line(said, "lede")
    head = Fragment("run_head.html.j2", job=job, error=None, trains=page.studio.trains, link=page.link)
    bar = progress("Steps done", None)
    with box("div", "row below"):
        pausing = button("Pause", lambda: change("pause"), key="p")
        resuming = button("Resume", lambda: change("resume"), key="p", kind="filled")
        stopping = button("Stop…", lambda: ending(), kind="danger")
        if not page.caller.tenant:
            button("Again, otherwise…", lambda: page.go("train", q=_said_by(job)), kind="word")
    same = Command()
    figures = Fragment("figures.html.j2", figures=[])
    charts = Fragment("charts.html.j2", charts=[])
    sheets = Fragment(
        "sheets.html.j2", acts={"sheet": lambda data: sheet(data["step"])}, steps=[], chosen=None, source=""
    )
    follow = None if pictures else await _talk(page, job)
    notes = Fragment("notes.html.j2", notes=[], checked={})

    def read() -> Job:
        heard.hear(page, job)
        return jobs.get(page.tenant, job.id)

    async def fill() -> None:
        now = await asyncio.to_thread(read)
        made = await asyncio.to_thread(heard.charts, pictures)
        error = now.error if page.caller.admin else shown_error(now)
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
        chosen = int(step) if step.isdigit() and int(step) in drawn else drawn[-1] if drawn else None
        page.keep(sheet=step if chosen is not None and step == str(chosen) else None)
        source = "" if chosen is None else page.api(f"/v1/jobs/{job.id}/samples/{chosen}")
        sheets.show(steps=drawn[-2 * _NEWEST :], chosen=chosen, source=source)

    async def change(what: str) -> None:
        does = jobs.pause if what == "pause" else jobs.resume
        await asyncio.to_thread(does, page.tenant, job.id)
        await fill()
        page.say("It saves its state and rests" if what == "pause" else "It goes on from its last checkpoint")

    def ending() -> None:
        async def do() -> None:
            await asyncio.to_thread(jobs.cancel, page.tenant, job.id)
            await fill()

        confirm(
            f"Stop {job.name}?", "It ends for good and makes no adapter. Steps that can be asked stay in the library.",
            do, button_text="Stop", command=command("jobs", "cancel", job.id), danger=True,
        )  # fmt: skip

    await fill()  # before anything is followed: with the first timer the page goes out
    on_change(lambda: (jobs.get(page.tenant, job.id), _newest(page, job.id)), _LOOK, fill)
    if follow is not None:
        follow()


def _newest(page: ViewPage, job: str) -> int:
    found, _ = page.studio.jobs.events(page.tenant, job, newest=True, limit=1)
    return found[0].number if found else 0


def _base_name(job: Job) -> str:
    base = job.config["base"]
    return str(base["name"] if isinstance(base, dict) else base).rstrip("/")


def asked_here(page: ViewPage, job: Job) -> str:
    """Why this server cannot ask the steps of a job; "" where it can."""
    name = _base_name(job)
    if page.studio.service.engine.makes != "texts":
        return f"this server draws pictures with {page.studio.base}"
    own = name.rpartition("/")[2]
    return "" if own == page.studio.base.rpartition("/")[2] else f"this server runs {page.studio.base}, and not {own}"


def own_prompts(job: Job) -> list[str]:
    """The first questions of rows that a run holds out, or of its rows; none where they are gone."""
    try:
        config = job_config(job, job.folder)
        if not isinstance(config, TrainConfig):
            return []
        data = config.data
        formats = None if config.preference.loss is None else preference_formats(config.preference.loss)
        rows, _ = read_rows(
            data.files("train"), limit=200, format=data.format, columns=data.columns,
            formats=PROMPT_FORMATS if config.drawn is not None else formats,
        )  # fmt: skip
        held = split_rows(rows, data.split, seed=config.seed)[1] or rows
    except VeneerError:
        return []
    asked = [next((m["content"] for m in reversed(row.messages) if m["role"] == "user"), "") for row in held]
    return [str(text)[:_LONGEST] for text in dict.fromkeys(asked) if text][:_PROMPTS]


async def answer_of(page: ViewPage, prompt: str, reference: str, told: Any = None, *, most: int = _WORDS) -> str:
    """What the base (reference "") or an adapter answers, with the likeliest tokens; `told` hears it as it comes."""
    mix = [(reference, 1.0)] if reference else []
    said, text = AskedTexts([{"role": "user", "content": prompt}], mix, max_tokens=most), ""
    async for _, event in ask_texts(page.studio.service, page.caller, said):
        if isinstance(event, Token | Finished):
            text += event.text
            if told is not None:
                told(text)
        if isinstance(event, Finished) and event.error is not None:
            raise event.error
    return text


async def _talk(page: ViewPage, job: Job) -> Callable[[], object]:
    """A prompt, and what the base and a step of the run answer, while the run goes on. Returns what begins to follow
    its steps."""
    heading("Talk to it", 2)
    with box("section", "stack talk"):
        hint = line("", "soft")
        which = form_field(
            "Step", page.query.get("step"), lambda step: page.keep(step=step), kind="choice",
            options={"": "no step yet"},
        )  # fmt: skip
        prompt = form_field(
            "Prompt", page.query.get("p"), lambda text: page.keep(p=text), kind="area", entered=lambda text: ask(),
            hint="Something that it should have learned",
        )  # fmt: skip
        with box("div", "row"):
            asking = button("Ask", lambda: ask(), key="ctrl+enter")
        answers = Fragment("answers_two.html.j2", columns=[])
        same = Command()
    why = asked_here(page, job)
    if not page.query.get("p") and (own := await asyncio.to_thread(own_prompts, job)):
        prompt.put(own[0])
    known: dict[str, str] = {}
    running: list[asyncio.Task[Any]] = []

    def points() -> list[tuple[int, str]]:
        found = page.studio.jobs.checkpoints(page.tenant, job.id)
        return [(point.step, point.reference) for point in found if point.reference]

    async def fill() -> None:
        found, now = await asyncio.to_thread(points), await job_of(page)
        fresh = {str(step): f"step {step:,}" for step, _ in found}
        known.clear()
        known.update({str(step): reference for step, reference in found})
        made = (now.result or {}).get("reference")
        if made:
            known["made"], fresh = str(made), {"made": "what it made", **fresh}
        which.offer(fresh or {"": "no step yet"})
        if which.value not in known:
            which.put(next(iter(known), ""))
        says = why or ("" if known else "As soon as its first checkpoint is saved, it can be asked here.")
        if not known and not (job.config.get("checkpoint") or {}).get("adapters"):
            says = why or "It was not asked to publish its checkpoints: it can be asked once it is done."
        put(hint, says)
        enable(asking, bool(known) and not why, says)

    async def ask() -> None:
        if why or str(which.value) not in known:
            raise ConfigError(why or "there is no step to ask yet", fix="wait for the first checkpoint")
        for task in running:
            task.cancel()
        running.clear()
        text, reference = str(prompt.value or "").strip(), known[str(which.value)]
        if not text:
            raise ConfigError("there is no prompt", fix="type one")
        names = (page.studio.base, reference)
        columns: list[dict[str, Any]] = [{"name": name, "text": "", "done": False} for name in names]
        same.show(command("generate", text, base=page.studio.base, adapter=reference, chat=True))

        async def one(column: dict[str, Any], name: str) -> None:
            def told(said: str) -> None:
                column["text"] = said

            await answer_of(page, text, name, told)
            column["done"] = True

        async def drawn() -> None:
            while not all(column["done"] for column in columns):
                answers.show(columns=columns)
                await asyncio.sleep(0.1)
            answers.show(columns=columns)

        answers.show(columns=columns)
        running.extend(page.task(one(column, name)) for column, name in zip(columns, ("", reference), strict=True))
        running.append(page.task(drawn()))

    await fill()
    return lambda: on_change(lambda: (points(), page.studio.jobs.get(page.tenant, job.id).state), 1.0, fill)


def fork_sentence(page: ViewPage, job: Job, step: int | None) -> str:
    """The sentence of a run that goes on from a step of this one. Raises ConfigError for a step without an adapter."""
    config = fork_config(page.studio.jobs, job, step)
    values = config.model_dump(mode="json", exclude_unset=True)
    values["checkpoint"] = {k: v for k, v in dict(values.get("checkpoint") or {}).items() if k != "adapters"}
    return sentence_of({**values, "output": f"runs/{job.name.rpartition('/')[2]}"})
