"""Building blocks of views.

The only file that passes texts, attributes and markup to NiceGUI, so that no text can become markup or code:
texts are text nodes, attributes are properties with constant names, and templates in `templates/` escape
their values. Uses plain HTML elements, which have accessible names, keys and focus.

    with box("section", "panel"):                       <section class="panel"> … </section>
        heading("Files", 2)
        line("No adapters yet.", "soft")
        button("Add", permit("write", add), key="a", kind="filled")      add() or add(event), sync or async
        name = form_field("Name", "", permit("read", typed))             name.value; name.put("…") sets it
    acts = {"open": permit("read", opened)}
    cards = Fragment("cards.html.j2", acts=acts, versions=found)     many items in one element
    cards.show(versions=others)                                      redraws only the parts that changed

Handlers: `permit` declares the permission that a handler needs, even if its button is hidden, because a
browser can send any event. Before each call, the principal is determined again (`Visitor.again`), so that
`page.caller` is current, and the permission is checked; a handler without a permission is refused. Handlers
can be async. Errors that they raise are shown on the page: a VeneerError as what · where · fix. Work that
takes more than a millisecond belongs in `await asyncio.to_thread(…)`, because all pages run on the engine's
event loop.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
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

Does = Callable[..., Any]
"""A callback with no argument, or with the event: a field's value or clicked data."""


@dataclass(frozen=True)
class Handler:
    """An event handler with the permission that it needs."""

    permission: Permission
    does: Does


def permit(permission: Permission, does: Does) -> Handler:
    """Return a handler for principals with this permission."""
    return Handler(permission, does)


def _coded(text: Any) -> Markup:
    """Return escaped markup in which `text between backticks` is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(shown(text, lines=True)))))


def _foldable(text: Any) -> Markup:
    """Return escaped markup with line-break opportunities after commas and colons."""
    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[,;:])", shown(text, lines=True)))


_HASH = re.compile(r"((?:sha256:)?[0-9a-f]{12})[0-9a-f]{20,}")
_ENV = escaping("veneer.studio", "templates")
_ENV.filters |= {
    "size": size,
    "duration": duration,
    "brief": lambda text: _HASH.sub(r"\1…", str(text)),
    "moment": lambda at: datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M"),
    "coded": _coded,
    "foldable": _foldable,
}


def heard(handler: Handler) -> Callable[[Any], Any]:
    """Wrap a handler for NiceGUI: check its permission, then call it.

    Passes the event if the handler takes an argument."""

    async def hear(event: Any) -> None:
        try:
            principal = await VISITORS[event.client].again()
            principal.require(handler.permission if isinstance(handler, Handler) else None)
            current_owner.set(principal.tenant)
            await _done(handler.does, event.args)
        except VeneerError as error:  # shown on the page; NiceGUI would also log a traceback
            event.client.handle_exception(error)

    return hear


async def _done(does: Does, came: Any) -> None:
    """Call `does(came)`, or `does()` if it has no required argument."""
    wants = [p for p in inspect.signature(does).parameters.values() if p.default is p.empty]
    made = does(came) if wants else does()
    if inspect.isawaitable(made):
        await made


def once(handler: Handler) -> Handler:
    """Wrap a handler to ignore calls while it runs, such as double clicks."""
    going = False

    async def do(came: Any) -> None:
        nonlocal going
        if going:
            return
        going = True
        try:
            await _done(handler.does, came)
        finally:
            going = False

    return Handler(handler.permission, do)


def box(tag: str = "div", look: str = "", **attributes: str | int | bool) -> ui.element:
    """Return an HTML container: `with box("section", "panel", aria_label="Files"):`.

    `look`: classes of studio.css. Underscores in attribute names become dashes."""
    element = ui.element(tag)
    if look:
        element.classes(look)
    _set(element, attributes)
    return element


def line(text: object, look: str = "", tag: str = "p", **attributes: str | int | bool) -> ui.element:
    """Return an element with a text. `put(element, text)` changes the text."""
    element = box(tag, look, **attributes)
    element._text = _plain(text)
    return element


def put(element: ui.element, text: object) -> None:
    """Change the text of a `line`, a heading or a button."""
    if element._text != (text := _plain(text)):
        element._text = text
        element.update()


def mark(element: ui.element, **attributes: str | int | bool) -> None:
    """Change attributes of a `box` or `line`."""
    before = dict(element.props)
    _set(element, attributes)
    if element.props != before:
        element.update()


def show(element: ui.element, visible: bool) -> None:
    """Show or hide an element."""
    element.set_visibility(visible)


def place_at(element: ui.element, place: int) -> None:
    """Move an element among its siblings; 0 is first."""
    assert element.parent_slot is not None
    element.move(target_index=place)


def heading(text: object, level: Literal[1, 2, 3] = 2) -> ui.element:
    return line(text, tag=f"h{level}")


Kind = Literal["filled", "quiet", "word", "danger"]
"""Kinds of buttons.

filled: the view's main action
quiet: outlined
word: text only, underlined on hover
danger: removes something; place an explanation next to it"""


def button(
    text: object, does: Handler, *, kind: Kind = "quiet", key: str = "", look: str = "", **attributes: str | int | bool
) -> ui.element:
    """Return a button. `enable(button, False)` disables it.

    `key`: shortcut: a letter, a sequence ("g l"), or "ctrl+enter". Shortcuts without ctrl do not act while
    the user types."""
    element = line(text, f"button {kind} {look}", "button", type="button", **attributes)
    if key:
        _set(element, {"data-key": key, "aria-keyshortcuts": key.replace("ctrl", "Control")})
    element.on("click", heard(once(does)), args=[])
    return element


def enable(element: ui.element, can: bool, why: str = "") -> None:
    """Enable or disable an element. `why`: tooltip of a disabled element."""
    mark(element, disabled=not can, title="" if can else why)


def link(text: object, to: str, look: str = "", *, key: str = "", **attributes: str | int | bool) -> ui.element:
    """Return a link. Raises ValueError for a link to another server.

    `to`: from `ViewPage.link` (another view) or `ViewPage.api` (a file; pass `download=True`)."""
    if not to.startswith("/") or to.startswith("//"):
        raise ValueError("links lead to this server alone")
    element = line(text, look, "a", href=to, **attributes)
    if key:
        _set(element, {"data-key": key, "aria-keyshortcuts": key})
    return element


class Field(ui.element, component="field.js"):
    """A form field; see `form_field`. Keeps typed text during a redraw of the page."""

    value: Any = None

    def put(self, value: Any) -> None:
        """Set the value without calling `changed`.

        Other updates of the field keep the text that the user has typed."""
        self.value = self.props["value"] = value
        self.props["turn"] += 1
        self.update()

    def offer(self, options: Mapping[str, str] | Sequence[str]) -> None:
        """Set the options of a choice."""
        if (other := _options(options)) != self.props["options"]:
            self.props["options"] = other
            self.update()


_FieldKind = Literal["text", "search", "number", "area", "choice", "range", "check"]


def form_field(
    label: str,
    value: Any = "",
    changed: Handler | None = None,
    *,
    kind: _FieldKind = "text",
    hint: str = "",
    options: Mapping[str, str] | Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    wait: float = 0.15,
    most: int = 20_000,
    entered: Handler | None = None,
    key: str = "",
    look: str = "",
    hidden_label: bool = False,
) -> Field:
    """Return a labelled form field.

    changed(value): called `wait` seconds after the last input; for a range while it moves, at most every
    `wait` s entered(value): called on Enter, in an area on Ctrl+Enter hint: placeholder hidden_label: show
    the label to screen readers only options: value -> text, of a choice most: maximum characters low, high:
    bounds of a number or a range

    Values: text; float for number and range (None if invalid); bool for check."""
    element = Field()
    element.value = value
    element.classes(f"field {look}")
    given: dict[str, Any] = {
        "label": _plain(label),
        "value": value,
        "kind": kind,
        "hint": _plain(hint),
        "wait": wait,
        "most": most,
        "options": _options(options),
        "low": low,
        "high": high,
        "step": step,
        "shortcut": key,
        "hides": hidden_label,
        "turn": 0,
        "enters": entered is not None,
    }
    for name, each in given.items():
        element.props[name] = each

    def both(handler: Handler | None) -> Handler:
        async def do(value: Any) -> None:
            if kind == "number" and isinstance(value, int | float):  # the browser clamps on blur
                value = min(value if high is None else high, max(value if low is None else low, value))
            element.value = element.props["value"] = value  # the browser already shows the value
            if handler is not None:
                await _done(handler.does, value)

        return permit("read", do) if handler is None else Handler(handler.permission, do)

    element.on("changed", heard(both(changed)))
    if entered is not None:
        element.on("entered", heard(both(once(entered))))
    return element


class Fragment(ui.element, component="fragment.js"):
    """A template of `templates/`, rendered with escaping into one element.

    `acts`: name -> handler of a click on an element with `data-act="NAME"`; the handler gets the element's
    data- attributes as a dict of texts. Give list items and selectable elements a `data-id`, so that a redraw
    keeps the elements (fragment.js)."""

    def __init__(
        self, template: str, *, look: str = "", acts: Mapping[str, Handler] | None = None, **values: Any
    ) -> None:
        super().__init__()
        self._template = template
        self.classes(look)
        self.props["html"] = self._drawn(values)
        if acts:

            async def clicked(data: dict[str, str]) -> None:
                if (handler := acts.get(data.get("act", ""))) is not None:
                    VISITORS[self.client].caller.require(handler.permission)
                    await _done(handler.does, data)

            self.on("click", heard(permit("public", clicked)), js_handler=_CLICKED)

    def _drawn(self, values: Mapping[str, Any]) -> str:
        return _ENV.get_template(self._template).render(**values)

    def show(self, **values: Any) -> None:
        if (other := self._drawn(values)) != self.props["html"]:
            self.props["html"] = other
            self.update()


_CLICKED = """(e) => {
  const at = e.target.closest("[data-act]");
  if (at) { e.preventDefault(); emit({...at.dataset}); }
}"""


class Command:
    """An equivalent command line to copy. `show` changes the text; "" hides it."""

    def __init__(self, text: str = "") -> None:
        self.fragment = Fragment("command.html.j2", text=text)

    def show(self, text: str) -> None:
        self.fragment.show(text=text)


class Dialog(ui.element):
    """A modal dialog. A closed dialog is deleted once its action has finished.

    The action can draw in the dialog's element until then."""

    def __init__(self, title: str) -> None:
        super().__init__("dialog")
        self.classes("dialog")
        _set(self, {"aria-label": title})
        self.shut = self.acting = self.closing = False
        self.on("close", heard(permit("public", self._shut)), args=[])

    def _shut(self) -> None:
        self.shut = True
        if not self.acting:
            self.delete()

    async def act(self, does: Does) -> None:
        if self.closing:
            return  # second click before the browser closed the dialog
        self.acting = True
        try:
            await _done(does, None)
        finally:
            self.acting = False
            if self.shut and not self.is_deleted:
                self.delete()


def dialog(title: str) -> Dialog:
    """Return a dialog: `with dialog("Shortcuts") as window: …`, then `opened(window)`.

    Escape closes the dialog."""
    with Dialog(title) as element:
        heading(title, 2)
    return element


_OPEN: WeakKeyDictionary[Client, Dialog] = WeakKeyDictionary()
"""Client -> its current or last dialog."""


def opened(window: Dialog) -> None:
    """Open a dialog. A page has one dialog at a time, so a double click opens one."""
    before = _OPEN.get(window.client)
    if before is not None and not (before.acting or before.is_deleted):
        before.delete()
    _OPEN[window.client] = window
    window.run_method("showModal")


def closed(window: Dialog) -> None:
    window.closing = True
    window.run_method("close")


def confirm(
    title: str, sentence: str, does: Handler, *, button_text: str, command: str = "", danger: bool = False
) -> None:
    """Ask for confirmation, then call `does`. Call `confirm` in a handler."""
    with dialog(title) as window:
        line(sentence)
        if command:
            Command(command)

        async def do() -> None:
            closed(window)
            await _done(does.does, None)

        decide(window, button_text, permit(does.permission, do), danger=danger)
    opened(window)


def decide(window: Dialog, button_text: str, does: Handler, *, danger: bool = False) -> None:
    """Draw a dialog's buttons: Cancel, and the action, which closes it on success."""
    with box("div", "row end"):
        button("Cancel", permit("public", lambda: closed(window)), kind="word")
        button(
            button_text, permit(does.permission, lambda: window.act(does.does)), kind="danger" if danger else "filled"
        )


def progress(label: str, share: float | None = None) -> ui.element:
    """Return a progress bar; `move(bar, share)` updates it.

    `share`: 0 to 1, or None if unknown."""
    bar = box("progress", aria_label=_plain(label), max=1)
    move(bar, share)
    return bar


def move(bar: ui.element, share: float | None) -> None:
    if share is None:
        bar.props.pop("value", None)
    else:
        bar.props["value"] = round(min(1.0, max(0.0, share)), 3)
    bar.update()


def _set(element: ui.element, attributes: Mapping[str, str | int | bool]) -> None:
    for name, value in attributes.items():
        key = name.replace("_", "-")
        assert not key.startswith((":", "on")), f"{key} would be code"
        element.props[key] = _plain(value) if isinstance(value, str) else value


def _plain(text: object) -> str:
    return shown(text, lines=True)


def _options(options: Any) -> list[list[str]]:
    pairs = options.items() if isinstance(options, Mapping) else zip(options, options, strict=True)
    return [[str(value), _plain(text)] for value, text in pairs]
