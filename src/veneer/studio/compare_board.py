"""The columns of the Compare view: find, mix and remove adapters, and save mixes.

compare.py shows texts, compare_images.py shows images."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from veneer.adapters.mix import add_mix
from veneer.core.adapter import mix_text
from veneer.errors import ConfigError
from veneer.formats.strengths import split_strength
from veneer.serve.http.surfaces.adapters import audit_added
from veneer.serve.request import Refused
from veneer.studio import elements
from veneer.studio.elements import command
from veneer.studio.page import NotFound, ViewPage

_Mix = list[tuple[str, float]]
MAX_COLUMNS = 9


@dataclass(eq=False)
class Column:
    """A column of the Compare view.

    mix: the adapters and strengths; empty for the base.
    element: the element that shows the answers.
    id, answers: the last request's id and answers."""

    mix: _Mix
    command: elements.Command | None = None
    task: asyncio.Task[Any] | None = None
    element: Any = None
    id: str = ""
    answers: list[str] = field(default_factory=list)

    def cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()
            self.task = None

    def name(self, base: str) -> str:
        return " + ".join(name for name, _ in self.mix) or base

    def specs(self) -> list[str]:
        """Return the mix as command line arguments."""
        return [f"{name}:{strength:g}" for name, strength in self.mix]


def _parse_columns(texts: Sequence[str]) -> list[_Mix]:
    """Parse a link's mixes, such as support@2:0.8+billing.

    The first column is the base. Raises NotFound for an invalid mix."""
    mixes: list[_Mix] = [[]]
    for text in texts[:MAX_COLUMNS]:
        mix: _Mix = []
        for part in text.split("+") if text else ():
            try:
                name, strength = split_strength(part)
            except ConfigError as error:
                raise NotFound("Not found.") from error
            if not name:
                raise NotFound("Not found.")
            mix.append((name, 1.0 if strength is None else strength))
        if mix:
            mixes.append(mix)
    return mixes[:MAX_COLUMNS]


class Board:
    """The columns of one visit to the Compare view.

    Subclasses define `draw_answers`, `answer` and `equivalent_command`."""

    prompt: elements.Field

    def __init__(self, page: ViewPage) -> None:
        self.page, self.studio, self.requested = page, page.studio, False
        self.columns = [Column(mix) for mix in _parse_columns(page.query.all("c"))]
        try:
            for name in self.adapters():
                self.studio.service.catalog.resolve(name, page.principal)
        except Refused as error:
            raise NotFound("Not found.") from error

    def draw_answers(self, position: int, column: Column) -> None:
        raise NotImplementedError

    async def answer(self, column: Column) -> None:
        raise NotImplementedError

    def equivalent_command(self, column: Column) -> str:
        raise NotImplementedError

    async def on_added(self, name: str) -> None:
        """Called after an adapter was added to a column."""

    def adapters(self) -> list[str]:
        return [name for column in self.columns for name, _ in column.mix]

    # -- fields that store their values in the link

    def store(self, name: str) -> elements.Handler:
        """Return a handler that stores a field's value in the link under `name`."""
        return elements.permit("read", lambda value: self.page.set_query(**{name: value}))

    def text_field(self, label: str, name: str, hint: str = "", **options: Any) -> elements.Field:
        return elements.form_field(label, self.page.query.get(name), self.store(name), hint=hint, **options)

    def number_field(
        self, label: str, name: str, default: float, low: float, high: float, step: float
    ) -> elements.Field:
        number = self.page.query.number(name, default)
        value = min(high, max(low, number)) if math.isfinite(number) else default
        return elements.form_field(label, value, self.store(name), kind="number", low=low, high=high, step=step)

    def draw_prompt(self, hint: str) -> None:
        """Draw the prompt field that all columns share."""
        on_enter = elements.permit("infer", self.ask_all)
        self.prompt = self.text_field("Prompt", "p", hint, kind="area", key="p", on_enter=on_enter)

    # -- columns

    def draw_board(self) -> None:
        self.board = elements.box("div", "board")
        self.draw_columns()
        with elements.box("div", "another"):
            elements.heading("Add an adapter")
            search = elements.permit("read", self._search)
            with elements.box("div", "row foot"):
                elements.form_field(
                    "Find an adapter", "", search, kind="search", hint="Name, tag, trigger word", key="/"
                )
                self.target = elements.form_field("Add to", "new", kind="choice", options=self._targets())
            add = elements.permit("infer", self._add)
            self.hits = elements.Fragment("hits.html.j2", actions={"add": add})
        self.page.start_task(self._search(""))

    def draw_columns(self) -> None:
        self.board.clear()
        with self.board:
            for position, column in enumerate(self.columns):
                self._draw_column(position, column)
        self._store_columns()

    def _store_columns(self) -> None:
        self.page.set_query(c=["+".join(column.specs()) for column in self.columns[1:]])

    def _draw_column(self, position: int, column: Column) -> None:
        name = column.name(self.studio.base)
        with elements.box("section", "panel column", aria_label=name):
            with elements.box("div", "head"):
                with elements.box("div", "row"):
                    elements.heading(name)
                    if position:
                        remove = elements.permit("read", lambda: self._remove(column))
                        elements.button("Remove", remove, kind="word", aria_label=f"Remove {name}")
                if not position:
                    elements.line("The base without adapters.", "soft small")
                for k, (part, strength) in enumerate(column.mix):
                    self._draw_strength(column, k, part, strength)
            self.draw_answers(position, column)
            with elements.box("div", "foot"):
                if position and self.page.principal.can("operate") and (len(column.mix) > 1 or column.mix[0][1] != 1):
                    save = elements.permit("operate", lambda: self._ask_to_save(column))
                    elements.button("Save mix as adapter", save, kind="word")
                column.command = elements.Command(self._command_text(column))

    def _draw_strength(self, column: Column, k: int, part: str, strength: float) -> None:
        reach, single = max(2.0, abs(strength) * 1.5), len(column.mix) == 1
        with elements.box("div", "part"):
            change = elements.permit("infer", lambda to: self._set_strength(column, k, to))
            label = "Strength" if single else part
            elements.form_field(label, strength, change, kind="range", low=-reach, high=reach, step=0.05, delay=0.05)
            if not single:
                remove = elements.permit("infer", lambda: self._remove_part(column, k))
                elements.button("Remove", remove, kind="word", aria_label=f"Remove {part}")

    def _command_text(self, column: Column) -> str:
        """Return the command that sends the prompt to a column; "" without a prompt."""
        return self.equivalent_command(column) if str(self.prompt.value or "").strip() else ""

    def _targets(self) -> dict[str, str]:
        new = {"new": "a new column"} if len(self.columns) < MAX_COLUMNS else {}
        return new | {str(i): f"the mix {column.name('')}" for i, column in enumerate(self.columns) if i}

    async def _search(self, text: str) -> None:
        catalog, principal, words = self.studio.service.catalog, self.page.principal, text.lower().split()
        fingerprint = catalog.sources.base.fingerprint
        versions = await asyncio.to_thread(
            self.studio.library.search, text, base=fingerprint, all_versions=True, limit=24
        )
        names = [version.reference for version in versions if principal.sees(version.name)]
        names_without_version = {name.partition("@")[0] for name in names}
        loaded = [card.id for card in catalog.models(principal) if card.parent and card.id not in names_without_version]
        names += [name for name in loaded if all(word in name.lower() for word in words)]
        self.hits.show(hits=names[:24], text=text, base=self.studio.base)

    async def _add(self, data: dict[str, str]) -> None:
        name, target = data["ref"], str(self.target.value)
        await asyncio.to_thread(self.studio.service.catalog.resolve, name, self.page.principal)
        if target == "new":
            self.columns.append(Column([(name, 1.0)]))
        else:
            mix = self.columns[int(target)].mix
            if name in dict(mix):
                raise ConfigError(f"{name} is in this mix already", fix="change its strength")
            mix.append((name, 1.0))
        await self.on_added(name)
        self.columns_changed()

    def _remove(self, column: Column) -> None:
        column.cancel()
        self.columns.remove(column)
        self.columns_changed()

    def _remove_part(self, column: Column, k: int) -> None:
        del column.mix[k]
        self.columns_changed()

    def columns_changed(self) -> None:
        """Redraw the columns; if requests have been sent, send them again."""
        self.stop()
        self.draw_columns()
        self.target.set_value("new" if len(self.columns) < MAX_COLUMNS else "1")
        self.target.set_options(self._targets())
        if self.requested:
            self.ask_all()

    def _set_strength(self, column: Column, k: int, strength: float | None) -> None:
        """Set an adapter's strength, and repeat the column's request if one was sent."""
        if strength is None or strength == column.mix[k][1]:
            return
        column.mix[k] = (column.mix[k][0], strength)
        self._store_columns()
        if self.requested:
            self._ask(column)
        elif column.command is not None:
            column.command.show(text=self._command_text(column))

    # -- answers

    def ask_all(self) -> None:
        if not str(self.prompt.value or "").strip():
            raise ConfigError("the prompt is empty", fix="enter a prompt")
        self.requested = True
        for column in self.columns:
            self._ask(column)

    def _ask(self, column: Column) -> None:
        if column.command is not None:
            column.command.show(text=self._command_text(column))
        column.cancel()
        with self.board:  # a redraw can have deleted the element that the handler belongs to
            column.task = self.page.start_task(self.answer(column))

    def stop(self) -> None:
        for column in self.columns:
            column.cancel()

    def _ask_to_save(self, column: Column) -> None:
        specs = column.specs()
        with elements.dialog("Save mix as adapter") as window:
            elements.line("One adapter that changes the base exactly as this mix does.")
            elements.line(mix_text(tuple(column.mix)), "soft")

            def command_text() -> str:
                return command("library", "mix", str(name.value or "NAME"), *specs)

            name = elements.form_field(
                "Name", "", elements.permit("operate", lambda _: same.show(text=command_text())), hint="softer"
            )
            same = elements.Command(command("library", "mix", "NAME", *specs))

            def save() -> Any:
                added, mix = add_mix(self.studio.library, specs, str(name.value or "").strip())
                audit_added(self.studio.service.tenancy, self.page.principal, added.version)
                return added, mix

            async def do() -> None:
                added, mix = await asyncio.to_thread(save)
                elements.close_dialog(window)
                saved = "saved" if added.new else "is in the library already"
                self.page.notify(f"{added.version.reference} {saved}; relative error {mix.error:.3%}")

            elements.dialog_buttons(window, "Save", elements.permit("operate", do))
        elements.open_dialog(window)
