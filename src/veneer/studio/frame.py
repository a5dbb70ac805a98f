"""The page round every view, and how a view is written.

A view is an async function in a file of its own, at most 400 lines, that draws into the page it is given:

    async def compare_view(page: ViewPage) -> None:
        prompt = page.query.get("p")                       what the link says: get, all, number
        page.title("Compare", "One prompt, several adapters.")
        asked = form_field("Prompt", prompt, permit("read", typed), kind="area", entered=permit("infer", ask), key="p")
        answers = Fragment("answers.html.j2", acts={"vote": permit("feedback", vote)}, answers=[])
        Command(command("generate", prompt))
        page.task(ask())                                   goes on beside the page; ends when it is left

and a row of `views` in build.py: path, title, shortcut letter after `g`, and required permission.

    parts         parts.py alone (`box`, `line`, `button`, `form_field`, `Fragment`, `dialog`, `confirm` …): never
                  `ui.…`, `.props(`, `.style(`, `run_javascript` in a view; a test holds that
    principal     `page.caller`, determined again before each handler. Query jobs by `page.caller.owner` (None for
                  all tenants). An object that is not visible raises `NothingHere`, with the same message as an
                  object that does not exist
    slow things   `await asyncio.to_thread(function, …)`. Draw first, then await: after one second the page goes out as
                  far as it is, and the rest is drawn when it comes
    state         none but the link: `page.keep(q="sty")` changes it without a load (None or "" takes a key out);
                  everything else is read from the library, the jobs, the tenants
    other views   `link("Compare", page.link("compare", c=["a@1", "b@2"]))`; `await page.go("run", job=id)` in a handler
    dropped files `page.drops(words, to, done)` where they are not for the library; `page.pick()` opens the window
    made files    `page.fetch(url, done)`: a download that may fail
    lists         `data-step` on what j and k go through, `data-own="x"` on the button of a card that a letter presses
                  while that card has the focus, `data-id` on what goes on being the same when all is drawn anew: each
                  of many, and whatever can be chosen
    bytes         (img, downloads, uploads) `page.api("/v1/…")`: a route of the API under the same caller, never a path
    errors        raise: a VeneerError is shown as what · where · fix, anything else as an internal error
    changes       `on_change(mark, 1.0, refill)` (watch.py) where others may write what is shown. `refill` changes what
                  is another and draws nothing else: elements that somebody may be about to click stay, by `show`, `put`
                  and `Fragment.show`; never `clear()`
    commands      `Command(command("library", "alias", ref, name))` (commands.py): what does the same
    success       `page.say("support@2 is prod now")`, once, at an end
    looks         studio.css; its classes are listed at its top
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
"""Seconds after which a page goes out as far as it is drawn."""
_LOADING = 0.5
"""Seconds between two looks at a base that is loading."""


class NothingHere(VeneerError):
    """Raised for what is not there and for what whoever looks does not see: nobody can tell which."""


@dataclass(frozen=True)
class StudioView:
    """`path`: after /studio/. `key`: the letter after g; "": it is not in the list of views, where it stands `under`
    another. `draw`: draws the view. `needs`: the permission; without it, the view is not found. `uses_base`: while the
    base is loading, the view says so instead of being drawn."""

    path: str
    title: str
    key: str
    draw: Callable[[ViewPage], Awaitable[None]]
    needs: Permission
    under: str | None = None
    uses_base: bool = False


@dataclass(frozen=True, eq=False)
class Studio:
    """What all pages of one server work with. `jobs`: the queue, whether or not this server trains (`trains`). `finds`:
    what one field for everything finds (finder.py). `queue`: trains on uploaded rows, if this server can."""

    service: Service
    library: Library
    jobs: JobStore
    views: Sequence[StudioView]
    finds: Callable[[ViewPage, str], Awaitable[list[dict[str, str]]]]
    trains: bool = False
    queue: TuningQueue | None = None

    @property
    def base(self) -> str:
        """What the base is called."""
        return self.service.catalog.base

    @property
    def tenants(self) -> Store | None:
        """The tenants' database, where there is one: routes, votes and costs."""
        tenancy = self.service.tenancy
        return tenancy.store if isinstance(tenancy, Tenants) else None

    @property
    def loading(self) -> str:
        """Why nothing can be asked yet; "" once the base is loaded."""
        return "" if self.service.loaded else f"{self.base} is still loading"

    def library_mark(self) -> object:
        """Another object whenever names of the library may have changed."""
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
        """What a file would be called in the library, in a tenant's own namespace."""
        own = f"{self.caller.tenant}/" if self.caller.tenant else ""
        return own + (likely_name(filename.rpartition(".")[0] or filename) or "adapter")

    # -- links

    def link(self, view: str, **query: Any) -> str:
        """To a view; values are texts, numbers or lists of them; None and "" are left out."""
        return self._to(view, query)

    def api(self, path: str, **query: Any) -> str:
        """A route of the API for an img, a download or an upload: under the same caller."""
        return self._to(f"api{path}", query)

    def _to(self, path: str, query: Mapping[str, Any]) -> str:
        said = urlencode(query_pairs(query))
        return f"{self.frame.root}/{path}" + (f"?{said}" if said else "")

    def keep(self, **query: Any) -> None:
        """The link of this page says this too, from now on; nothing is loaded."""
        rest = [(k, v) for k, v in self.query.pairs if k not in query]
        self.query = Query((*rest, *query_pairs(query)))
        if self.frame.page is self:
            self.frame.tell("keep", f"{self.frame.root}/{self.view.path}", urlencode(self.query.pairs))

    async def go(self, view: str, **query: Any) -> None:
        """To another view, as a link would."""
        to = self.link(view, **query)
        self.frame.tell("went", to)
        await self.frame.visit(view, Query(tuple(query_pairs(query))))

    # -- what it says

    def title(self, title: str, lede: str = "") -> None:
        """The view's heading, and what it is for in one line."""
        parts.heading(title, 1)
        if lede:
            parts.line(lede, "lede")
        self.frame.called(title)

    async def again(self) -> None:
        """Draw the view anew, as its link says now."""
        await self.frame.visit(self.view.path, self.query)

    def pick(self) -> None:
        """The browser's window for files; what is picked is as if it were dropped."""
        self.frame.tell("pick")

    def drops(
        self,
        words: str,
        to: Callable[[str], str],
        done: Callable[[dict[str, Any]], Any],
        form: Mapping[str, str] | None = None,
    ) -> None:
        """What becomes of files that are dropped on this view, instead of the library's. `words`: said over the page
        meanwhile. `to(filename)`: where it is posted, made by `api`. `done(answer)`: with that route's JSON. `form`:
        fields that are posted with the file."""
        self.frame.files.take(words, to, done, form)

    def fetch(self, url: str, done: Callable[[str], Any]) -> None:
        """Download what a route (made by `api`) makes when it is asked. `done`: with "", or with why there is none."""
        self.frame.files.fetch(url, done)

    def say(self, text: str) -> None:
        """A few words at the foot of the page, told also to who hears it. At an end, never for each step."""
        self.frame.say(text)

    def task(self, does: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Goes on beside the page, drawing where it began; ends at the latest when the view is left."""
        slot = ui.context.slot
        task = background_tasks.create(does, name=f"studio {self.view.path}", context=slot)
        self.tasks.append(task)
        task.add_done_callback(lambda done: self.tasks.remove(done) if done in self.tasks else None)
        return task

    def when_loaded(self, does: Callable[[], Any]) -> None:
        """Call `does` once the base is loaded, unless the base is loaded already or the view is left before."""

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
    """What only the browser can do: its address, keys, copying, light and dark, what is dropped on it."""


class Frame:
    """The page round the views of one browser's window: nav, errors, keys. One view at a time is in it."""

    def __init__(self, studio: Studio, visitor: Visitor, root: str, address: str) -> None:
        """`address`: of this server, as the browser has it."""
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
        """Draw the view of a path in place of the one that is there. Returns what HTTP says of it."""
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
        if before:  # what is there stays until there is something to see
            parts.show(place, False)

        async def draw() -> int:
            try:
                await draw_view(page)
            except (NothingHere, NotInLibrary) as error:
                place.clear()
                _not_here(page, error)
                return 404
            except Exception as error:  # whatever it is, the page goes out, and says so
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
        """The browser is at another address: a link of ours, back or forward."""
        path, _, said = str(to).partition("?")
        await self.visit(path.removeprefix(self.root).strip("/"), query_of(parse_qsl(said)))

    def leave(self) -> None:
        if self.page is not None:
            self.page.left()

    async def _sought(self, text: str) -> None:
        if self.page is not None:
            self.tell("found", text, await self.studio.finds(self.page, str(text)))

    def _take_adapters(self, page: ViewPage) -> None:
        """Whatever the view: a file that is dropped is kept in the library."""

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
        """One of the few things that only the browser can do: browser.js has them."""
        if self.client.has_socket_connection:
            self.browser.run_method(what, *given)

    def _well(self) -> None:
        self.trouble.show(error=None, title="")

    def wrong(self, error: Exception) -> int:
        """What a view, a handler or a task raised, in words. Of what nobody foresaw the log has the rest. Returns what
        HTTP says of it."""
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
    """Draw what a view shows while the base is loading, and the view itself afterwards."""
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
