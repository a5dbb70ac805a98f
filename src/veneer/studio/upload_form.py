"""The form to train on uploaded rows: choose a file, see its rows, start a run.

All principals with the permission `train` can use this form. The form accepts no server paths, only ids of
the principal's own uploads. The function behind POST /v1/fine_tuning/jobs checks and queues the run."""

from __future__ import annotations

import asyncio
from typing import Any

from veneer.errors import ConfigError, counted
from veneer.jobs.http.tuning import TuningQueue
from veneer.jobs.input_files import LINE_FILES, FilePreview, preview_file
from veneer.jobs.openai import FormSettings, TuningBody
from veneer.serve.http.bodies import checked
from veneer.studio import elements
from veneer.studio.page import ViewPage
from veneer.train.config.load import config_from
from veneer.train.report.log import size
from veneer.train.text.rows import RowsSummary, UnusableRow, question_and_answer

_COLUMNS = {"prompt": "Question column", "completion": "Answer column"}
_FILES, _ROWS, _SHOWN, _LETTERS = 100, 50, 8, 600
"""Maximum number of files offered, rows read, rows shown, and characters shown per text."""


async def draw_upload_form(page: ViewPage, queue: TuningQueue) -> None:
    studio = page.studio
    beginning, newest = FilePreview(), 0

    def number_field(label: str, hint: str, low: float, high: float, step: float | None) -> elements.Field:
        return elements.form_field(label, None, None, kind="number", hint=hint, low=low, high=high, step=step)

    with elements.box("div", "split"):
        with elements.box("section", "stack", aria_label="Rows"):
            with elements.box("div", "row foot"):
                choose = elements.permit("train", lambda id: select(id))
                file_field = elements.form_field("Uploaded file", "", choose, kind="choice", options={"": ""})
                elements.button("Upload a file…", elements.permit("train", page.pick_file))
            elements.line("JSON lines, CSV or TSV, with a question and its answer in each row.", "soft small")
            with elements.box("div", "row foot"):
                preview = elements.permit("train", lambda: read())
                columns = {
                    name: elements.form_field(label, "", preview, kind="choice", options={"": "choose a column"})
                    for name, label in _COLUMNS.items()
                }
            rows_table = elements.Fragment("form_rows.html.j2")
        with elements.box("aside", "stack panel"):
            elements.heading("Run")
            elements.line(f"Trains {studio.base}, the base of this server.", "soft small")
            name_field = elements.form_field("Adapter name", "", None, max_length=64)
            epochs = number_field("Epochs", "3, or more for few rows", 1, 50, 1)
            rank = number_field("Rank", "", 1, 256, 1)
            rate = number_field("Learning rate", "", 0, 1, None)
            train = elements.button("Train", elements.permit("train", lambda: start()), kind="filled")
            status = elements.line("", "soft small", role="status")

    def upload_url(filename: str) -> str:
        if not filename.lower().endswith(LINE_FILES):
            raise ConfigError(f"{filename} is not a file of rows", fix=f"upload one of {', '.join(LINE_FILES)}")
        return page.api("/v1/files")

    async def offer_files(selected: str) -> None:
        """Offer the principal's uploaded files, and select one."""
        tenant = page.principal.tenant
        files, _ = await asyncio.to_thread(queue.files.list, tenant, purpose="fine-tune", limit=_FILES)
        options = {file.id: f"{file.filename}, {size(file.bytes)}" for file in files}
        file_field.set_options({"": "upload a file, or drop it here"} | options)
        file_field.set_value(selected if selected in options else "")
        await select(file_field.value)

    async def select(id: Any) -> None:
        page.set_query(file=id)
        for column in columns.values():
            column.set_value("")
        await read()

    def settings() -> FormSettings:
        """Return the form's row format, columns, rank and learning rate. Raises Refused."""
        mapped = {name: str(field.value) for name, field in columns.items() if field.value}
        values = {"format": "prompt-completion" if mapped else "auto", "columns": mapped}
        form: FormSettings = checked(FormSettings, values | {"rank": rank.value, "learning_rate": rate.value}, "form")
        return form

    async def read() -> FilePreview:
        """Read the file's first rows; show them unless a newer read has started."""
        nonlocal beginning, newest
        newest = number = newest + 1
        principal, id, result = page.principal, str(file_field.value or ""), FilePreview()
        if id:
            file, form = await asyncio.to_thread(queue.files.get, principal.tenant, id), settings()

            def parse() -> FilePreview:
                return preview_file(queue.files, file, form.format, form.columns, _ROWS)

            result = await queue.previewing.run(principal.tenant, principal.weight, 1, parse)
        if number == newest:
            beginning = result
            show()
        return result

    def show() -> None:
        mapped = any(field.value for field in columns.values())
        for field in columns.values():
            elements.set_visible(field, bool(beginning.columns) and (beginning.about is None or mapped))
            field.set_options({"": "choose a column"} | {column: column for column in beginning.columns})
        rows = [_row_values(row) for row in beginning.rows] if not beginning.problem else []
        unusable = [row for row in rows if row[4]]
        summary, problem = "", f"{counted(len(unusable), 'row')} cannot be used." if unusable else ""
        if beginning.about is not None:
            first = "" if beginning.complete else "the first "
            reason = "" if mapped else f": {beginning.about.why}"
            summary = f"{first}{counted(len(rows), 'row')}, read as {beginning.about.format}{reason}"
        if beginning.problem:
            problem = "Choose the question and answer columns." if beginning.columns else beginning.problem
        usable = [row for row in rows if not row[4]]
        rows_table.show(summary=summary, problem=problem, rows=[*unusable, *usable][:_SHOWN])
        values: dict[str, Any] = {"preference": {"loss": "dpo"}} if _method(beginning.about) == "dpo" else {}
        values |= {"base": {"name": studio.service.reader.name}, "data": {"train": "rows.jsonl"}, "output": "."}
        defaults, _ = config_from(values)
        elements.set_attributes(rank, hint=f"{defaults.adapter.rank}")
        elements.set_attributes(rate, hint=f"{defaults.optimizer.learning_rate:g}")
        reason = studio.loading or problem or ("" if beginning.about is not None else "no rows yet")
        elements.set_text(status, studio.loading)
        elements.enable(train, not reason, reason)

    async def start() -> None:
        studio.service.need_base()
        result = await read()  # read again, because the fields may have changed
        if result.about is None or any(isinstance(row, UnusableRow) for row in result.rows):
            raise ConfigError("the file has no rows or has unusable rows", fix="upload a file and see the preview")
        method = _method(result.about)
        hyperparameters = {"n_epochs": "auto" if epochs.value is None else epochs.value}
        values = {
            "model": studio.base,
            "training_file": str(file_field.value),
            "suffix": str(name_field.value or "").strip() or None,
            "method": {"type": method, method: {"hyperparameters": hyperparameters}},
        }
        body: TuningBody = checked(TuningBody, values, "form")
        form = settings().model_copy(update={"format": result.about.format})
        job = await queue.create(studio.service, page.principal, body, form)
        await page.go("run", job=job.id)
        page.notify(f"{job.name} is queued")

    page.on_drop(
        "Drop to upload rows", upload_url, lambda file: offer_files(str(file.get("id", ""))), {"purpose": "fine-tune"}
    )
    await offer_files(page.query.get("file"))
    page.when_loaded(read)


def _row_values(row: Any) -> tuple[str, str, str, str, str]:
    """Return (line number, question, answer, rejected answer, problem) of a row."""
    number = row.where.rpartition(":")[2]
    if isinstance(row, UnusableRow):
        return number, "", "", "", row.why
    question, answer, rejected = (text[:_LETTERS] for text in question_and_answer(row))
    return number, question, answer, rejected, ""


def _method(about: RowsSummary | None) -> str:
    """Return OpenAI's training method for rows of this format."""
    return "dpo" if about is not None and about.format in ("preference", "openai-preference") else "supervised"
