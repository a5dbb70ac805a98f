"""A form to train on uploaded rows: choose a file, preview its rows, start a run.

Available to all principals with permission to train. The form accepts no server paths: a file is the caller's
own upload, with an id, and the function behind POST /v1/fine_tuning/jobs checks and queues the run.
"""

from __future__ import annotations

import asyncio
import io
import json
import time
from typing import Any

from veneer.errors import ConfigError, counted
from veneer.jobs.files import UploadedFile
from veneer.jobs.http.tuning import TuningQueue
from veneer.jobs.input_files import LINE_FILES, FilePreview, preview_file
from veneer.jobs.openai import FormSettings, TuningBody
from veneer.serve.http.bodies import checked
from veneer.studio.frame import ViewPage
from veneer.studio.parts import Fragment, box, button, enable, form_field, heading, line, mark, permit, put, show
from veneer.train.config.load import config_from
from veneer.train.report.log import size
from veneer.train.text.rows import About, UnusableRow, format_columns, present_column, question_and_answer

_FORMATS = {
    "auto": "Recognize the columns",
    "prompt-completion": "Question and answer",
    "messages": "Conversations: messages of role and content",
    "sharegpt": "Conversations: from and value (ShareGPT)",
    "instruction": "Instruction, input and output (Alpaca)",
    "text": "Plain text",
    "preference": "Preferences: a chosen and a rejected answer (DPO)",
    "openai-preference": "Preferences in OpenAI's columns (DPO)",
}
_COLUMNS = tuple(dict.fromkeys(name for each in _FORMATS if each != "auto" for name in format_columns(each)))
_WORDS = {"prompt": "Question", "completion": "Answer"}
_FILES, _LOOKED, _SHOWN, _LETTERS = 100, 50, 8, 600
"""Preview limits: files to offer, rows read, rows shown, characters per text."""
_PASTED = 200_000
"""Maximum pasted characters; longer text must be uploaded as a file."""


async def train_form(page: ViewPage, queue: TuningQueue) -> None:
    """Draw the form into the page."""
    form = _TrainForm(page, queue)
    page.drops("Drop to upload rows", form.place_of, form.uploaded, {"purpose": "fine-tune"})
    form.draw()
    await form.offer(page.query.get("file"))
    page.when_loaded(form.looked_again)


class _TrainForm:
    def __init__(self, page: ViewPage, queue: TuningQueue) -> None:
        self.page, self.queue = page, queue
        self.beginning, self.number = FilePreview(), 0
        self.known: dict[str, UploadedFile] = {}

    def draw(self) -> None:
        train = self.looked_again
        with box("div", "split"):
            with box("section", "stack", aria_label="Rows"):
                with box("div", "row foot"):
                    self.file = form_field("Rows", "", permit("train", self.chosen), kind="choice", options={"": ""})
                    button("Upload a file…", permit("train", self.page.pick))
                line("JSON lines, CSV or TSV, with a question and its answer in each row.", "soft small")
                with box("details", "how"):
                    line("Paste rows", tag="summary")
                    self.pasted = form_field(
                        "Rows to paste",
                        "",
                        permit("train", lambda _: None),
                        kind="area",
                        most=_PASTED + 1,
                        hint='{"prompt": "Where is my parcel?", "completion": "On its way."}',
                    )
                    button("Use these rows", permit("train", self.paste))
                self.format = form_field("Format", "auto", permit("train", train), kind="choice", options=_FORMATS)
                with box("div", "row foot mapping"):
                    self.columns = {
                        name: form_field(
                            f"{_WORDS.get(name, name.capitalize())} (`{name}`)".replace("`", ""),
                            "",
                            permit("train", train),
                            kind="choice",
                            options={"": name},
                        )
                        for name in _COLUMNS
                    }
                self.preview = Fragment("form_rows.html.j2", said="", problem="", rows=())
            with box("aside", "stack panel"):
                heading("Run", 2)
                line(f"Trains {self.page.studio.base}, the base of this server.", "soft small")
                self.name = form_field("Name of the adapter", "", permit("train", lambda _: None), most=64)
                self.epochs = _number("Epochs", "3, or more if rows are few", 1, 50, 1)
                self.rank = _number("Rank", "", 1, 256, 1)
                self.rate = _number("Learning rate", "", 0, 1, None)
                self.begin = button("Train", permit("train", self.start), kind="filled")
                self.waits = line("", "soft small", role="status")
        self._show()

    # -- the file

    def place_of(self, filename: str) -> str:
        """Return the upload route of a file of rows. Raises ConfigError for another file."""
        if not filename.lower().endswith(LINE_FILES):
            raise ConfigError(
                f"{filename} is no file of rows", fix=f"one of {', '.join(LINE_FILES)}, or paste the rows"
            )
        return self.page.api("/v1/files")

    async def uploaded(self, answer: dict[str, Any]) -> None:
        await self.offer(str(answer.get("id", "")))

    async def offer(self, chosen: str) -> None:
        """Offer the caller's uploaded files, with one selected."""
        tenant = self.page.caller.tenant
        files, _ = await asyncio.to_thread(self.queue.files.list, tenant, purpose="fine-tune", limit=_FILES)
        self.known = {file.id: file for file in files}
        named = {id: f"{file.filename}, {size(file.bytes)}" for id, file in self.known.items()}
        self.file.offer({"": "Upload a file, drop it here, or paste rows"} | named)
        self.file.put(chosen if chosen in named else "")
        await self.chosen(self.file.value)

    async def paste(self) -> None:
        text = str(self.pasted.value or "").strip()
        if not text:
            raise ConfigError("there are no rows to use", fix="paste some")
        if len(text) > _PASTED:
            raise ConfigError(f"at most {_PASTED:,} characters can be pasted", fix="upload the rows as a file")
        if text.startswith("["):
            try:
                text = "\n".join(json.dumps(row, ensure_ascii=False) for row in json.loads(text))
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"this is no JSON array of rows: {error}") from error
        name = f"pasted-{time.strftime('%H%M%S')}.{'jsonl' if text.startswith('{') else 'csv'}"
        tenant, source = self.page.caller.tenant, io.BytesIO(text.encode("utf-8", "replace"))
        made = await asyncio.to_thread(self.queue.files.add, tenant, name, "fine-tune", source)
        self.pasted.put("")
        await self.offer(made.id)

    async def chosen(self, id: Any) -> None:
        self.page.keep(file=id)
        self.format.put("auto")
        for column in self.columns.values():
            column.put("")
        await self.looked_again()

    # -- how it is read

    def _settings(self) -> FormSettings:
        """Return the form's settings: row format, columns, rank, learning rate.

        Raises Refused."""
        columns = {name: str(field.value) for name, field in self.columns.items() if field.value}
        format = str(self.format.value)
        names = () if format not in _FORMATS or format == "auto" else format_columns(format)
        given = {
            "format": format if format in _FORMATS else "auto",
            "rank": self.rank.value,
            "columns": {name: column for name, column in columns.items() if name in names},
            "learning_rate": self.rate.value,
        }
        found: FormSettings = checked(FormSettings, given, "form")
        return found

    async def looked_again(self) -> FilePreview:
        """Read the file's first rows again; show them unless a newer read has started."""
        self.number += 1
        number, caller, id = self.number, self.page.caller, str(self.file.value or "")
        beginning = self.beginning = FilePreview()
        if id:
            file = await asyncio.to_thread(self.queue.files.get, caller.tenant, id)
            settings = self._settings()

            def do() -> FilePreview:
                return preview_file(self.queue.files, file, settings.format, settings.columns, _LOOKED)

            beginning = await self.queue.looking.run(caller.tenant, caller.weight, 1, do)
            if beginning.columns and beginning.about is None and settings.format == "auto":
                self.format.put("prompt-completion")  # so that the user can map columns
        if number == self.number:
            self.beginning = beginning
            self._show()
        return beginning

    def _show(self) -> None:
        look, format = self.beginning, str(self.format.value)
        show(self.format, bool(look.columns))
        needed = () if format not in _FORMATS or format == "auto" or not look.columns else format_columns(format)
        for name, field in self.columns.items():
            show(field, name in needed)
            found = present_column(name, look.columns)
            field.offer({"": f"{found} (recognized)" if found else "choose a column"} | {c: c for c in look.columns})
        rows = [
            (row.where.rpartition(":")[2], "", "", "", row.why)
            if isinstance(row, UnusableRow)
            else (row.where.rpartition(":")[2], *(text[:_LETTERS] for text in question_and_answer(row)), "")
            for row in look.rows
        ]
        bad = [row for row in rows if row[4]]
        said = problem = ""
        if look.about is not None:
            more = "" if look.whole else "the first "
            how = f": {look.about.why}" if format == "auto" else ""
            said = f"{more}{counted(len(rows), 'row')}, read as {look.about.format}{how}"
            problem = f"{counted(len(bad), 'row')} cannot be used." if bad else ""
        if look.problem:
            problem = "Choose the format, and the column of each part." if look.columns else look.problem
            rows = []
        self.preview.show(said=said, problem=problem, rows=[*bad, *(row for row in rows if not row[4])][:_SHOWN])
        given: dict[str, Any] = {"preference": {"loss": "dpo"}} if _kind(look.about) == "dpo" else {}
        given["base"] = {"name": self.page.studio.service.reader.name}
        usual, _ = config_from({"data": {"train": "rows.jsonl"}, "output": {"directory": "."}, **given})
        mark(self.rank, hint=f"{usual.adapter.rank}")
        mark(self.rate, hint=f"{usual.optimizer.learning_rate:g}")
        why = "" if look.about is not None and not bad else "there are no rows yet" if not look.columns else problem
        why = why or self.page.studio.loading
        put(self.waits, why if why == self.page.studio.loading else "")
        enable(self.begin, not why, why)

    async def start(self) -> None:
        self.page.studio.service.need_base()
        beginning = await self.looked_again()  # with the current fields
        caller, settings, about = self.page.caller, self._settings(), beginning.about
        if about is None or any(isinstance(row, UnusableRow) for row in beginning.rows):
            raise ConfigError(
                "there are no rows to train on yet", fix="upload a file or paste rows, and see the preview"
            )
        kind = _kind(about)
        numbers = {"n_epochs": "auto" if self.epochs.value is None else self.epochs.value}
        given = {
            "model": self.page.studio.base,
            "training_file": str(self.file.value),
            "suffix": str(self.name.value or "").strip() or None,
            "method": {"type": kind, kind: {"hyperparameters": numbers}},
        }
        body: TuningBody = checked(TuningBody, given, "form")
        settings = settings.model_copy(update={"format": about.format})
        job = await self.queue.create(self.page.studio.service, caller, body, settings)
        await self.page.go("run", job=job.id)
        self.page.say(f"{job.name} is queued")


def _kind(about: About | None) -> str:
    """Return OpenAI's method for rows of this format."""
    return "dpo" if about is not None and about.format in ("preference", "openai-preference") else "supervised"


def _number(label: str, hint: str, low: float, high: float, step: float | None) -> Any:
    """Draw a number field whose hint states the default."""
    return form_field(
        label, None, permit("train", lambda _: None), kind="number", hint=hint, low=low, high=high, step=step
    )
