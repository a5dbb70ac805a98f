"""Columns of the Compare view: find, mix and remove adapters, and save mixes.

compare.py shows texts, pictures.py images."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.adapters.mix import keep_mix
from veneer.core.adapter import mix_text
from veneer.errors import ConfigError, VeneerError
from veneer.formats.strengths import split_strength
from veneer.serve.http.surfaces.adapters import note_added
from veneer.serve.request import Refused
from veneer.studio import parts
from veneer.studio.commands import command
from veneer.studio.frame import NothingHere, ViewPage
from veneer.studio.parts import Command, Fragment, box, button, dialog, heading, line, permit, put

_Mix = list[tuple[str, float]]
MOST_COLUMNS = 8


@dataclass(eq=False)
class Column:
    """A column. `mix`: empty for the base. `shown`: element of the answers.

    `id`, `answers`: the last request and its answers, texts or images."""

    mix: _Mix
    command: Command | None = None
    task: asyncio.Task[Any] | None = None
    shown: Any = None
    id: str = ""
    answers: list[Any] = field(default_factory=list)

    def end(self) -> None:
        """Cancel the column's task."""
        if self.task is not None:
            self.task.cancel()
            self.task = None

    def named(self, base: str) -> str:
        return " + ".join(name for name, _ in self.mix) or base

    def specs(self) -> list[str]:
        """Return the mix as arguments of a command."""
        return [f"{name}:{strength:g}" for name, strength in self.mix]

    def written(self) -> str:
        """Return the mix as in a link."""
        return "+".join(f"{name}:{strength:g}" for name, strength in self.mix) or "base"


def _columns_of(written: Sequence[str]) -> list[_Mix]:
    """Return the mixes of a link, such as support@2:0.8+billing; the base comes first.

    Raises NothingHere for an invalid mix."""
    found: list[_Mix] = [[]]
    for text in written[: MOST_COLUMNS + 1]:
        mix: _Mix = []
        for part in text.split("+") if text not in ("", "base") else ():
            try:
                name, strength = split_strength(part)
            except ConfigError as error:
                raise NothingHere("Not found.") from error
            if not name:
                raise NothingHere("Not found.")
            mix.append((name, 1.0 if strength is None else strength))
        if mix:
            found.append(mix)
    return found[: MOST_COLUMNS + 1]


class Board:
    """The columns of one visit. Subclasses define draw_answers, answer, same_command."""

    prompt: parts.Field

    def __init__(self, page: ViewPage) -> None:
        self.page, self.asked = page, False
        self.columns = [Column(mix) for mix in _columns_of(page.query.all("c"))]
        try:
            for column in self.columns:
                for name, _ in column.mix:
                    page.studio.service.catalog.resolve(name, page.caller)
        except Refused as error:
            raise NothingHere("Not found.") from error

    def draw_answers(self, place: int, column: Column) -> None:
        raise NotImplementedError

    async def answer(self, column: Column) -> None:
        raise NotImplementedError

    def same_command(self, column: Column) -> str:
        raise NotImplementedError

    async def added(self, name: str) -> None:
        """Handle an adapter that was added to a column."""

    # -- drawing

    def kept(self, name: str) -> Any:
        """Return a field's handler that stores its value in the link."""
        return permit("read", lambda value: self.page.keep(**{name: value}))

    def number(self, label: str, name: str, usual: float, low: float, high: float, step: float) -> parts.Field:
        """Draw a number field of the link, clamped to its bounds."""
        given = self.page.query.number(name, usual)
        now = min(high, max(low, given)) if math.isfinite(given) else usual
        return parts.form_field(label, now, self.kept(name), kind="number", low=low, high=high, step=step)

    def draw_prompt(self, hint: str) -> None:
        """Draw the prompt of all columns."""
        self.prompt = parts.form_field(
            "Prompt",
            self.page.query.get("p"),
            self.kept("p"),
            kind="area",
            key="p",
            hint=hint,
            entered=permit("infer", self.ask_all),
        )

    def _command(self, column: Column) -> str:
        """Return the command that sends the prompt to a column; "" without a prompt."""
        return self.same_command(column) if str(self.prompt.value or "").strip() else ""

    def draw_all(self) -> None:
        self.place = box("div", "board")
        self.draw_columns()
        self.finder()

    def draw_columns(self) -> None:
        self.place.clear()
        with self.place:
            for place, column in enumerate(self.columns):
                self._column(place, column)
        self.page.keep(c=[column.written() for column in self.columns[1:]])

    def _column(self, place: int, column: Column) -> None:
        name = column.named(self.page.studio.base)
        with box("section", "panel column", aria_label=name):
            with box("div", "head"):
                with box("div", "row"):
                    heading(name, 2)
                    if place:
                        button(
                            "Remove",
                            permit("read", lambda: self.leave_out(column)),
                            kind="word",
                            aria_label=f"Remove {name}",
                        )
                if not place:
                    line("The base without adapters.", "soft small")
                for k, (part, strength) in enumerate(column.mix):
                    self._strength(column, k, part, strength)
            self.draw_answers(place, column)
            with box("div", "foot"):
                if place and self.page.caller.can("operate") and (len(column.mix) > 1 or column.mix[0][1] != 1):
                    button("Save mix as adapter", permit("operate", lambda: self.keep(column)), kind="word")
                column.command = Command(self._command(column))

    def _strength(self, column: Column, k: int, part: str, strength: float) -> None:
        reach = max(2.0, abs(strength) * 1.5)
        alone = len(column.mix) == 1
        with box("div", "part"):
            parts.form_field(
                "Strength" if alone else part,
                strength,
                permit("infer", lambda to: self.stronger(column, k, to)),
                kind="range",
                low=-reach,
                high=reach,
                step=0.05,
                wait=0.05,
            )
            if not alone:
                button(
                    "Remove",
                    permit("infer", lambda: self.without(column, k)),
                    kind="word",
                    aria_label=f"Remove {part}",
                )

    # -- what is compared

    def finder(self) -> None:
        """Draw the search for an adapter of this base, for a new column or a mix."""
        with box("div", "another"):
            heading("Compare with another", 2)
            with box("div", "row foot"):
                parts.form_field(
                    "Find an adapter",
                    "",
                    permit("read", self.found),
                    kind="search",
                    hint="Name, tag, trigger word",
                    key="/",
                )
                self.into = parts.form_field("Add to", "new", kind="choice", options=self._places())
            self.hits = Fragment(
                "hits.html.j2", acts={"add": permit("infer", self.add)}, hits=[], text="", base=self.page.studio.base
            )
        self.page.task(self.found(""))

    def _places(self) -> dict[str, str]:
        new = {"new": "a new column"} if len(self.columns) <= MOST_COLUMNS else {}
        return new | {str(i): f"the mix {c.named('')}" for i, c in enumerate(self.columns) if i}

    async def found(self, text: str) -> None:
        studio, caller = self.page.studio, self.page.caller
        catalog = studio.service.catalog
        kept = await asyncio.to_thread(
            studio.library.search, text, base=catalog.shelf.base.fingerprint, all_versions=True, limit=24
        )
        words = text.lower().split()
        loaded = [
            card.id for card in catalog.models(caller) if card.parent and all(w in card.id.lower() for w in words)
        ]
        names = [version.reference for version in kept if caller.sees(version.name)]
        known = {name.partition("@")[0] for name in names}
        names = [*names, *(name for name in loaded[:24] if name not in known)]
        self.hits.show(hits=names[:24], text=text, base=studio.base)

    async def add(self, data: dict[str, str]) -> None:
        name, into = data["ref"], str(self.into.value)
        await asyncio.to_thread(self.page.studio.service.catalog.resolve, name, self.page.caller)
        if into == "new":
            self.columns.append(Column([(name, 1.0)]))
        else:
            column = self.columns[int(into)]
            if any(name == part for part, _ in column.mix):
                raise ConfigError(f"{name} is in this mix already", fix="move its strength")
            column.mix.append((name, 1.0))
        await self.added(name)
        self.changed()

    def leave_out(self, column: Column) -> None:
        column.end()
        self.columns.remove(column)
        self.changed()

    def without(self, column: Column, k: int) -> None:
        del column.mix[k]
        self.changed()

    def changed(self) -> None:
        """Redraw the columns and request all answers again."""
        self.stop()
        self.draw_columns()
        self.into.put("new" if len(self.columns) <= MOST_COLUMNS else "1")
        self.into.offer(self._places())
        if self.asked:
            self.ask_all()

    def stronger(self, column: Column, k: int, to: float | None) -> None:
        """Set a strength; cancel the running request and repeat it."""
        if to is None or to == column.mix[k][1]:
            return
        column.mix[k] = (column.mix[k][0], to)
        self.page.keep(c=[each.written() for each in self.columns[1:]])
        if column.command is not None:
            column.command.show(self._command(column))
        if self.asked:
            self.ask(column)

    def ask_all(self) -> None:
        if not str(self.prompt.value or "").strip():
            raise ConfigError("there is no prompt", fix="write one")
        self.asked = True
        for column in self.columns:
            if column.command is not None:
                column.command.show(self._command(column))
            self.ask(column)

    def ask(self, column: Column) -> None:
        column.end()
        with self.place:  # the caller's own element can be gone after a redraw
            column.task = self.page.task(self.answer(column))

    def stop(self) -> None:
        for column in self.columns:
            column.end()

    # -- keeping a mix

    def keep(self, column: Column) -> None:
        specs = column.specs()
        with dialog("Save mix as adapter") as window:
            line("One adapter that changes the base exactly as this mix does.")
            line(mix_text(tuple(column.mix)), "soft")

            def same() -> str:
                name, alias = str(named.value or ""), str(pointed.value or "") or None
                return command("library", "mix", name or "NAME", *specs, alias=alias)

            def told(_: Any) -> None:
                shown.show(same())

            named = parts.form_field("Name", "", permit("operate", told), hint="softer", most=120)
            pointed = parts.form_field("Alias (optional)", "", permit("operate", told), hint="prod", most=60)
            shown = Command(same())
            problem = line("", "bad", role="alert")
            busy = parts.progress("Making the mix")
            parts.show(busy, False)

            async def do() -> None:
                parts.show(busy, True)
                alias = str(pointed.value or "").strip() or None
                library, name = self.page.studio.library, str(named.value or "").strip()

                def mix() -> Any:
                    added, made = keep_mix(library, specs, name, alias=alias)
                    note_added(self.page.studio.service.tenancy, self.page.caller, added.version)
                    return added, made

                try:
                    added, made = await asyncio.to_thread(mix)
                except VeneerError as error:
                    put(problem, f"{error.what}. {error.fix or ''}")
                    return
                finally:
                    parts.show(busy, False)
                parts.closed(window)
                what = "kept" if added.new else "was there already"
                pointed_to = f", {name}@{alias} leads to it" if alias else ""
                self.page.say(f"{added.version.reference} {what}{pointed_to}; {made.error:.3%} off the sum")

            parts.decide(window, "Save", permit("operate", do))
        parts.opened(window)
