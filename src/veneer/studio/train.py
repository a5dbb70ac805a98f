"""Train: a sentence that says a run, what it would be beside it, and its rows and pictures one by one."""

from __future__ import annotations

import asyncio
import base64
import functools
import itertools
import json
import os
import shlex
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from veneer.errors import ConfigError, VeneerError, counted, gigabytes
from veneer.jobs.openai import shown_error
from veneer.jobs.store import Job
from veneer.jobs.validate import device_of, submitted
from veneer.plan.plan import Plan
from veneer.plan.render import rough_duration
from veneer.plan.tables import Device
from veneer.studio import parts
from veneer.studio.commands import command
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
    permit,
    progress,
    show,
)
from veneer.studio.watch import on_change
from veneer.train.config.image import ImageTrainConfig
from veneer.train.config.load import RunConfig, config_from, load_config
from veneer.train.config.sentence import Sentence, read_sentence, sentence_of
from veneer.train.image.captions import write_caption
from veneer.train.inspect import (
    VERDICTS,
    RowVerdict,
    SeenPicture,
    inspect_run,
    picture_of,
    pictures_seen,
    rows_seen,
)
from veneer.train.preflight import Report, free_memory

_ROWS = 20
"""Rows of a table at a time."""
_SHOWN = 48
"""Pictures of a sheet at a time."""
_RUNS = 8
"""Runs below the sentence."""
_SIDE = 260
"""Pixels of a picture in the sheet."""
_POINTS = 8
"""Checkpoints that a short run gets."""
_EXAMPLE = Path("examples/tickets/config.yaml")


@functools.lru_cache(maxsize=1)
def _device() -> Device:
    return device_of()


_looking = threading.Lock()
"""One look at a time: whoever types makes many, and only the last is wanted."""


@dataclass
class _Draft:
    """What is typed now. `number`: of the last change, so that an older look is not shown over a newer one."""

    sentence: Sentence
    config: RunConfig | None = None
    look: Report | None = None
    number: int = 0
    verdict: str = ""
    offset: int = 0

    def overrides(self, talk: bool) -> list[str]:
        """What the page adds so that steps can be compared, and asked while it trains, where the sentence is silent."""
        said = {each.key for each in self.sentence.read}
        out = ["checkpoint.adapters=true"] if talk and "checkpoint.adapters" not in said else []
        steps = None if self.look is None or self.look.plan is None else self.look.plan.job.total_steps
        if steps is None or "checkpoint.every" in said:
            return out
        every = min(100, max(1, steps // _POINTS))
        out += [f"checkpoint.every={every}"] if every < 100 else []
        return out + ([] if "evaluation.every" in said else [f"evaluation.every={every}"])


def _configured(sentence: Sentence, more: list[str]) -> RunConfig:
    return config_from({}, [*sentence.checked().overrides, *more])[0]


async def train_view(page: ViewPage) -> None:
    studio = page.studio
    page.title("Train", "Bring rows with questions and answers, look at them, and start a run.")
    page.when_loaded(lambda: page.again() if studio.service.engine.makes == "pictures" else None)
    if studio.queue is not None and studio.service.engine.makes == "texts":
        await train_form(page, studio.queue)
    elif not page.caller.can("operate"):
        line("This server does not train on rows; its operator can start it with --train.", "soft")
    if not page.caller.can("operate"):
        await _runs(page)
        return
    heading("In one sentence")
    line("Say what to teach. What you leave out has a default, with a reason.", "soft")
    draft = _Draft(read_sentence(page.query.get("q")))
    asks = "Draw with" if studio.service.engine.makes == "pictures" else "Ask"
    with box("div", "split asking"):
        with box("div", "stack"):
            asked = form_field(
                "What to teach",
                page.query.get("q"),
                permit("operate", lambda text: typed(text)),
                kind="area",
                most=2000,
                key="/",
                hint=f"teach {studio.base} from tickets.jsonl, rank 16",
                wait=0.3,
                look="find say",
                entered=permit("operate", lambda text: started()),
            )
            read = Fragment(
                "read.html.j2",
                acts={"take": permit("operate", lambda data: taken(data["text"]))},
                **_reading(page, draft),
            )
            with box("div", "row"):
                start = button("Start", permit("operate", lambda: started()), kind="filled", key="ctrl+enter")
                talk = form_field(
                    f"{asks} its steps while it trains",
                    page.query.get("talk") != "no",
                    permit("operate", lambda on: asking(on)),
                    kind="check",
                )
            same = Command()
        plan = Fragment("plan.html.j2", look="side", look_at=None, plan=None, says=_says, busy=False, guesses=())
        with box("div", "under"):
            bar = progress("Looking at the rows")
            found = Fragment("findings.html.j2", findings=(), sample=())
    table = Fragment(
        "rows.html.j2",
        acts={
            "only": permit("operate", lambda data: only(data["verdict"])),
            "page": permit("operate", lambda data: turned(data["offset"])),
        },
        seen=None,
        verdicts=VERDICTS,
        verdict="",
        offset=0,
        some=_ROWS,
        said="",
    )
    sheet = Fragment(
        "sheet.html.j2", acts={"caption": permit("operate", lambda data: captioned(data))}, pictures=(), more=0
    )
    same_rows = Command()
    show(bar, False)

    async def typed(text: str) -> None:
        page.keep(q=text)
        draft.sentence, draft.config, draft.look, draft.offset = read_sentence(text), None, None, 0
        draft.number += 1
        await looked(draft.number)

    def asking(on: bool) -> None:
        page.keep(talk=None if on else "no")
        drawn()

    async def taken(text: str) -> None:
        asked.put(text)
        await typed(text)

    def drawn(busy: bool = False, wrong: VeneerError | None = None) -> None:
        sentence, look = draft.sentence, draft.look
        read.show(**_reading(page, draft, wrong))
        why = "" if sentence.whole else "the sentence is not whole yet"
        if wrong is not None:
            why = wrong.what
        elif studio.loading:
            why = studio.loading
        elif look is not None and not look.starts:
            why = "what was found has to be mended first"
        enable(start, not why and look is not None, why or "the rows are being looked at")
        plan.show(
            look_at=look,
            plan=None if look is None else look.plan,
            says=_says,
            busy=busy,
            guesses=() if look is None else look.guesses,
        )
        found.show(findings=() if look is None else look.findings, sample=() if look is None else look.sample)
        show(bar, busy)
        more = draft.overrides(bool(talk.value))
        same.show(command("jobs", "submit", sentence.text, *more) if sentence.whole else "")

    async def looked(number: int) -> None:
        """Reads, plans and looks at the rows; what a later change has overtaken is not shown."""
        same_rows.show("")
        table.show(seen=None, verdicts=VERDICTS, verdict="", offset=0, some=_ROWS, said="")
        sheet.show(pictures=(), more=0)
        if not draft.sentence.whole or studio.loading:
            return drawn()
        drawn(busy=True)
        sentence = draft.sentence

        def do() -> tuple[RunConfig, Report] | None:
            with _looking:
                if number != draft.number:
                    return None
                config = _configured(sentence, [])
                return config, inspect_run(config, device=_device())

        try:
            done = await asyncio.to_thread(do)
        except VeneerError as error:
            if number == draft.number:
                drawn(wrong=error)
            return
        if done is None or number != draft.number:
            return
        draft.config, draft.look = done
        drawn()
        await seen()

    async def seen() -> None:
        """The rows, or the pictures, one by one."""
        config, number = draft.config, draft.number
        if config is None or (isinstance(config, ImageTrainConfig) and config.slider.wanted):
            return
        try:
            if isinstance(config, ImageTrainConfig):
                pictures = await asyncio.to_thread(pictures_seen, config)
                shown = await asyncio.to_thread(_thumbnails, pictures[:_SHOWN])
                if number == draft.number:
                    sheet.show(pictures=shown, more=len(pictures) - len(shown))
            else:
                wanted = cast("list[RowVerdict]", [draft.verdict] if draft.verdict else [])
                look = functools.partial(rows_seen, config, offset=draft.offset, limit=_ROWS, verdicts=wanted)
                rows = await asyncio.to_thread(look)
                if number == draft.number:
                    table.show(
                        seen=rows,
                        verdicts=VERDICTS,
                        verdict=draft.verdict,
                        offset=draft.offset,
                        some=_ROWS,
                        said=_rows_said(rows),
                    )
        except VeneerError:
            return  # it stands among the findings
        if number == draft.number:
            same_rows.show(command("data", "show", draft.sentence.text, only=draft.verdict, offset=draft.offset or ""))

    async def only(verdict: str) -> None:
        draft.verdict, draft.offset = ("" if verdict == draft.verdict else verdict), 0
        await seen()

    async def turned(offset: str) -> None:
        draft.offset = max(0, int(offset))
        await seen()

    async def captioned(data: dict[str, str]) -> None:
        """One caption, in place: the picture is named by what is in it."""
        if not isinstance(draft.config, ImageTrainConfig):
            return
        picture = await asyncio.to_thread(picture_of, draft.config, data.get("id", ""))
        await _ask_caption(page, picture, draft.config, again)

    async def again() -> None:
        draft.number += 1
        await looked(draft.number)

    async def started() -> None:
        sentence, look = draft.sentence, draft.look
        if not sentence.whole or look is None or not look.starts:
            raise ConfigError("this run cannot begin yet", fix="see what was found, and what is not read")
        more = draft.overrides(bool(talk.value))

        def do() -> Job:
            return submitted(studio.jobs, _configured(sentence, more), device=_device(), tenants=studio.tenants)

        show(bar, True)
        try:
            job = await asyncio.to_thread(do)
        finally:
            show(bar, False)
        if job.state == "failed":
            error = job.error or {}
            raise VeneerError(str(error.get("message")), where=error.get("where"), fix=error.get("fix"))
        await page.go("run", job=job.id)
        page.say(f"{job.name} is queued")

    drawn()
    await _runs(page)
    page.task(looked(draft.number))
    page.when_loaded(again)


def _reading(page: ViewPage, draft: _Draft, wrong: VeneerError | None = None) -> dict[str, Any]:
    """What was read of the sentence, and what was not; of an empty one, some to begin with."""
    sentence, begins = draft.sentence, list[tuple[str, str]]()
    if not sentence.text.strip():
        begins = beginnings(page.studio)
    return {
        "read": sentence.read,
        "unread": sentence.unread,
        "wrong": wrong,
        "missing": sentence.missing if sentence.text.strip() else (),
        "here": _short_path(os.getcwd()),
        "begins": begins,
        "empty": not sentence.text.strip(),
    }


def beginnings(studio: Studio) -> list[tuple[str, str]]:
    """What a newcomer could begin with, of the files that are here: (what is learned from, the sentence)."""
    base = str(studio.service.catalog.shelf.base.name)
    with os.scandir() as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, 2000) if not entry.name.startswith("."))
    if studio.service.engine.makes == "pictures":
        folders = [name for name in names if next(Path(name).glob("*.png"), None) is not None][:2]
        return [(name, f"teach {shlex.quote(base)} from folder {shlex.quote(name)}, trigger sks") for name in folders]
    rows = [name for name in names if name.endswith((".jsonl", ".csv", ".parquet"))][:2]
    out = [(name, f"teach {shlex.quote(base)} from {shlex.quote(name)}, rank 16") for name in rows]
    return [*out, *_example(base)][:2]


def _example(base: str) -> list[tuple[str, str]]:
    """The quickstart's tickets, in a checkout: its own configuration, said."""
    if not _EXAMPLE.is_file():
        return []
    config, _ = load_config(_EXAMPLE, [f"base={json.dumps(base)}", "output.directory=runs/support-tickets"])
    return [("1,200 answered support tickets", sentence_of(config.model_dump(mode="json", exclude_unset=True)))]


def _short_path(path: str) -> str:
    home = str(Path.home())
    return f"~{path[len(home) :]}" if path == home or path.startswith(home + "/") else path


def _says(plan: Plan) -> dict[str, str]:
    """The plan's figures in words."""
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
    """Each picture small, as an address of its own bytes: no path leaves this process."""
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
            "What is to be seen",
            picture.caption,
            permit("operate", lambda now: same.show(command("data", "caption", str(picture.path), now))),
            kind="area",
            most=2000,
        )
        line("It is written where the run reads it: beside the picture, or in the folder's metadata.", "soft small")
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
    """The newest runs: whatever was begun can be left, and come back to."""
    runs = Fragment("runs.html.j2", jobs=(), errors={}, link=page.link)

    def newest() -> list[Job]:
        return page.studio.jobs.jobs(page.caller.owner, limit=_RUNS)[0]

    async def fill() -> None:
        jobs = await asyncio.to_thread(newest)
        errors = {job.id: job.error if page.caller.can("operate") else shown_error(job) for job in jobs}
        runs.show(jobs=jobs, errors=errors, link=page.link)

    await fill()
    on_change(lambda: [(job.id, job.state, job.step) for job in newest()], 2.0, fill)
