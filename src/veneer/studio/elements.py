"""Building blocks of views.

Only this file passes texts, attributes and markup to NiceGUI, so that no text can become markup or code:
texts are text nodes, attributes are properties with constant names, and templates in `templates/` escape
their values. Elements are plain HTML, which supports accessible names, keyboard and focus.

    with panel("Files"):
        line("No adapters yet.", "soft")
        button("Add", permit("write", add), key="a", kind="filled")      add() or add(event), sync or async
        name = form_field("Name", "", permit("read", typed))             name.value; name.set_value("…")
    actions = {"open": permit("read", open_version)}
    cards = Fragment("cards.html.j2", actions=actions, versions=found)   many items in one element
    cards.show(versions=others)                                          redraws only the parts that changed

Handlers: `permit` declares the permission that a handler needs. A hidden button is not enough, because a
browser can send any event. Before each call, `Visitor.authenticate` updates `page.principal`, and then the
permission is checked. A handler without a permission is never called. Handlers can be async. The page shows
the errors that handlers raise; for a VeneerError, it shows what failed, where, and how to fix it. Work that
takes more than a millisecond belongs in `await asyncio.to_thread(…)`, because all pages run on the engine's
event loop.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal
from weakref import WeakKeyDictionary

from markupsafe import Markup, escape
from nicegui import Client, ui

from veneer.errors import VeneerError, shown
from veneer.serve.principal import Permission
from veneer.serve.quota import current_owner
from veneer.studio.access import VISITORS
from veneer.train.report.log import duration, size
from veneer.train.report.page import escaping

Callback = Callable[..., Any]
"""A function with no argument or one: a field's value, or the data of a clicked element."""
Attribute = str | int | bool


# -- handlers


@dataclass(frozen=True)
class Handler:
    """An event handler and the permission that it needs."""

    permission: Permission
    callback: Callback


def permit(permission: Permission, callback: Callback) -> Handler:
    """Return a handler that only principals with this permission can call."""
    return Handler(permission, callback)


def event_handler(handler: Handler) -> Callable[[Any], Any]:
    """Return a NiceGUI event handler that checks the permission, then calls the callback."""

    async def handle(event: Any) -> None:
        try:
            principal = await VISITORS[event.client].authenticate()
            principal.require(handler.permission if isinstance(handler, Handler) else None)
            current_owner.set(principal.tenant)
            await _call(handler.callback, event.args)
        except VeneerError as error:  # show it on the page; NiceGUI would also log a traceback
            event.client.handle_exception(error)

    return handle


async def _call(callback: Callback, event: Any) -> None:
    """Call `callback(event)`, or `callback()` if it has no required argument."""
    required = [p for p in inspect.signature(callback).parameters.values() if p.default is p.empty]
    result = callback(event) if required else callback()
    if inspect.isawaitable(result):
        await result


def once(handler: Handler) -> Handler:
    """Return a handler that ignores events, such as a double click, while it runs."""
    running = False

    async def run(event: Any) -> None:
        nonlocal running
        if running:
            return
        running = True
        try:
            await _call(handler.callback, event)
        finally:
            running = False

    return Handler(handler.permission, run)


# -- texts and containers


def box(tag: str = "div", classes: str = "", **attributes: Attribute) -> ui.element:
    """Return an HTML container: `with box("section", "panel", aria_label="Files"):`.

    classes: CSS classes from studio.css.
    attributes: HTML attributes; underscores in names become dashes."""
    element = ui.element(tag)
    if classes:
        element.classes(classes)
    _assign(element, attributes)
    return element


def line(text: object, classes: str = "", tag: str = "p", **attributes: Attribute) -> ui.element:
    """Return an element with a text, which `set_text(element, text)` can change."""
    element = box(tag, classes, **attributes)
    element._text = _sanitize(text)
    return element


def heading(text: object, level: Literal[1, 2, 3] = 2) -> ui.element:
    return line(text, tag=f"h{level}")


@contextmanager
def panel(title: str) -> Iterator[None]:
    """Draw a panel with a heading; the `with` block draws its content."""
    with box("section", "panel stack"):
        heading(title)
        yield


@contextmanager
def details(summary: str, **attributes: Attribute) -> Iterator[ui.element]:
    """Draw a section that hides its content until the user opens it."""
    with box("details", "how", **attributes) as element:
        line(summary, tag="summary")
        yield element


def set_text(element: ui.element, text: object) -> None:
    """Change the text of a `line`, a heading or a button."""
    if element._text != (text := _sanitize(text)):
        element._text = text
        element.update()


def set_attributes(element: ui.element, **attributes: Attribute) -> None:
    previous = dict(element.props)
    _assign(element, attributes)
    if element.props != previous:
        element.update()


def set_visible(element: ui.element, visible: bool) -> None:
    element.set_visibility(visible)


ButtonKind = Literal["filled", "quiet", "word", "danger"]
"""filled: the view's main action; quiet: outlined; word: text only; danger: removes something."""


def button(
    text: object, handler: Handler, *, kind: ButtonKind = "quiet", key: str = "", **attributes: Attribute
) -> ui.element:
    """Return a button. `enable(button, False)` disables the button.

    key: keyboard shortcut: a letter, a sequence ("g l"), or "ctrl+enter". Shortcuts without ctrl do nothing
        while the user types in a field."""
    element = line(text, f"button {kind}", "button", type="button", **attributes)
    _assign_key(element, key)
    element.on("click", event_handler(once(handler)), args=[])
    return element


def enable(element: ui.element, enabled: bool, reason: str = "") -> None:
    """Enable or disable an element. `reason`: the tooltip of a disabled element."""
    set_attributes(element, disabled=not enabled, title="" if enabled else reason)


def link(text: object, to: str, classes: str = "", *, key: str = "", **attributes: Attribute) -> ui.element:
    """Return a link. Raises ValueError for a link to another server.

    to: a path from `ViewPage.link` (another view) or `ViewPage.api` (a file; pass `download=True`)."""
    if not to.startswith("/") or to.startswith("//"):
        raise ValueError("a link must lead to a path of this server")
    element = line(text, classes, "a", href=to, **attributes)
    _assign_key(element, key)
    return element


# -- forms

FieldKind = Literal["text", "search", "number", "area", "choice", "range"]


class Field(ui.element, component="field.js"):
    """A labelled form field; see `form_field`.

    A redraw of the page keeps the text that the user typed.

    value: a text, or a float for number and range (None if invalid)."""

    value: Any = None

    def set_value(self, value: Any) -> None:
        """Set the value and discard typed text, without calling `on_change`."""
        self.value = self.props["value"] = value
        self.props["turn"] += 1
        self.update()

    def set_options(self, options: Mapping[str, str] | Sequence[str]) -> None:
        """Set the options of a field with kind "choice"."""
        if (pairs := _option_pairs(options)) != self.props["options"]:
            self.props["options"] = pairs
            self.update()


def form_field(
    label: str,
    value: Any = "",
    on_change: Handler | None = None,
    *,
    kind: FieldKind = "text",
    hint: str = "",
    options: Mapping[str, str] | Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    delay: float = 0.15,
    max_length: int = 20_000,
    on_enter: Handler | None = None,
    key: str = "",
    classes: str = "",
    hidden_label: bool = False,
) -> Field:
    """Return a labelled form field.

    on_change(value): called `delay` seconds after the last input; for a range, also during a drag
    on_enter(value): called on Enter; for kind "area", on Ctrl+Enter
    hint: the placeholder
    options: the options of a choice, value -> text
    low, high: bounds of a number or a range
    hidden_label: show the label to screen readers only"""
    field = Field()
    field.value = value
    field.classes(f"field {classes}")
    properties = {
        **{"label": _sanitize(label), "value": value, "kind": kind, "hint": _sanitize(hint), "hides": hidden_label},
        **{"options": _option_pairs(options), "low": low, "high": high, "step": step, "most": max_length},
        **{"wait": delay, "shortcut": key, "turn": 0, "enters": on_enter is not None},
    }
    for name, each in properties.items():
        field.props[name] = each

    def storing(handler: Handler) -> Handler:
        async def store(value: Any) -> None:
            if kind == "number" and isinstance(
                value, int | float
            ):  # browsers apply the limits only when the field loses focus
                value = min(value if high is None else high, max(value if low is None else low, value))
            field.value = field.props["value"] = value  # no update: the browser already shows the value
            await _call(handler.callback, value)

        return Handler(handler.permission, store)

    field.on("changed", event_handler(storing(on_change or permit("read", lambda: None))))
    if on_enter is not None:
        field.on("entered", event_handler(storing(once(on_enter))))
    return field


# -- templates


def _format_code(text: Any) -> Markup:
    """Return escaped markup in which text between backticks becomes <code>."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(_sanitize(text)))))


def _add_breaks(text: Any) -> Markup:
    """Return escaped markup that can break lines after commas, semicolons and colons."""
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[,;:])", _sanitize(text)))


_HASH = re.compile(r"((?:sha256:)?[0-9a-f]{12})[0-9a-f]{20,}")
_ENV = escaping("veneer.studio", "templates")
_ENV.filters |= {
    "size": size,
    "duration": duration,
    "brief": lambda text: _HASH.sub(r"\1…", str(text)),
    "moment": lambda at: datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M"),
    "coded": _format_code,
    "foldable": _add_breaks,
}


class Fragment(ui.element, component="fragment.js"):
    """A template of `templates/`, rendered with escaping into one element.

    Without `values`, the element is empty.

    actions: name -> handler of a click on an element with `data-act="NAME"`. The handler gets the element's
        data- attributes as a dict of texts.

    Give list items and selectable elements a `data-id`, so that a redraw keeps the elements (fragment.js)."""

    def __init__(
        self, template: str, *, classes: str = "", actions: Mapping[str, Handler] | None = None, **values: Any
    ) -> None:
        super().__init__()
        self._template = _ENV.get_template(template)
        self.classes(classes)
        self.props["html"] = self._template.render(**values) if values else ""
        if actions:

            async def clicked(data: dict[str, str]) -> None:
                if (handler := actions.get(data.get("act", ""))) is not None:
                    VISITORS[self.client].principal.require(handler.permission)
                    await _call(handler.callback, data)

            self.on("click", event_handler(permit("public", clicked)), js_handler=_CLICKED)

    def show(self, **values: Any) -> None:
        if (html := self._template.render(**values)) != self.props["html"]:
            self.props["html"] = html
            self.update()


_CLICKED = """(e) => {
  const at = e.target.closest("[data-act]");
  if (at) { e.preventDefault(); emit({...at.dataset}); }
}"""


# -- commands


def command(*words: str | int, **options: object) -> str:
    """Return the `veneer` command line that is equivalent to an action on a page.

    command("library", "search", "sql", tag=["a", "b"], all=True)   veneer library search sql --tag a --tag b --all

    options: values are strings or numbers; a list repeats the option, True is a flag, and None, False, "" and
        [] omit the option. Underscores in names become dashes."""
    parts = ["veneer", *map(str, words)]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        for each in value if isinstance(value, list | tuple) else [value]:
            if each is True:
                parts.append(option)
            elif each is not None and each is not False and each != "":
                parts += [option, str(each)]
    return shlex.join(parts)


class Command(Fragment):
    """An equivalent command line for the user to copy.

    `show(text=…)` changes the text; "" hides the command."""

    def __init__(self, text: str = "") -> None:
        super().__init__("command.html.j2", text=text)


# -- dialogs


class Dialog(ui.element):
    """A modal dialog: `with dialog("Shortcuts") as window: …`, then `open_dialog(window)`."""

    closed = False


_OPEN: WeakKeyDictionary[Client, Dialog] = WeakKeyDictionary()
"""Maps each client to the dialog that it opened last."""


def dialog(title: str) -> Dialog:
    """Return a dialog with a heading. Escape closes the dialog."""
    with Dialog("dialog") as window:
        window.classes("dialog")
        _assign(window, {"aria-label": title})
        heading(title)
    return window


def open_dialog(window: Dialog) -> None:
    """Open a dialog and delete the page's previous dialog.

    A double click then opens only one dialog."""
    previous = _OPEN.get(window.client)
    if previous is not None and not previous.is_deleted:
        previous.delete()
    _OPEN[window.client] = window
    window.run_method("showModal")


def close_dialog(window: Dialog) -> None:
    window.closed = True
    window.run_method("close")


def dialog_buttons(window: Dialog, text: str, handler: Handler, *, danger: bool = False) -> None:
    """Draw a dialog's buttons: Cancel, and the action."""

    async def act() -> None:
        if not window.closed:  # ignore a second click before the browser closes the dialog
            await _call(handler.callback, None)

    with box("div", "row end"):
        button("Cancel", permit("public", lambda: close_dialog(window)), kind="word")
        button(text, permit(handler.permission, act), kind="danger" if danger else "filled")


def confirm(
    title: str, sentence: str, handler: Handler, *, button_text: str, command: str = "", danger: bool = False
) -> None:
    """Open a dialog that asks for confirmation and then calls the handler.

    Call `confirm` from an event handler."""
    with dialog(title) as window:
        line(sentence)
        if command:
            Command(command)

        async def act() -> None:
            close_dialog(window)
            await _call(handler.callback, None)

        dialog_buttons(window, button_text, permit(handler.permission, act), danger=danger)
    open_dialog(window)


def progress(label: str) -> ui.element:
    """Return a progress bar; `set_progress(bar, share)` sets the finished share."""
    return box("progress", aria_label=_sanitize(label), max=1)


def set_progress(bar: ui.element, share: float | None) -> None:
    """Set a progress bar's finished share, 0 to 1; None if unknown."""
    if share is None:
        bar.props.pop("value", None)
    else:
        bar.props["value"] = round(min(1.0, max(0.0, share)), 3)
    bar.update()


def _assign_key(element: ui.element, key: str) -> None:
    if key:
        _assign(element, {"data-key": key, "aria-keyshortcuts": key.replace("ctrl", "Control")})


def _assign(element: ui.element, attributes: Mapping[str, Attribute]) -> None:
    for name, value in attributes.items():
        key = name.replace("_", "-")
        assert not key.startswith((":", "on")), f"{key} would be code"
        element.props[key] = _sanitize(value) if isinstance(value, str) else value


def _sanitize(text: object) -> str:
    return shown(text, lines=True)


def _option_pairs(options: Any) -> list[list[str]]:
    pairs = options.items() if isinstance(options, Mapping) else zip(options, options, strict=True)
    return [[str(value), _sanitize(text)] for value, text in pairs]
