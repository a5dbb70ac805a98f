"""The Compare view: one prompt, answered by the base, versions and mixes.

It can also compare a run's checkpoints. Each request carries its mix, so a changed strength takes effect at
once. A vote becomes a preference row, a correction becomes a training row, and a mix can be saved as an
adapter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, Literal

from veneer.errors import AdapterError, ConfigError, VeneerError, counted
from veneer.formats.card import opening
from veneer.jobs.store import Job
from veneer.jobs.validate import job_config
from veneer.library.describe_files import card_prompt
from veneer.serve.access import ResolvedModel
from veneer.serve.http.errors import message_of
from veneer.serve.request import Finished, Refused, Token
from veneer.serve.tenancy.feedback import AnswerFeedback
from veneer.serve.tenancy.tenants import Tenants
from veneer.studio.ask import TextRequest, ask_texts
from veneer.studio.compare_board import Board, Column
from veneer.studio.components import Answers, TokenInfo
from veneer.studio.elements import Command, box, button, command, details, line, permit
from veneer.studio.page import ViewPage
from veneer.studio.run import job_of
from veneer.train.config.reinforcement import PROMPT_FORMATS
from veneer.train.config.text import TrainConfig, preference_formats
from veneer.train.text.feedback_rows import add_row, corrected_row, feedback_file, preference_row
from veneer.train.text.rows import read_rows, split_rows

_PAUSE = 1 / 30
"""Minimum seconds between two updates of the answers in the browser."""
_SAMPLES, _TOKENS = 8, 160
"""Maximum number of answers per column, and default maximum number of new tokens."""
_CHECKPOINTS = 5
"""Number of a run's newest checkpoints that the view compares."""
_LONGEST = 2000
"""Maximum length of a suggested prompt, in characters."""


async def compare_view(page: ViewPage) -> None:
    if page.query.get("job"):
        await _open_checkpoints(page)
    if page.studio.makes_images:
        from veneer.studio.compare_images import ImageBoard  # imported late: a text server does not need it

        return ImageBoard(page).draw()
    board = TextBoard(page)
    for name in board.adapters():
        await board.suggest_prompt(name)
    board.draw()


async def _open_checkpoints(page: ViewPage) -> None:
    """Put a run's newest checkpoints and a prompt from the run's data into the page's link.

    Raises NotFound."""
    job = await job_of(page)
    points = await asyncio.to_thread(page.studio.jobs.checkpoints, page.principal.owner, job.id)
    names = [point.reference for point in points if point.reference][:_CHECKPOINTS]
    system, prompt = await asyncio.to_thread(_row_prompt, job)
    await page.studio.service.catalog.fresh()  # the catalog may not contain the newest checkpoint yet
    page.set_query(job=None, c=names[::-1], p=page.query.get("p") or prompt, s=page.query.get("s") or system)


def _row_prompt(job: Job) -> tuple[str, str]:
    """Return (system message, user message) of the first held-out row of a run.

    If a run has no held-out rows, returns the first training row instead; for an image run, returns the first
    sample prompt. Prompts that are too long are skipped. Returns ("", "") if there is no prompt or the rows
    cannot be read."""
    try:
        config = job_config(job, job.folder)
        if not isinstance(config, TrainConfig):
            return "", next(iter(config.samples.prompts), "")
        data, loss = config.data, config.preference.loss
        formats = None if loss is None else preference_formats(loss)
        if config.sampling is not None:
            formats = PROMPT_FORMATS
        files = data.files("train")
        rows, _ = read_rows(files, limit=200, format=data.format, columns=data.columns, formats=formats)
        rows = split_rows(rows, data.split, seed=config.split_seed)[1] or rows
    except VeneerError:
        return "", ""
    prompts = (opening(row.messages) for row in rows)
    return next(((system, text) for system, text in prompts if 0 < len(text) <= _LONGEST), ("", ""))


class TextBoard(Board):
    def draw(self) -> None:
        self.page.title("Compare", "One prompt for the base, adapters and mixes.")
        with box("div", "ask"):
            self.draw_prompt("Every column answers this prompt")
            with details("Sampling settings"), box("div", "settings"):
                self.n = self.number_field("Answers per column", "n", 1, low=1, high=_SAMPLES, step=1)
                self.temperature = self.number_field("Temperature", "t", 0.0, low=0, high=2, step=0.1)
                self.seed = self.number_field("Seed", "seed", 0, low=0, high=2**31, step=1)
                self.tokens = self.number_field("Maximum tokens", "m", _TOKENS, low=1, high=4096, step=1)
                self.system = self.text_field("System prompt", "s", "Answer in one sentence.", kind="area")
            with box("div", "row"):
                button("Ask", permit("infer", self.ask_all), kind="filled", key="ctrl+enter")
                button("Stop", permit("infer", self.stop), kind="word", key="Escape")
                keys = "Ctrl+Enter sends the prompt; press a column's number to vote for its answer."
                line(keys, "soft small by-keys", "span")
        self.draw_board()
        self.judgement = Command()

    def draw_answers(self, position: int, column: Column) -> None:
        vote = permit("feedback", lambda i: self._vote(column, i)) if len(self.columns) > 1 else None
        correct = permit("feedback", lambda event: self._correct(column, event))
        name = column.name(self.studio.base)
        column.element = Answers(name, position + 1, leads=not position, vote=vote, correct=correct)

    def equivalent_command(self, column: Column) -> str:
        return command(
            "generate",
            str(self.prompt.value),
            base=self.page.base_argument,
            adapter=column.specs(),
            system=self.system.value,
            temperature=self.temperature.value or None,
            seed=int(self.seed.value or 0) or None,
            max_new_tokens=int(self.tokens.value or _TOKENS),
        )

    async def suggest_prompt(self, name: str) -> None:
        """If the link has no prompt, use the sample prompt from an adapter's card."""
        query, principal = self.page.query, self.page.principal
        if query.get("p") or query.get("s"):
            return
        try:
            version = await asyncio.to_thread(self.studio.library.find, name)
        except (AdapterError, ConfigError):  # the name is a loaded adapter or a route, not a library adapter
            return
        if principal.can_see(name, version.reference):
            system, text = opening(card_prompt(version.card))
            if text:
                self.page.set_query(p=text, s=system)

    async def on_added(self, name: str) -> None:
        await self.suggest_prompt(name)
        self.prompt.set_value(self.page.query.get("p"))
        self.system.set_value(self.page.query.get("s"))

    # -- answers

    def _messages(self) -> list[dict[str, Any]]:
        system = str(self.system.value or "").strip()
        first = [{"role": "system", "content": system}] if system else []
        return [*first, {"role": "user", "content": str(self.prompt.value)}]

    async def answer(self, column: Column) -> None:
        answers: Answers = column.element
        n = max(1, min(_SAMPLES, int(self.n.value or 1)))
        request = TextRequest(
            self._messages(),
            tuple(column.mix),
            n,
            seed=int(self.seed.value or 0),
            temperature=float(self.temperature.value or 0),
            max_tokens=int(self.tokens.value or _TOKENS),
            logprobs=4,
        )
        column.id, column.answers = request.id, [""] * n
        answers.begin(n)
        waiting: list[tuple[int, TokenInfo]] = []
        began = sent = time.perf_counter()
        first, names = 0.0, ""

        def resolved(model: ResolvedModel) -> None:
            nonlocal names
            names = " + ".join(name for name in model.adapters if self.page.principal.can_see(name))

        try:
            async with aclosing(ask_texts(self.studio.service, self.page.principal, request, resolved)) as events:
                async for i, event in events:
                    token: TokenInfo
                    if isinstance(event, Token):
                        token = event.text, event.logprob, [(text, logprob) for _, text, logprob in event.top]
                    elif isinstance(event, Finished):
                        token = event.text, None, []
                    else:
                        continue
                    now = time.perf_counter()
                    first = first or now - began
                    column.answers[i] += event.text
                    if event.text:
                        waiting.append((i, token))
                    if isinstance(event, Finished) or now - sent >= _PAUSE or sent == began:
                        answers.add(list(waiting))
                        waiting.clear()
                        sent = now
                    if isinstance(event, Finished):
                        answers.end(i, _note(event, first, now - began, names))
        except Refused as error:
            for i in range(n):
                answers.end(i, f"No answer: {message_of(error)}")

    # -- feedback

    async def _vote(self, column: Column, i: int) -> None:
        """Record that an answer is better than answer number `i` of every other column."""
        answer = column.answers[i]
        others = [other for other in self.columns if other is not column and i < len(other.answers)]
        rejected_columns = [other for other in others if other.answers[i].strip() != answer.strip()]
        if not rejected_columns:
            raise VeneerError("all columns have the same answer", fix="try another prompt, or a temperature above 0")
        rejected = tuple((other.id, i) for other in rejected_columns)
        feedback = AnswerFeedback(column.id, i, rejected=rejected, changed=frozenset({"rejected"}))
        rows = [preference_row(self._messages(), answer, other.answers[i]) for other in rejected_columns]
        where = await self._record(
            feedback, "preference", rows, selected=answer, rejected=rejected_columns[-1].answers[i]
        )
        column.element.show_feedback(i, f"Better than {counted(len(rejected_columns), 'other')}: {where}")

    async def _correct(self, column: Column, event: Sequence[Any]) -> None:
        i, text = int(event[0]), str(event[1])
        row = corrected_row(self._messages(), text)
        feedback = AnswerFeedback(column.id, i, corrected=row["messages"][-1], changed=frozenset({"corrected"}))
        where = await self._record(feedback, "messages", [row], answer=text)
        column.element.show_feedback(i, f"Corrected: {where}")

    async def _record(
        self, feedback: AnswerFeedback, format: Literal["preference", "messages"], rows: list[Any], **options: str
    ) -> str:
        """Store feedback with the tenant's stored answers, or else in a file.

        Returns a text that says where the feedback was stored.

        options: options of the command that adds the same row.

        Raises VeneerError for a tenant without stored answers, because only the operator's feedback can go to
        a file."""
        tenancy, principal = self.studio.service.tenancy, self.page.principal
        if isinstance(tenancy, Tenants) and principal.tenant in tenancy.store.settings.feedback:
            try:
                await asyncio.to_thread(tenancy.answers.give, principal.tenant, feedback)
                return "stored with the answers"
            except Refused as error:
                if error.status != 404 or not principal.can("operate"):
                    raise
        if not principal.can("operate"):
            fix = "the operator can change this: veneer tenant feedback keep"
            raise VeneerError("this tenant's answers are not stored, so feedback has no answer to refer to", fix=fix)
        file = feedback_file(self.studio.base, format)
        numbers = [await asyncio.to_thread(add_row, file, row) for row in rows]
        add = command("data", "add", str(file), str(self.prompt.value), system=self.system.value, **options)
        self.judgement.show(text=add)
        return f"row {numbers[-1]:,} of {file}"


def _note(event: Finished, first: float, seconds: float, names: str) -> str:
    """Return the line shown below a finished answer.

    first: seconds until the first token. names: the versions that answered."""
    count = event.usage.completion
    speed = f"{(count - 1) / (seconds - first):.0f} tokens/s" if count > 1 and seconds > first else ""
    reason = {"length": "stopped at the token limit", "stop": ""}.get(event.reason, "interrupted")
    parts = (names, counted(count, "token"), f"first token after {first:.2f} s", speed, reason)
    return " · ".join(part for part in parts if part)
