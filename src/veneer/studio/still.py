"""A page as it stands, as plain HTML: what a browser shows at once, until the page's programs are there and take over.

Without it nothing is painted before a megabyte of Vue, Quasar and Socket.IO has run. It is the same tree, with
escaping, so that it looks the same; its links work; what was typed into it meanwhile is taken over (browser.js).
"""

from __future__ import annotations

from markupsafe import Markup, escape
from nicegui import Client, ui

from veneer.studio.parts import Field, Fragment

_EMPTY = ("img", "input", "br", "hr")


def add_still(client: Client) -> None:
    """Into the page of a client that has not gone out yet."""
    top = [each for each in client.layout if each.tag == "header"]
    body = Markup("").join([*map(_html, top), Markup('<div class="nicegui-content">'), _inside(client.content)])
    with client:
        ui.add_body_html(str(Markup('<div id="shell">{}</div></div>').format(body)))


def _inside(element: ui.element) -> Markup:
    return Markup("").join(map(_html, element))


def _html(element: ui.element) -> Markup:
    if "hidden" in element.classes:
        return Markup("")
    if isinstance(element, Field):
        return _field(element)
    look = Markup(' class="{}"').format(" ".join(element.classes)) if element.classes else Markup("")
    if isinstance(element, Fragment):  # rendered with escaping
        return Markup("<div{}>{}</div>").format(look, Markup(element.props["html"]))
    if element.component is not None:
        return Markup("")
    said = {name: value for name, value in element.props.items() if value is not False and not name.startswith(":")}
    attributes = Markup("").join(
        Markup(" {}").format(name) if value is True else Markup(' {}="{}"').format(name, value)
        for name, value in said.items()
    )
    if element.tag in _EMPTY:
        return Markup("<{}{}{}>").format(element.tag, look, attributes)
    text = escape(element._text or "")
    return Markup("<{0}{1}{2}>{3}{4}</{0}>").format(element.tag, look, attributes, text, _inside(element))


def _field(element: Field) -> Markup:
    """As field.js draws it."""
    p = element.props
    kind, value = str(p["kind"]), element.value
    if kind == "area":
        box = Markup('<textarea rows="3" placeholder="{}">{}</textarea>').format(p["hint"], value)
    elif kind == "choice":
        chosen = next((text for key, text in p["options"] if key == str(value)), "")
        box = Markup("<select><option>{}</option></select>").format(chosen)
    elif kind == "check":
        box = Markup('<input type="checkbox"{}>').format(Markup(" checked") if value else "")
    elif kind == "range":
        box = Markup('<span class="slide"><input type="range"><input type="number" value="{}"></span>').format(value)
    else:
        box = Markup('<input type="{}" value="{}" placeholder="{}">').format(
            kind, "" if value is None else value, p["hint"]
        )
    name = Markup('<span class="name{}">{}</span>').format(" unseen" if p["hides"] else "", p["label"])
    look = " ".join([*element.classes, *(["check"] if kind == "check" else [])])
    return Markup('<label class="{}">{}{}</label>').format(look, name, box)
