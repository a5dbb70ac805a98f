"""The page around every view, and a guide to writing a view.

A view is an async function in its own file that draws into a page:

    async def compare_view(page: ViewPage) -> None:
        prompt = page.query.get("p")                       state from the link: get, all, number
        page.title("Compare", "One prompt, several adapters.")
        asking = permit("infer", ask)
        field = form_field("Prompt", prompt, permit("read", typed), kind="area", on_enter=asking)
        answers = Fragment("answers.html.j2", actions={"vote": permit("feedback", vote)}, answers=[])
        Command(command("generate", prompt))
        page.start_task(ask())                             background task; ends when the user leaves the view

A view also needs a row of `views` in build.py: path, title, shortcut letter after `g`, and required
permission.

    elements      use only elements.py (`box`, `line`, `button`, `form_field`, `Fragment`, `dialog`,
                  `confirm` …): never `ui.…`, `.props(`, `.style(`, `run_javascript` in a view; a test checks
                  this
    principal     `page.principal` is updated before each handler. Query jobs by `page.principal.owner` (None
                  for all tenants). For an object that is not visible, raise `NotFound` with the same message
                  as for an object that does not exist
    slow work     `await asyncio.to_thread(function, …)`. Draw first, then await: after one second, the
                  browser gets the page as drawn so far, and it gets the rest later
    state         keep state only in the link: `page.set_query(q="sty")` changes the link without a load (None
                  or "" removes a key). Read all other data from the library, the jobs and the tenants
    other views   `link("Compare", page.link("compare", c=["a@1", "b@2"]))`; `await page.go("run", job=id)` in
                  a handler
    dropped files `page.on_drop(words, url, done)` for files that the view itself uses; `page.pick_file()`
                  opens the picker
    lists         `data-step` marks items that j and k step through. `data-own="x"` marks a card's button
                  that the letter x presses while the card has the focus. List items and selectable elements
                  need a `data-id`, so that a redraw keeps the elements
    images,       `page.api("/v1/…")`: an API route, called as the page's principal; never a file path
    downloads,
    uploads
    errors        raise them. For a VeneerError, the page shows what failed, where, and how to fix it; any
                  other exception is shown as an internal error
    changes       `page.on_change(mark, 1.0, refill)` for data that others can change. `refill` updates only
                  what differs, with `set_text` and `Fragment.show`, never `clear()`, because the user can be
                  about to click
    commands      `Command(command("library", "alias", ref, name))`: the equivalent command line
    success       `page.notify("support@2 is prod now")`, once, at the end
    styles        studio.css; the comment at its top lists the classes
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from nicegui import background_tasks, ui

from veneer.errors import VeneerError, counted, shown
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
from veneer.studio import elements
from veneer.studio.access import VISITORS, Visitor
from veneer.studio.elements import box, event_handler, line, permit

_log = logging.getLogger("veneer.studio")

_PATIENCE = 1.0
"""Seconds after which the browser gets the page even if it is not fully drawn."""
_LOADING = 0.5
"""Seconds between two checks of whether the base is loaded."""
_FILES = 50
"""Maximum number of files in one drop."""
_HITS = 6
"""Maximum number of search results of each kind."""


class NotFound(VeneerError):
    """The object does not exist or is not visible; both cases have the same message."""


@dataclass(frozen=True)
class Query:
    """The query string of a link. All values are strings."""

    pairs: tuple[tuple[str, str], ...] = ()

    def get(self, name: str, default: str = "") -> str:
        return next((value for key, value in self.pairs if key == name), default)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.pairs if key == name]

    def number(self, name: str, default: float) -> float:
        """Return a value as a number, or `default` if the value is not a number."""
        try:
            return float(self.get(name))
        except ValueError:
            return default


def parse_query(pairs: Iterable[tuple[str, str]]) -> Query:
    """Return a Query from a link, sanitized and limited to 200 pairs."""
    return Query(tuple((shown(key), shown(value, lines=True)) for key, value in islice(pairs, 200)))


def _query_pairs(query: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return (name, text) pairs for a query; values are texts, numbers or lists.

    None and "" are omitted."""
    return tuple(
        (name, f"{each:g}" if isinstance(each, float) else str(each))
        for name, value in query.items()
        for each in (value if isinstance(value, list | tuple) else [value])
        if each is not None and each != ""
    )


@dataclass(frozen=True)
class StudioView:
    """A view of the Studio.

    path: the path after /studio/
    key: shortcut letter after g; "" for a view that the navigation does not list
    draw: the function that draws the view
    needs: required permission; without it, the view is "not found"
    under: path of the view that the navigation marks as current while this view is open
    uses_base: while the base is loading, show a notice instead of the view"""

    path: str
    title: str
    key: str
    draw: Callable[[ViewPage], Awaitable[None]]
    needs: Permission
    under: str | None = None
    uses_base: bool = False


@dataclass(eq=False)
class Studio:
    """The objects that all pages of a server share.

    jobs: the job store, even if this server runs no jobs
    trains: whether this server runs training jobs
    queue: creates runs on uploaded rows; None if the server runs no jobs"""

    service: Service
    library: Library
    jobs: JobStore
    views: Sequence[StudioView]
    trains: bool = False
    queue: TuningQueue | None = None

    @property
    def base(self) -> str:
        """The base's name."""
        return self.service.catalog.base

    @property
    def tenants(self) -> Store | None:
        """The tenants' database (routes, votes, costs); None without tenants."""
        tenancy = self.service.tenancy
        return tenancy.store if isinstance(tenancy, Tenants) else None

    @property
    def makes_images(self) -> bool:
        return self.service.engine.makes == "pictures"

    @property
    def loading(self) -> str:
        """Why the server cannot answer requests yet; "" once the base is loaded."""
        return "" if self.service.loaded else f"{self.base} is still loading"

    def library_mark(self) -> object:
        """Return a value that changes whenever names in the library may have changed."""
        names = self.service.catalog.sources.names
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
    def principal(self) -> Principal:
        return self.frame.visitor.principal

    @property
    def base_argument(self) -> str:
        """This server's base as a command line argument; only the operator sees the path."""
        studio = self.studio
        return str(studio.service.catalog.sources.base.name) if self.principal.can("operate") else studio.base

    def name_for(self, filename: str) -> str:
        """Return a library name for a file, in the principal's namespace."""
        namespace = f"{self.principal.tenant}/" if self.principal.tenant else ""
        return namespace + (likely_name(filename.rpartition(".")[0] or filename) or "adapter")

    # -- links

    def link(self, path: str, **query: Any) -> str:
        """Return a link to a view.

        Query values are texts, numbers or lists; None and "" are omitted."""
        encoded = urlencode(_query_pairs(query))
        return f"{self.frame.root}/{path}" + (f"?{encoded}" if encoded else "")

    def api(self, path: str, **query: Any) -> str:
        """Return the URL of an API route, for this page's images and file transfers."""
        return self.link(f"api{path}", **query)

    def set_query(self, **query: Any) -> None:
        """Change values in this page's link without loading the page."""
        rest = tuple((k, v) for k, v in self.query.pairs if k not in query)
        self.query = Query(rest + _query_pairs(query))
        if self.frame.page is self:
            self.frame.call_browser("setQuery", f"{self.frame.root}/{self.view.path}", urlencode(self.query.pairs))

    async def go(self, view: str, **query: Any) -> None:
        """Open another view, as a click on a link does."""
        self.frame.call_browser("navigated", self.link(view, **query))
        await self.frame.visit(view, Query(_query_pairs(query)))

    async def reload(self) -> None:
        """Redraw the view from its current link."""
        await self.frame.visit(self.view.path, self.query)

    # -- texts and files

    def title(self, title: str, lede: str = "") -> None:
        """Draw the view's heading and a one-line description."""
        elements.heading(title, 1)
        if lede:
            line(lede, "lede")
        self.frame.set_title(title)

    def notify(self, text: str) -> None:
        """Show a short message at the bottom of the page, also to screen readers."""
        elements.set_text(self.frame.status, text)
        self.frame.call_browser("showStatus")

    def pick_file(self) -> None:
        """Open the browser's file picker; selected files are handled like dropped files."""
        self.frame.call_browser("pickFile")

    def on_drop(
        self,
        words: str,
        url: Callable[[str], str],
        done: Callable[[dict[str, Any]], Any],
        form: Mapping[str, str] | None = None,
    ) -> None:
        """Set what happens to files dropped on this view.

        By default, dropped files are added to the library.

        words: text shown over the page while the user drags files
        url(filename): returns the upload URL, from `api`
        done(answer): called with the JSON that the API route returns
        form: fields of a multipart form; if None, only the file is sent"""
        self.frame.upload_url, self.frame.uploaded, self.frame.upload_form = url, done, form
        elements.set_attributes(self.frame.browser, words=words)

    # -- tasks

    def start_task(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a background task that draws in the current element.

        The task is cancelled when the user leaves the view."""
        task = background_tasks.create(work, name=f"studio {self.view.path}", context=ui.context.slot)
        self.tasks.append(task)
        task.add_done_callback(lambda done: self.tasks.remove(done) if done in self.tasks else None)
        return task

    def when_loaded(self, callback: Callable[[], Any]) -> None:
        """Call `callback` once the base is loaded.

        The callback is never called if the base is already loaded, or if the user leaves the view first."""

        async def wait() -> None:
            while not self.studio.service.loaded:
                await asyncio.sleep(_LOADING)
            await self.frame.visitor.authenticate()
            await _awaited(callback())

        if not self.studio.service.loaded:
            self.start_task(wait())

    def on_change(self, mark: Callable[[], Any], seconds: float, refill: Callable[[], Any]) -> None:
        """Call `refill` whenever the value of `mark` changes.

        The value is polled every `seconds` until the user leaves the view. `mark` runs in a thread; `refill`
        runs on the event loop and can draw."""
        last: list[Any] = []

        async def poll() -> None:
            now = await asyncio.to_thread(mark)
            if last and now != last[0]:
                await self.frame.visitor.authenticate()
                await _awaited(refill())
            last[:] = [now]

        ui.timer(seconds, poll)

    def cancel_tasks(self) -> None:
        for task in list(self.tasks):
            if task is not asyncio.current_task():
                task.cancel()


async def _awaited(result: Any) -> None:
    if inspect.isawaitable(result):
        await result


class Browser(ui.element, component="browser.js"):
    """Access to the browser: address bar, keys, clipboard, colors, dropped files."""


class Frame:
    """The frame of one browser window, around the current view.

    It has the navigation, the search, file transfers and errors."""

    upload_url: Callable[[str], str]
    uploaded: Callable[[dict[str, Any]], Any]
    upload_form: Mapping[str, str] | None

    def __init__(self, studio: Studio, visitor: Visitor, root: str, address: str) -> None:
        """Draw the frame. `address`: this server's address in the browser."""
        self.studio, self.visitor, self.root, self.address = studio, visitor, root, address
        self.page: ViewPage | None = None
        self.files = 0
        """Number of files in the last drop."""
        self.client = ui.context.client
        VISITORS[self.client] = visitor
        self.client.on_exception(self.show_error)
        self.client.on_delete(self.leave)
        with self.client.layout:
            top = box("header", "top")
            top.move(self.client.layout, target_index=0)
        with top:
            self._draw_top()
        with self.client.content:
            actions = {"closed": permit("public", self._clear_error)}
            self.error = elements.Fragment("trouble.html.j2", actions=actions)
            self.content = box()
            self.status = line("", "status", "div", role="status")
            self.browser = Browser()
        self.browser.on("navigate", event_handler(permit("public", self._navigate)))
        self.browser.on("search", event_handler(permit("read", self._search)))
        self.browser.on("dropped", event_handler(permit("read", self._send_files)))
        self.browser.on("sent", event_handler(permit("read", self._file_sent)))

    def _draw_top(self) -> None:
        elements.link("veneer", f"{self.root}/", "brand")
        with box("nav", "views", aria_label="Views"):
            views = [view for view in self.studio.views if view.key and self.visitor.principal.can(view.needs)]
            self.links = {v.path: elements.link(v.title, f"{self.root}/{v.path}", key=f"g {v.key}") for v in views}
        self.base = line("", "base", "span", title="The base that this server runs")
        self._show_base()
        with box("div", "row"):
            style = {"classes": "button word", "tag": "button", "type": "button"}
            line("Search", **style, data_does="find", aria_keyshortcuts="Control+k")
            line("◐ System", **style, data_theme="next", data_key="t")
            line("Shortcuts", **style, data_does="keys", aria_keyshortcuts="?")
            if self.visitor.key is not None:
                with box("form", "", method="post", action=f"{self.root}/leave"):
                    line("Sign out", "button word", "button", type="submit")

    def _show_base(self) -> None:
        elements.set_text(self.base, self.studio.base + (" · loading" if self.studio.loading else ""))

    def call_browser(self, method: str, *arguments: Any) -> None:
        """Call a method of browser.js."""
        if self.client.has_socket_connection:
            self.browser.run_method(method, *arguments)

    def set_title(self, title: str) -> None:
        self.client.title = f"{title} · veneer"
        self.call_browser("setTitle", self.client.title)

    # -- views

    async def visit(self, path: str, query: Query) -> int:
        """Replace the current view with the view at `path`, and return the HTTP status."""
        self.leave()
        view = next((view for view in self.studio.views if view.path == path), None)
        if view is None or not self.visitor.principal.can(view.needs):
            view = StudioView(path, "Not found", "", _not_found, "public")
        draw_view = _draw_loading if view.uses_base and self.studio.loading else view.draw
        for each, link in self.links.items():
            current = "page" if each == view.path else "true" if each == view.under else "false"
            elements.set_attributes(link, aria_current=current)
        self._clear_error()
        self.page = page = ViewPage(self, view, query)
        page.when_loaded(self._show_base)
        self._add_dropped_adapters(page)
        self.set_title(view.title)
        previous = list(self.content)
        with self.content:
            content = box("div", "view")
        if previous:  # keep the old view visible until the new view has content
            elements.set_visible(content, False)

        async def draw() -> int:
            try:
                await draw_view(page)
            except (NotFound, NotInLibrary) as error:
                content.clear()
                _draw_not_found(page, error)
                return 404
            except Exception as error:  # any error is shown on the page
                content.clear()
                page.title(view.title)
                return self.show_error(error)
            return 200

        with content:
            task = page.start_task(draw())
        done, _ = await asyncio.wait([task], timeout=_PATIENCE)
        for old in previous:
            if old in list(self.content):
                self.content.remove(old)
        elements.set_visible(content, True)
        return task.result() if done and not task.cancelled() else 200

    async def _navigate(self, to: str) -> None:
        """Handle a new address in the browser, from a link or the back or forward button."""
        path, _, query = str(to).partition("?")
        await self.visit(path.removeprefix(self.root).strip("/"), parse_query(parse_qsl(query)))

    def leave(self) -> None:
        if self.page is not None:
            self.page.cancel_tasks()

    # -- search

    async def _search(self, text: str) -> None:
        if (page := self.page) is not None:
            words = str(text).lower().split()[:8]
            results = [
                {"title": view.title, "kind": f"view · g {view.key}", "to": page.link(view.path)}
                for view in self.studio.views
                if view.key and page.principal.can(view.needs) and _matches(view.title, words)
            ]
            results += await asyncio.to_thread(_search_objects, page, str(text)[:200], words) if words else []
            self.call_browser("showResults", text, results)

    # -- files: browser.js sends and receives them through API routes, like any other client

    def _add_dropped_adapters(self, page: ViewPage) -> None:
        """Add files that are dropped on a page to the library, unless the view sets its own `on_drop`."""

        def url(filename: str) -> str:
            return page.api("/v1/adapters", name=page.name_for(filename), filename=filename)

        async def done(answer: dict[str, Any]) -> None:
            ref = str(answer.get("id", ""))
            if self.files == 1:
                await page.go("adapter", ref=ref)
            page.notify(f"Added {ref}" if answer.get("new", True) else f"{ref} is already in the library")

        page.on_drop("Drop to add to the library", url, done)

    def _send_files(self, names: list[str]) -> None:
        self.files = len(names)
        for n, name in enumerate(names[:_FILES]):
            self.call_browser("send", n, self.upload_url(str(name)[-200:]), self.upload_form)

    async def _file_sent(self, event: dict[str, Any]) -> None:
        answer, message = _parse_answer(event)
        if event["status"] not in (200, 201):
            raise VeneerError(message or "the upload failed")
        await _awaited(self.uploaded(answer))

    # -- errors

    def _clear_error(self) -> None:
        self.error.show(error=None, title="")

    def show_error(self, error: Exception) -> int:
        """Show an error of a view, a handler or a task, and return the HTTP status.

        Unexpected errors are also logged."""
        if isinstance(error, RuntimeError) and "has been deleted" in str(error):
            return 200  # the user has left the view
        if isinstance(error, Refused) and error.status == 401:
            self.call_browser("reload")
            return 401
        reported = error if isinstance(error, VeneerError) else as_refused(error)
        if not isinstance(error, VeneerError):
            _log.error("the Studio failed", exc_info=error)
        status = reported.status if isinstance(reported, Refused) else 400
        if not self.visitor.principal.can("operate"):  # hide the server's paths from others
            reported = VeneerError(message_of(reported))
        self.error.show(error=reported, title="Error" if isinstance(error, VeneerError) else "Internal error")
        return status


def _parse_answer(event: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return a route's JSON and its error message ("" if there is none)."""
    try:
        answer = json.loads(event["text"])
    except (ValueError, RecursionError):
        answer = {}
    error = answer.get("error") if isinstance(answer, dict) else None
    return answer, str(error.get("message") or "") if isinstance(error, dict) else ""


def _search_objects(page: ViewPage, text: str, words: list[str]) -> list[dict[str, str]]:
    """Return the visible adapters, runs and routes that match a search.

    Each has `title`, `kind` and `to` (a link)."""
    studio, principal = page.studio, page.principal
    visible = None if principal.can("operate") else principal.can_see
    versions = studio.library.browse(text, can_access=visible, limit=_HITS).versions
    results = [(v.reference, "adapter", page.link("adapter", ref=v.reference)) for v in versions]
    jobs = studio.jobs.jobs(principal.owner, limit=100)[0] if principal.can("train") else []
    matching = [job for job in jobs if _matches(f"{job.name} {job.id}", words)][:_HITS]
    results += [(job.name or job.id, f"run · {job.state}", page.link("run", job=job.id)) for job in matching]
    if studio.tenants is not None and principal.can("operate"):
        routes = [each.name for each in studio.tenants.settings.routes.values() if _matches(each.name, words)]
        results += [(name, "route", page.link("live", route=name)) for name in routes[:_HITS]]
    return [{"title": title, "kind": kind, "to": to} for title, kind, to in results]


def short_path(path: str) -> str:
    """Return a server path with ~ for the home folder."""
    home = str(Path.home())
    return f"~{path[len(home) :]}" if path == home or path.startswith(home + "/") else path


def _matches(name: str, words: list[str]) -> bool:
    return all(word in name.lower() for word in words)


async def _draw_loading(page: ViewPage) -> None:
    """Draw a notice until the base is loaded, then draw the view."""
    service = page.studio.service
    page.title(page.view.title)
    with box("div", "empty"):
        elements.heading(page.studio.loading)
        status = line("", "soft", role="status")
        line("This view opens once the base is loaded. Library, Train and Doctor work meanwhile.")

    def show_step() -> None:
        seconds = counted(round(time.monotonic() - service.began), "second")
        step = f"{service.step} " if service.step and page.principal.can("operate") else ""  # can contain paths
        elements.set_text(status, f"{step}({seconds} since the start)")

    show_step()
    ui.timer(1.0, show_step)
    page.when_loaded(page.reload)


async def _not_found(page: ViewPage) -> None:
    raise NotFound("Not found.")


def _draw_not_found(page: ViewPage, error: VeneerError) -> None:
    page.title("Not found")
    line("This page does not exist, or you do not have access.", "lede")
    if error.fix and page.principal.can("operate"):
        line(error.fix, "soft")
    elements.link("Back to library", page.link(""), "button quiet")
