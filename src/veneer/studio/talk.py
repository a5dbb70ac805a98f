"""Chat with a run's steps and the base, during and after training."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from veneer.errors import ConfigError, VeneerError
from veneer.formats.card import opening
from veneer.jobs.store import Job, UnknownJob
from veneer.jobs.validate import job_config
from veneer.serve.http.text_requests import TextRequest, ask_texts
from veneer.serve.request import Finished, Token
from veneer.studio.commands import command, command_base
from veneer.studio.frame import NothingHere, ViewPage
from veneer.studio.parts import Command, Fragment, box, button, enable, form_field, heading, line, permit, put
from veneer.studio.watch import on_change
from veneer.train.config.reinforcement import PROMPT_FORMATS
from veneer.train.config.text import TrainConfig, preference_formats
from veneer.train.text.rows import read_rows, split_rows

_WORDS = 160
"""Maximum tokens of an answer."""
_LONGEST = 2000
"""Maximum characters of a suggested prompt."""
_PROMPTS = 2
"""Number of prompts suggested from a run's rows."""


async def job_of(page: ViewPage) -> Job:
    """Return the link's job. Raises NothingHere for a missing or invisible job."""
    try:
        return await asyncio.to_thread(page.studio.jobs.get, page.caller.owner, page.query.get("job"))
    except UnknownJob:
        raise NothingHere("There is no such run, or none that you may see.", fix="see `veneer jobs list`") from None


def base_name(job: Job) -> str:
    base = job.config["base"]
    return str(base["name"] if isinstance(base, dict) else base).rstrip("/")


def asked_here(page: ViewPage, job: Job) -> str:
    """Return why this server cannot run a job's steps, or ""."""
    if page.studio.loading:
        return page.studio.loading
    name = base_name(job)
    if page.studio.service.engine.makes != "texts":
        return f"this server draws pictures with {page.studio.base}"
    own = name.rpartition("/")[2]
    return "" if own == page.studio.base.rpartition("/")[2] else f"this server runs {page.studio.base}, and not {own}"


def own_prompts(job: Job) -> tuple[str, list[str]]:
    """Return (system message, user prompts) of a run's first held-out rows.

    Uses training rows if none are held out. ("", []) if the rows are gone."""
    try:
        config = job_config(job, job.folder)
        if not isinstance(config, TrainConfig):
            return "", []
        data = config.data
        formats = None if config.preference.loss is None else preference_formats(config.preference.loss)
        rows, _ = read_rows(
            data.files("train"),
            limit=200,
            format=data.format,
            columns=data.columns,
            formats=PROMPT_FORMATS if config.sampling is not None else formats,
        )
        held = split_rows(rows, data.split, seed=config.split_seed)[1] or rows
    except VeneerError:
        return "", []
    asked = [each for each in map(opening, (row.messages for row in held)) if 0 < len(each[1]) <= _LONGEST]
    system = asked[0][0] if asked else ""
    return system, list(dict.fromkeys(text for told, text in asked if told == system))[:_PROMPTS]


def prompt_messages(prompt: str, system: str) -> list[dict[str, Any]]:
    """Return a prompt as messages, after the system message if given."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": prompt}]


async def answer_of(
    page: ViewPage,
    messages: Sequence[dict[str, Any]],
    reference: str,
    told: Callable[[str], None] | None = None,
    *,
    most: int = _WORDS,
) -> str:
    """Return the greedy answer of the base (reference "") or an adapter.

    `told` is called with the text as it arrives."""
    mix = [(reference, 1.0)] if reference else []
    said, text = TextRequest([dict(message) for message in messages], mix, max_tokens=most), ""
    async for _, event in ask_texts(page.studio.service, page.caller, said):
        if isinstance(event, Token | Finished):
            text += event.text
            if told is not None:
                told(text)
        if isinstance(event, Finished) and event.error is not None:
            raise event.error
    return text


def start_answers(
    page: ViewPage, answers: Fragment, messages: Sequence[dict[str, Any]], reference: str
) -> list[asyncio.Task[Any]]:
    """Send the same messages to base and adapter, and stream both answers.

    Template: answers_two.html.j2."""
    columns = [{"name": name, "text": "", "done": False} for name in (page.studio.base, reference)]

    async def ask(column: dict[str, Any], name: str) -> None:
        try:
            await answer_of(page, messages, name, lambda text: column.update(text=text))
        finally:  # after an error too: `show` waits for it
            column["done"] = True

    async def show() -> None:
        while not all(column["done"] for column in columns):
            answers.show(columns=columns)
            await asyncio.sleep(0.1)
        answers.show(columns=columns)

    answers.show(columns=columns)
    asked = [page.task(ask(column, name)) for column, name in zip(columns, ("", reference), strict=True)]
    return [*asked, page.task(show())]


async def talk_to(page: ViewPage, job: Job) -> Callable[[], object]:
    """Draw a prompt and the answers of base and step, also during training.

    Returns a function that starts to follow the run's steps."""
    heading("Chat with a step", 2)
    with box("section", "stack talk"):
        hint = line("", "soft")
        which = form_field(
            "Step",
            page.query.get("step"),
            permit("read", lambda step: page.keep(step=step)),
            kind="choice",
            options={"": "no step yet"},
        )
        prompt = form_field(
            "Prompt",
            page.query.get("p"),
            permit("read", lambda text: page.keep(p=text)),
            kind="area",
            entered=permit("infer", lambda text: ask()),
            hint="A question as in the training data",
        )
        told_first = form_field(
            "System prompt",
            page.query.get("s"),
            permit("read", lambda text: page.keep(s=text)),
            kind="area",
            hint="System message of the training rows",
        )
        with box("div", "row"):
            asking = button("Ask", permit("infer", lambda: ask()), key="ctrl+enter")
        answers = Fragment("answers_two.html.j2", columns=[])
        same = Command()
    if not (page.query.get("p") or page.query.get("s")):
        system, own = await asyncio.to_thread(own_prompts, job)
        prompt.put(own[0] if own else "")
        told_first.put(system)
        page.keep(p=own[:1], s=system)
    known: dict[str, str] = {}
    running: list[asyncio.Task[Any]] = []

    def points() -> list[tuple[int, str]]:
        found = page.studio.jobs.checkpoints(page.caller.owner, job.id)
        return [(point.step, point.reference) for point in found if point.reference]

    async def fill() -> None:
        found, now = await asyncio.to_thread(points), await job_of(page)
        why = asked_here(page, job)
        made = (now.result or {}).get("reference")
        choices = {"made": "the adapter it made"} if made else {}
        choices |= {str(step): f"step {step:,}" for step, _ in found}
        known.clear()
        known.update({str(step): reference for step, reference in found} | ({"made": str(made)} if made else {}))
        which.offer(choices or {"": "no step yet"})
        chosen = page.query.get("step")  # what the user chose
        if chosen not in known:
            newest = str(found[0][0]) if found else ""
            chosen = "made" if made else str(which.value) if which.value in known else newest
        if which.value != chosen:
            which.put(chosen)
        says = why or ("" if known else "Available once the first checkpoint is saved.")
        if not known and not (job.config.get("checkpoint") or {}).get("adapters"):
            says = why or "The run does not publish checkpoints: its adapter can be asked once the run is done."
        put(hint, says)
        enable(asking, bool(known) and not why, says)

    async def ask() -> None:
        why = asked_here(page, job)
        if why or str(which.value) not in known:
            raise ConfigError(why or "there is no step to ask yet", fix="wait for the first checkpoint")
        for task in running:
            task.cancel()
        running.clear()
        text, reference = str(prompt.value or "").strip(), known[str(which.value)]
        system = str(told_first.value or "").strip()
        if not text:
            raise ConfigError("there is no prompt", fix="type one")
        same.show(command("generate", text, base=command_base(page), adapter=reference, system=system))
        running.extend(start_answers(page, answers, prompt_messages(text, system), reference))

    await fill()
    page.when_loaded(fill)
    return lambda: on_change(lambda: (points(), page.studio.jobs.get(page.caller.owner, job.id).state), 1.0, fill)
