"""The Steps view: a run's checkpoints with held-out scores and answers or images.

A step can be published, or continued in a new run."""

from __future__ import annotations

import asyncio
from typing import Any

from veneer.errors import ConfigError
from veneer.jobs.step_actions import keep_step
from veneer.jobs.store import Job, JobCheckpoint
from veneer.library.library import NotInLibrary
from veneer.library.queries import Version
from veneer.serve.http.surfaces.adapters import note_added
from veneer.studio import parts
from veneer.studio.commands import command
from veneer.studio.frame import ViewPage
from veneer.studio.parts import Command, Fragment, dialog, form_field, heading, line, permit, put
from veneer.studio.run import of_pictures
from veneer.studio.talk import answer_of, asked_here, job_of, own_prompts, prompt_messages
from veneer.studio.watch import on_change
from veneer.train.config.load import settings_of
from veneer.train.events import mean_rewards

_WORDS = 60
_KNOWN: dict[tuple[str, str, str, str], str] = {}
"""Cache of greedy answers, oldest first.

(adapter's reference or the base, job, system prompt, prompt) -> text."""
_MOST = 4000


async def steps_view(page: ViewPage) -> None:
    job = await job_of(page)
    pictures = of_pictures(job)
    seen = "the same prompts, drawn by each" if pictures else "what it scored on rows that it never saw"
    page.title(f"Steps of {job.name}", f"Every step that was kept, and {seen}.")
    table = Fragment(
        "steps.html.j2",
        acts={
            "use": permit("train", lambda data: use(data["step"])),
            "go": permit("operate", lambda data: go_on(data["step"])),
        },
        points=[],
        best=None,
        used={},
        link=page.link,
        job=job,
        pictures=pictures,
        before=None,
        rewarded=False,
        forks=False,
        live=False,
    )
    Command(command("jobs", "show", job.id))
    grid: _StepAnswers | None = None
    if pictures:
        sheets = Fragment("step_sheets.html.j2", samples=[], job=job, api=page.api)
    else:
        grid = _StepAnswers(page, job)
        page.when_loaded(page.again)

    def read() -> dict[str, Any]:
        jobs = page.studio.jobs
        now, points = jobs.get(page.caller.owner, job.id), jobs.checkpoints(page.caller.owner, job.id)
        scores = {event.data["step"]: event.data for event in jobs.events_of(page.caller.owner, job.id, "validation")}
        samples = [event.data["step"] for event in jobs.events_of(page.caller.owner, job.id, "sample")]
        rewarded = any(mean_rewards(data) is not None for data in scores.values())
        key = "reward" if rewarded else "validation_loss"
        found = [{"point": point, "score": scores.get(point.step, {}).get(key)} for point in points]
        known = {p.step: float(scores[p.step]["validation_loss"]) for p in points if p.step in scores}
        best = min(known, key=lambda step: known[step]) if known else None
        before = scores[0].get(key) if 0 in scores else None
        return {
            "job": now,
            "points": found,
            "best": best,
            "before": before,
            "samples": samples,
            "rewarded": rewarded,
        }

    async def fill() -> None:
        found = await asyncio.to_thread(read)
        used = await asyncio.to_thread(_used, page, job)
        table.show(
            points=found["points"],
            best=found["best"],
            used=used,
            link=page.link,
            job=found["job"],
            pictures=pictures,
            before=found["before"],
            rewarded=found["rewarded"],
            forks=not page.caller.tenant,
            live=page.caller.can("operate") and page.studio.tenants is not None,
        )
        if pictures:
            sheets.show(samples=found["samples"][::-1], job=job, api=page.api)
        elif grid is not None:
            grid.steps([each["point"] for each in found["points"]])

    def use(step: str) -> None:
        with dialog(f"Use step {step}") as window:
            line(f"The step becomes the newest version of {job.name}. An alias points to it until it is moved.")
            alias = form_field("Alias", "prod", permit("train", lambda now: told.show(_keeping(job, step, now))))
            told = Command(_keeping(job, step, "prod"))

            async def do() -> None:
                name = str(alias.value or "").strip()

                def keep() -> Version:
                    kept = keep_step(page.studio.jobs, job.id, int(step), alias=name, tenant=page.caller.owner)
                    note_added(page.studio.service.tenancy, page.caller, kept)
                    return kept

                version = await asyncio.to_thread(keep)
                parts.closed(window)
                await fill()
                page.say(f"{version.name}{f'@{name}' if name else ''} is step {step} now")

            parts.decide(window, "Use this step", permit("train", do))
        parts.opened(window)

    async def go_on(step: str) -> None:
        await page.go("train", s=await asyncio.to_thread(_continue_settings, page, job, int(step)))

    await fill()
    on_change(lambda: _mark(page, job), 1.0, fill)


def _mark(page: ViewPage, job: Job) -> object:
    points = page.studio.jobs.checkpoints(page.caller.owner, job.id)
    now = page.studio.jobs.get(page.caller.owner, job.id)
    return [(p.step, p.reference) for p in points], now.state, len(now.result or {}), page.studio.library_mark()


def _keeping(job: Job, step: str, alias: str) -> str:
    return command("jobs", "keep", job.id, step=step, alias=alias)


def _continue_settings(page: ViewPage, job: Job, step: int) -> list[str]:
    """Return the settings of a run that continues from a step's adapter."""
    points = page.studio.jobs.checkpoints(page.caller.owner, job.id)
    adapter = {"start": next(point.reference for point in points if point.step == step)}
    if "dropout" in (job.config.get("adapter") or {}):
        adapter["dropout"] = job.config["adapter"]["dropout"]
    checkpoint = {key: value for key, value in (job.config.get("checkpoint") or {}).items() if key != "adapters"}
    output = f"runs/{job.name.rpartition('/')[2]}"
    return settings_of({**job.config, "adapter": adapter, "checkpoint": checkpoint, "output": output})


def _used(page: ViewPage, job: Job) -> dict[str, list[Version]]:
    """Return step -> versions of the job's name with this step's adapter."""
    out: dict[str, list[Version]] = {}
    for version in page.studio.library.search(name=job.name, all_versions=True):
        if version.name == job.name:
            out.setdefault(version.digest, []).append(version)
    steps: dict[str, list[Version]] = {}
    for point in page.studio.jobs.checkpoints(page.caller.owner, job.id):
        if point.reference and (found := _version(page, point.reference)) is not None:
            steps[str(point.step)] = out.get(found.digest, [])
    return steps


def _version(page: ViewPage, reference: str) -> Any:
    try:
        return page.studio.library.find(reference)
    except NotInLibrary:
        return None


class _StepAnswers:
    """Answers of base and steps to the same prompts.

    Requests run one after another, to leave the engine to other users."""

    def __init__(self, page: ViewPage, job: Job) -> None:
        self.page, self.job, self.columns = page, job, list[tuple[str, str]]()
        self.why, self.running = asked_here(page, job), list[asyncio.Task[Any]]()
        self.texts: dict[tuple[str, str, str], str] = {}
        heading("The same prompts", 2)
        self.hint = line(self.why, "soft")
        self.prompt = form_field(
            "Another prompt",
            "",
            kind="text",
            entered=permit("infer", lambda text: self.more(text)),
            hint="Press Enter to ask every step",
        )
        self.system = form_field(
            "System prompt",
            page.query.get("s"),
            permit("infer", lambda text: self.told(text)),
            kind="area",
            hint="System message of the training rows",
        )
        self.grid = Fragment(
            "answers_grid.html.j2", acts={"drop": permit("infer", lambda d: self.less(d["prompt"]))}, rows=[], heads=[]
        )

    @property
    def prompts(self) -> list[str]:
        return self.page.query.all("p")

    def steps(self, points: list[JobCheckpoint]) -> None:
        """Set the columns: the base, then the newest steps."""
        found = [(f"step {point.step:,}", point.reference) for point in points[::-1] if point.reference]
        columns = [(self.page.studio.base, ""), *found[-6:]]
        if columns == self.columns:
            return
        self.columns = columns
        self._again()

    async def more(self, text: str) -> None:
        if not text.strip():
            raise ConfigError("there is no prompt", fix="type one")
        self.page.keep(p=[*self.prompts, text.strip()][-4:])
        self.prompt.put("")
        self._again()

    def told(self, system: str) -> None:
        """Set another system prompt and ask every step again."""
        self.page.keep(s=system)
        self._again()

    def less(self, text: str) -> None:
        self.page.keep(p=[each for each in self.prompts if each != text])
        self._again()

    def _again(self) -> None:
        for task in self.running:
            task.cancel()
        self.running = [self.page.task(self._ask())]

    def _draw(self) -> None:
        system = str(self.system.value or "").strip()
        rows = [(prompt, [self.texts.get((system, prompt, ref)) for _, ref in self.columns]) for prompt in self.prompts]
        self.grid.show(rows=rows, heads=[name for name, _ in self.columns])

    async def _ask(self) -> None:
        if self.why:
            return
        if not (self.prompts or self.page.query.get("s")):
            system, own = await asyncio.to_thread(own_prompts, self.job)
            self.system.put(system)
            self.page.keep(p=own, s=system)
        system = str(self.system.value or "").strip()
        put(self.hint, "" if len(self.columns) > 1 else "No step can be asked yet: the checkpoints are not published.")
        self._draw()
        for prompt in self.prompts:
            for _, reference in self.columns:
                key = (reference or self.page.studio.base, self.job.id, system, prompt)
                if (known := _KNOWN.get(key)) is None:
                    known = _KNOWN[key] = await answer_of(
                        self.page, prompt_messages(prompt, system), reference, most=_WORDS
                    )
                    if len(_KNOWN) > _MOST:
                        del _KNOWN[next(iter(_KNOWN))]
                self.texts[system, prompt, reference] = known
                self._draw()
