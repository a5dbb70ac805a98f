"""The frame around every view, and the guide to writing a view.

A view is an async function in its own file of at most 400 lines, which draws into the given page:

    async def compare_view(page: ViewPage) -> None:
        prompt = page.query.get("p")                       state from the link: get, all, number
        page.title("Compare", "One prompt, several adapters.")
        asked = form_field("Prompt", prompt, permit("read", typed), kind="area", entered=permit("infer", ask), key="p")
        answers = Fragment("answers.html.j2", acts={"vote": permit("feedback", vote)}, answers=[])
        Command(command("generate", prompt))
        page.task(ask())                                   background task; ends when the view is left

and a row of `views` in build.py: path, title, shortcut letter after `g`, and required permission.

    parts         only parts.py (`box`, `line`, `button`, `form_field`, `Fragment`, `dialog`, `confirm` …):
                  never `ui.…`, `.props(`, `.style(`, `run_javascript` in a view; a test checks this
    principal     `page.caller`, determined again before each handler. Query jobs by `page.caller.owner` (None
                  for all tenants). An object that is not visible raises `NothingHere`, with the same message
                  as an object that does not exist
    slow things   `await asyncio.to_thread(function, …)`. Draw first, then await: after one second the browser
                  gets the page as drawn so far, and the rest follows
    state         only the link: `page.keep(q="sty")` changes it without a load (None or "" removes a key);
                  read everything else from the library, the jobs, the tenants
    other views   `link("Compare", page.link("compare", c=["a@1", "b@2"]))`; `await page.go("run", job=id)` in
                  a handler
    dropped files `page.drops(words, to, done)` for files that are not for the library; `page.pick()` opens
                  the picker
    made files    `page.fetch(url, done)`: a download that can fail
    lists         `data-step` on the items that j and k step through; `data-own="x"` on a card's button that
                  the letter x presses while the card has the focus; `data-id` on list items and selectable
                  elements, so that they keep their identity in a redraw
    bytes         (img, downloads, uploads) `page.api("/v1/…")`: a route of the API under the same caller,
                  never a path
    errors        raise: a VeneerError is shown as what · where · fix, anything else as an internal error
    changes       `on_change(mark, 1.0, refill)` (watch.py) for data that others can change. `refill` updates
                  only what differs, with `show`, `put` and `Fragment.show`, never `clear()`: a user can be
                  about to click
    commands      `Command(command("library", "alias", ref, name))` (commands.py): the equivalent command line
    success       `page.say("support@2 is prod now")`, once, at the end
    styles        studio.css; its head lists the classes
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode

from nicegui import background_tasks, ui

from veneer.errors import VeneerError, counted
from veneer.jobs.http.tuning import TuningQueue
from veneer.jobs.store import JobStore
from veneer.library.library import Library, NotInLibrary
from veneer.library.names import likely_name
from veneer.serve.http.errors import as_refused, message_of
from veneer.serve.http.service import Service
from veneer.serve.principal import Permission, Principal
from veneer.serve.request import Refused
from veneer.serve.tenancy.store import Store
from veneer.serve.tenancy.tenants import Tenants
from veneer.studio import parts
from veneer.studio.access import VISITORS, Visitor
from veneer.studio.links import Query, query_of, query_pairs
from veneer.studio.transfers import Transfers

_log = logging.getLogger("veneer.studio")

_PATIENCE = 1.0
"""Seconds after which the browser gets a page that is not fully drawn."""
_LOADING = 0.5
"""Seconds between two polls of a loading base."""


class NothingHere(VeneerError):
    """The object does not exist or is not visible; the message is the same for both."""


@dataclass(frozen=True)
class StudioView:
    """A view.

    path: after /studio/
    key: shortcut letter after g; "": not in the list of views, but `under` another view
    draw: draws the view
    needs: required permission; without it, the view is not found
    uses_base: while the base is loading, show a notice instead of the view"""

    path: str
    title: str
    key: str
    draw: Callable[[ViewPage], Awaitable[None]]
    needs: Permission
    under: str | None = None
    uses_base: bool = False


@dataclass(frozen=True, eq=False)
class Studio:
    """Shared objects of all pages of a server.

    jobs: the queue, also on a server that does not train (`trains`)
    finds: search function (finder.py)
    queue: trains on uploaded rows, or None"""

    service: Service
    library: Library
    jobs: JobStore
    views: Sequence[StudioView]
    finds: Callable[[ViewPage, str], Awaitable[list[dict[str, str]]]]
    trains: bool = False
    queue: TuningQueue | None = None

    @property
    def base(self) -> str:
        """The base's name."""
        return self.service.catalog.base

    @property
    def tenants(self) -> Store | None:
        """The tenants' database of routes, votes and costs, or None."""
        tenancy = self.service.tenancy
        return tenancy.store if isinstance(tenancy, Tenants) else None

    @property
    def loading(self) -> str:
        """Why the server cannot answer yet; "" once the base is loaded."""
        return "" if self.service.loaded else f"{self.base} is still loading"

    def library_mark(self) -> object:
        """Return an object that differs after a possible change of the library's names."""
        names = self.service.catalog.shelf.names
        return None if names is None else names.now


@dataclass(eq=False)
class ViewPage:
    """One visit to one view."""

    frame: Frame
    view: StudioView
    query: Query
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    @property
    def studio(self) -> Studio:
        return self.frame.studio

    @property
    def caller(self) -> Principal:
        return self.frame.visitor.caller

    def name_for(self, filename: str) -> str:
        """Return a library name for a file, in the caller's namespace."""
        own = f"{self.caller.tenant}/" if self.caller.tenant else ""
        return own + (likely_name(filename.rpartition(".")[0] or filename) or "adapter")

    # -- links

    def link(self, view: str, **query: Any) -> str:
        """Return a link to a view. Values: text, number or list; None and "" are omitted."""
        return self._to(view, query)

    def api(self, path: str, **query: Any) -> str:
        """Return the URL of an API route, for an img, a download or an upload.

        The request has the page's caller."""
        return self._to(f"api{path}", query)

    def _to(self, path: str, query: Mapping[str, Any]) -> str:
        said = urlencode(query_pairs(query))
        return f"{self.frame.root}/{path}" + (f"?{said}" if said else "")

    def keep(self, **query: Any) -> None:
        """Change keys of this page's link without loading."""
        rest = [(k, v) for k, v in self.query.pairs if k not in query]
        self.query = Query((*rest, *query_pairs(query)))
        if self.frame.page is self:
            self.frame.tell("keep", f"{self.frame.root}/{self.view.path}", urlencode(self.query.pairs))

    async def go(self, view: str, **query: Any) -> None:
        """Open another view, like a link."""
        to = self.link(view, **query)
        self.frame.tell("went", to)
        await self.frame.visit(view, Query(tuple(query_pairs(query))))

    # -- what it says

    def title(self, title: str, lede: str = "") -> None:
        """Draw the view's heading and a one-line description."""
        parts.heading(title, 1)
        if lede:
            parts.line(lede, "lede")
        self.frame.called(title)

    async def again(self) -> None:
        """Redraw the view from its current link."""
        await self.frame.visit(self.view.path, self.query)

    def pick(self) -> None:
        """Open the browser's file picker; picked files are handled like dropped files."""
        self.frame.tell("pick")

    def drops(
        self,
        words: str,
        to: Callable[[str], str],
        done: Callable[[dict[str, Any]], Any],
        form: Mapping[str, str] | None = None,
    ) -> None:
        """Set the handling of files dropped on this view; default: add to the library.

        words: text shown over the page while dragging
        to(filename): upload URL, from `api`
        done(answer): called with the route's JSON
        form: form fields to post with the file"""
        self.frame.files.take(words, to, done, form)

    def fetch(self, url: str, done: Callable[[str], Any]) -> None:
        """Download the response of a route. `url`: from `api`.

        `done`: called with "", or with the reason for a failure."""
        self.frame.files.fetch(url, done)

    def say(self, text: str) -> None:
        """Show a short message at the page's bottom, also to screen readers.

        Call it at the end of an action, not for each step."""
        self.frame.say(text)

    def task(self, does: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a background task that draws in the current element.

        The task is cancelled when the view is left."""
        slot = ui.context.slot
        task = background_tasks.create(does, name=f"studio {self.view.path}", context=slot)
        self.tasks.append(task)
        task.add_done_callback(lambda done: self.tasks.remove(done) if done in self.tasks else None)
        return task

    def when_loaded(self, does: Callable[[], Any]) -> None:
        """Call `does` once the base is loaded.

        Does nothing if the base is loaded already, or if the view is left before."""

        async def wait() -> None:
            while not self.studio.service.loaded:
                await asyncio.sleep(_LOADING)
            await self.frame.visitor.again()
            if inspect.isawaitable(made := does()):
                await made

        if not self.studio.service.loaded:
            self.task(wait())

    def left(self) -> None:
        for task in list(self.tasks):
            if task is not asyncio.current_task():
                task.cancel()


class Browser(ui.element, component="browser.js"):
    """Browser features: address bar, keys, clipboard, color scheme, dropped files."""


class Frame:
    """The frame of one browser window: navigation, errors, keys, and one view."""

    def __init__(self, studio: Studio, visitor: Visitor, root: str, address: str) -> None:
        """Draw the frame. `address`: this server's address, as the browser sees it."""
        self.studio, self.visitor, self.root, self.address = studio, visitor, root, address
        self.page: ViewPage | None = None
        self.client = ui.context.client
        VISITORS[self.client] = visitor
        self.client.on_exception(self.wrong)
        self.client.on_delete(self.leave)
        with self.client.layout:
            top = parts.box("header", "top")
            top.move(self.client.layout, target_index=0)
        with top:
            self._top()
        with self.client.content:
            self.trouble = parts.Fragment(
                "trouble.html.j2", acts={"closed": parts.permit("public", self._well)}, error=None, title=""
            )
            self.place = parts.box()
            self.status = parts.line("", "status", "div", role="status")
            self.browser = Browser()
        self.files = Transfers(self.browser, self.tell)
        self.browser.on("go", parts.heard(parts.permit("public", self._went)))
        self.browser.on("sought", parts.heard(parts.permit("read", self._sought)))

    def _top(self) -> None:
        parts.link("veneer", f"{self.root}/", "brand")
        with parts.box("nav", "views", aria_label="Views"):
            self.links = {
                view.path: parts.link(view.title, f"{self.root}/{view.path}", key=f"g {view.key}")
                for view in self.studio.views
                if view.key and self.visitor.caller.can(view.needs)
            }
        self.base = parts.line("", "base", "span", title="The base that this server runs")
        self._name_base()
        with parts.box("div", "row"):
            parts.line("Find", "button word", "button", type="button", data_does="find", aria_keyshortcuts="Control+k")
            parts.line("◐ System", "button word", "button", type="button", data_theme="next", data_key="t")
            parts.line("Shortcuts", "button word", "button", type="button", data_does="keys", aria_keyshortcuts="?")
            if self.visitor.key is not None:
                with parts.box("form", "", method="post", action=f"{self.root}/leave"):
                    parts.line("Sign out", "button word", "button", type="submit")

    def _name_base(self) -> None:
        parts.put(self.base, self.studio.base + (" · loading" if self.studio.loading else ""))

    # -- views

    async def visit(self, path: str, query: Query) -> int:
        """Replace the current view by the view of a path. Returns the HTTP status."""
        self.leave()
        view = next((view for view in self.studio.views if view.path == path), None)
        if view is None or not self.visitor.caller.can(view.needs):
            view = StudioView(path, "Not found", "", _nowhere, "public")
        draw_view = _still_loading if view.uses_base and self.studio.loading else view.draw
        for each, link in self.links.items():
            parts.mark(link, aria_current="page" if each == view.path else "true" if each == view.under else "false")
        self._well()
        self.page = page = ViewPage(self, view, query)
        page.when_loaded(self._name_base)
        self._take_adapters(page)
        self.called(view.title)
        before = list(self.place)
        with self.place:
            place = parts.box("div", "view")
        if before:  # keep the old view until the new one shows something
            parts.show(place, False)

        async def draw() -> int:
            try:
                await draw_view(page)
            except (NothingHere, NotInLibrary) as error:
                place.clear()
                _not_here(page, error)
                return 404
            except Exception as error:  # the page shows any error
                place.clear()
                page.title(view.title)
                return self.wrong(error)
            return 200

        with place:
            drawing = page.task(draw())
        done, _ = await asyncio.wait([drawing], timeout=_PATIENCE)
        for old in before:
            if old in list(self.place):
                self.place.remove(old)
        parts.show(place, True)
        return drawing.result() if done and not drawing.cancelled() else 200

    async def _went(self, to: str) -> None:
        """Handle a new address in the browser: a link, back or forward."""
        path, _, said = str(to).partition("?")
        await self.visit(path.removeprefix(self.root).strip("/"), query_of(parse_qsl(said)))

    def leave(self) -> None:
        if self.page is not None:
            self.page.left()

    async def _sought(self, text: str) -> None:
        if self.page is not None:
            self.tell("found", text, await self.studio.finds(self.page, str(text)))

    def _take_adapters(self, page: ViewPage) -> None:
        """Add dropped files to the library: the default of every view."""

        def to(filename: str) -> str:
            return page.api("/v1/adapters", name=page.name_for(filename), filename=filename)

        async def done(answer: dict[str, Any]) -> None:
            ref = str(answer.get("id", ""))
            if self.files.count == 1:
                await page.go("adapter", ref=ref)
            page.say(f"{ref} is in the library" if answer.get("new", True) else f"{ref} was in the library already")

        page.drops("Drop to add to the library", to, done)

    # -- words

    def called(self, title: str) -> None:
        self.client.title = f"{title} · veneer"
        self.tell("named", self.client.title)

    def say(self, text: str) -> None:
        parts.put(self.status, text)
        self.tell("said")

    def tell(self, what: str, *given: Any) -> None:
        """Call a method of browser.js."""
        if self.client.has_socket_connection:
            self.browser.run_method(what, *given)

    def _well(self) -> None:
        self.trouble.show(error=None, title="")

    def wrong(self, error: Exception) -> int:
        """Show an error of a view, a handler or a task, and return the HTTP status.

        Logs unexpected errors."""
        if isinstance(error, RuntimeError) and "has been deleted" in str(error):
            return 200  # the view was left meanwhile
        if isinstance(error, Refused) and error.status == 401:
            self.tell("again")
            return 401
        known = error if isinstance(error, VeneerError) else as_refused(error)
        if not isinstance(error, VeneerError):
            _log.error("the Studio failed", exc_info=error)
        status = known.status if isinstance(known, Refused) else 400
        if not self.visitor.caller.can("operate"):  # hide paths on the server
            known = VeneerError(message_of(known))
        self.trouble.show(error=known, title="Error" if isinstance(error, VeneerError) else "Internal error")
        return status


async def _still_loading(page: ViewPage) -> None:
    """Draw a notice while the base is loading, and the view afterwards."""
    service = page.studio.service
    page.title(page.view.title)
    with parts.box("div", "empty"):
        parts.heading(page.studio.loading, 2)
        now = parts.line("", "soft", role="status")
        parts.line("This view opens by itself once the base is loaded. The library, Train and Doctor work meanwhile.")

    def tell() -> None:
        seconds = counted(round(time.monotonic() - service.began), "second")
        step = f"{service.step} " if service.step and page.caller.can("operate") else ""  # steps can name paths
        parts.put(now, f"{step}({seconds} since the start)")

    tell()
    ui.timer(1.0, tell)
    page.when_loaded(page.again)


async def _nowhere(page: ViewPage) -> None:
    raise NothingHere("Not found.")


def _not_here(page: ViewPage, error: VeneerError) -> None:
    page.title("Not found")
    parts.line("This page does not exist, or you do not have access.", "lede")
    if error.fix and page.caller.can("operate"):
        parts.line(error.fix, "soft")
    parts.link("To the library", page.link(""), "button quiet")
