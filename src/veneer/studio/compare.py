"""The Compare view: one prompt, and the answers of base, versions and mixes.

Strengths act at once, because a request carries its mix. A vote is a preference row, a correction a training
row; a mix can be saved. On an image base, pictures.py is this view."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from typing import Any

from veneer.errors import AdapterError, ConfigError, VeneerError, counted
from veneer.formats.card import opening
from veneer.library.describe_files import card_prompt
from veneer.serve.access import ResolvedModel
from veneer.serve.http.errors import message_of
from veneer.serve.http.text_requests import TextRequest, ask_texts
from veneer.serve.request import Finished, Refused, Token
from veneer.serve.tenancy.feedback import AnswerFeedback
from veneer.serve.tenancy.tenants import Tenants
from veneer.studio import parts
from veneer.studio.columns import Board, Column
from veneer.studio.commands import command, command_base
from veneer.studio.frame import ViewPage
from veneer.studio.moving import Answers, SpokenToken
from veneer.studio.parts import Command, box, button, line, permit
from veneer.studio.talk import prompt_messages
from veneer.train.text.feedback_rows import add_row, corrected_row, judged_file, preference_row

_PAUSE = 1 / 30
"""Seconds between two updates of tokens in the browser."""
_SAMPLES, _TOKENS = 8, 160


async def compare_view(page: ViewPage) -> None:
    if page.studio.service.engine.makes == "pictures":
        from veneer.studio.pictures import pictures_view  # late: a text server does not need it

        return await pictures_view(page)
    board = _Texts(page)
    await board.offer(name for column in board.columns for name, _ in column.mix)
    page.title("Compare", "One prompt, answered at the same time by the base, by adapters and by mixes of them.")
    board.draw()


class _Texts(Board):
    """The Compare view of one visit, for texts."""

    def draw(self) -> None:
        query = self.page.query
        with box("div", "ask"):
            self.draw_prompt("Ask something. Every column answers it.")
            with box("details", "how"):
                line("Sampling settings", tag="summary")
                with box("div", "settings"):
                    self.n = self.number("Answers per column", "n", 1, low=1, high=_SAMPLES, step=1)
                    self.temperature = self.number("Temperature", "t", 0.0, low=0, high=2, step=0.1)
                    self.seed = self.number("Seed", "seed", 0, low=0, high=2**31, step=1)
                    self.tokens = self.number("Tokens, at most", "m", _TOKENS, low=1, high=4096, step=1)
                    self.system = parts.form_field(
                        "System prompt", query.get("s"), self.kept("s"), kind="area", hint="You are brief."
                    )
            with box("div", "row"):
                button("Ask", permit("infer", self.ask_all), kind="filled", key="ctrl+enter")
                button("Stop", permit("infer", self.stop), kind="word", key="Escape")
                line("Ctrl+Enter asks; press a column's number to vote for its answer.", "soft small by-keys", "span")
        self.draw_all()
        self.judgement = Command("")

    def draw_answers(self, place: int, column: Column) -> None:
        column.shown = Answers(
            column.named(self.page.studio.base),
            place + 1,
            leads=not place,
            better=permit("feedback", lambda i: self.better(column, i)) if len(self.columns) > 1 else None,
            corrected=permit("feedback", lambda said: self.corrected(column, said)),
        )

    def same_command(self, column: Column) -> str:
        return command(
            "generate",
            str(self.prompt.value),
            base=command_base(self.page),
            adapter=column.specs(),
            system=self.system.value,
            temperature=self.temperature.value or None,
            seed=int(self.seed.value or 0) or None,
            max_new_tokens=self.most,
        )

    # -- asking

    @property
    def most(self) -> int:
        """Maximum tokens of an answer, for the request and its command."""
        return int(self.tokens.value or _TOKENS)

    @property
    def messages(self) -> list[dict[str, Any]]:
        return prompt_messages(str(self.prompt.value), str(self.system.value or "").strip())

    async def answer(self, column: Column) -> None:
        shown: Answers = column.shown
        n = max(1, min(_SAMPLES, int(self.n.value or 1)))
        asked = TextRequest(
            self.messages,
            tuple(column.mix),
            n,
            seed=int(self.seed.value or 0),
            temperature=float(self.temperature.value or 0),
            max_tokens=self.most,
            logprobs=4,
        )
        column.id, column.answers = asked.id, [""] * n
        shown.begin(n)
        waiting: list[tuple[int, SpokenToken]] = []
        begun = sent = time.perf_counter()
        first, by = 0.0, ""

        def answering(served: ResolvedModel) -> None:
            nonlocal by
            by = " + ".join(name for name in served.adapters if self.page.caller.can_see(name))

        def send() -> None:
            nonlocal sent
            if waiting:
                shown.add(list(waiting))
                waiting.clear()
            sent = time.perf_counter()

        try:
            events_of = ask_texts(self.page.studio.service, self.page.caller, asked, answering)
            async with aclosing(events_of) as events:
                async for i, event in events:
                    if isinstance(event, Token):
                        first = first or time.perf_counter() - begun
                        column.answers[i] += event.text
                        if event.text:
                            top = [(text, logprob) for _, text, logprob in event.top]
                            waiting.append((i, (event.text, event.logprob, top)))
                        if time.perf_counter() - sent >= _PAUSE or not sent > begun:
                            send()
                    elif isinstance(event, Finished):
                        column.answers[i] += event.text
                        if event.text:
                            waiting.append((i, (event.text, None, [])))
                        send()
                        shown.end(i, _note(event, first, time.perf_counter() - begun, by))
        except Refused as error:
            for i in range(n):
                shown.end(i, f"No answer: {message_of(error)}")

    async def offer(self, names: Iterable[str]) -> None:
        """Without a prompt, fill in the first prompt and system message of these cards."""
        query, library = self.page.query, self.page.studio.library
        if query.get("p") or query.get("s"):
            return
        for name in names:
            try:
                version = await asyncio.to_thread(library.find, name)
            except (AdapterError, ConfigError):  # a loaded adapter or a route
                continue
            caller = self.page.caller
            if not caller.can_see(name, version.reference):
                continue
            system, text = opening(card_prompt(version.card))
            if text:
                self.page.keep(p=text, s=system)
                return

    async def added(self, name: str) -> None:
        await self.offer([name])
        self.prompt.put(self.page.query.get("p"))
        self.system.put(self.page.query.get("s"))

    # -- judging

    async def better(self, column: Column, i: int) -> None:
        """Record a vote: the answer beats the other columns' answers of the same number."""
        others = [
            other
            for other in self.columns
            if other is not column and i < len(other.answers) and other.answers[i].strip() != column.answers[i].strip()
        ]
        if not others:
            raise VeneerError("every column says the same, so none is better", fix="another prompt, or a temperature")
        rejected = tuple((other.id, i) for other in others)
        kept = await self._given(AnswerFeedback(column.id, i, rejected=rejected, said=frozenset({"rejected"})))
        if not kept:
            file, asked = judged_file(self.page.studio.base, "preference"), self.messages
            for other in others:
                row = preference_row(asked, column.answers[i], other.answers[i])
                kept = f"row {await asyncio.to_thread(add_row, file, row):,} of {file}"
            self._judged(str(file), chosen=column.answers[i], rejected=others[-1].answers[i])
        column.shown.judged(i, f"Better than {counted(len(others), 'other')}: {kept}")

    async def corrected(self, column: Column, said: Sequence[Any]) -> None:
        i, text = int(said[0]), str(said[1])
        row = corrected_row(self.messages, text)
        given = AnswerFeedback(column.id, i, corrected=row["messages"][-1], said=frozenset({"corrected"}))
        kept = await self._given(given)
        if not kept:
            file = judged_file(self.page.studio.base, "messages")
            kept = f"row {await asyncio.to_thread(add_row, file, row):,} of {file}"
            self._judged(str(file), answer=text)
        column.shown.judged(i, f"Corrected: {kept}")

    def _judged(self, file: str, **said: str) -> None:
        """Show the command that adds the same row."""
        self.judgement.show(command("data", "add", file, str(self.prompt.value), system=self.system.value, **said))

    async def _given(self, feedback: AnswerFeedback) -> str:
        """Store feedback with the stored answers; return where, or "" to use a file.

        Raises for a tenant whose answers are not stored: a tenant has no file here."""
        tenancy, caller = self.page.studio.service.tenancy, self.page.caller
        if isinstance(tenancy, Tenants) and caller.tenant in tenancy.store.settings.feedback:
            try:
                await asyncio.to_thread(tenancy.answers.give, caller.tenant, feedback)
                return "kept with the answers"
            except Refused as error:
                if error.status != 404 or not caller.can("operate"):
                    raise
        if not caller.can("operate"):
            fix = "its operator changes that: veneer tenant set NAME feedback_days=30"
            raise VeneerError("none of this tenant's answers are kept, so there is nothing to judge", fix=fix)
        return ""


def _note(event: Finished, first: float, whole: float, by: str) -> str:
    """Return a note on a finished answer. `by`: the versions that answered."""
    count = event.usage.completion
    pace = f"{(count - 1) / (whole - first):.0f} tokens a second" if count > 1 and whole > first else ""
    why = {"length": "cut at the limit", "stop": ""}.get(event.reason, "broken off")
    return " · ".join(part for part in (by, counted(count, "token"), f"first after {first:.2f} s", pace, why) if part)
