"""Chromium before a server with a Studio: `make test-browser`.

    def test_x(window: Window) -> None:
        window.at("?q=tone")                   opens the view, and waits until it is alive
        window.page.keyboard.press("j")        Playwright's page

Whatever a page asks of another host, writes to its console as an error, or throws, fails the test.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from sqlalchemy import Engine, insert

from tests.serve.saved_adapters import saved
from tests.studio.conftest import HOSTILE, Served
from tests.studio.lessons import parcel_rows, told_lesson
from tests.tiny_base import tiny_base_dir
from veneer.jobs.store import JobStore
from veneer.library import index as ix
from veneer.library.library import open_library
from veneer.models.home import bases_home
from veneer.models.text.base import load_text
from veneer.serve.tenancy import routes
from veneer.serve.tenancy.store import Store

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is in the extra `browser`")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60_000
"""Milliseconds that whatever should come is waited for."""
SMOLLM2 = bases_home() / "smollm2-135m"
"""Where the user has it; tests have a home of their own."""
LONG = "a-name-that-somebody-gave-who-never-thought-of-those-that-would-have-to-read-it-on-a-telephone"
ROUTE = LONG.replace("name", "route", 1)
SAMPLE = {"prompt": "I was charged twice.", "base": "I am sorry to hear that.", "adapter": '{"team": "billing"}'}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and a library with adapters as people have them, and as nobody should."""
    folder = tmp_path_factory.mktemp("browser")
    base_dir = tiny_base_dir(folder)
    base = load_text(str(base_dir))
    gain = {"validation_loss_before": 2.1, "validation_loss": 0.84}
    cards: dict[str, dict[str, Any]] = {
        "support": {"metrics": gain, "extra": {"sample": SAMPLE}},
        "acme/tone": {"trigger_words": [HOSTILE, "polite"], "licence": HOSTILE},
        LONG: {"extra": {"sample": {"prompt": HOSTILE, "base": HOSTILE * 20, "adapter": "x" * 3000}}},
    }
    with open_library(folder / "library") as library:
        for seed, (name, card) in enumerate(cards.items()):
            saved(base, folder / str(seed), seed, **card)
            library.add(folder / str(seed), name, tags=["tickets"] if seed else [])
        saved(base, folder / "again", 9, **cards["support"])
        library.add(folder / "again", "support")
        library.alias("support@1", "prod")
    return base_dir, folder / "library"


@pytest.fixture(scope="session")
def served(kept: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Open to whoever is on this machine, with a route of a long name."""
    folder = tmp_path_factory.mktemp("server")
    with Served(folder, *kept, "--open", "--tenants", str(folder / "tenants.sqlite")) as server:
        with closing(Store(str(folder / "tenants.sqlite"))) as store:
            for targets in ([("support@2", 1)], [("support@2", 90), (f"{LONG}@1", 10)]):
                routes.set_route(store, ROUTE, targets, who="test")
        yield server


@pytest.fixture(scope="session")
def lesson(served: Served, kept: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job that has told of two steps; nobody trains it."""
    with open_library(served.library) as library:
        rows = parcel_rows(tmp_path_factory.mktemp("lesson"))
        return told_lesson(JobStore(library), kept[0], rows, served.home).id


@pytest.fixture(scope="session")
def training(kept: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server as `veneer studio` begins it: open, with routes and jobs. Its library is its own."""
    folder = tmp_path_factory.mktemp("training")
    shutil.copytree(kept[1], folder / "library")
    more = ("--open", "--tenants", str(folder / "tenants.sqlite"), "--train")
    with Served(folder, kept[0], folder / "library", *more) as server:
        yield server


@pytest.fixture(scope="session")
def many(kept: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server over a library with ten thousand more."""
    folder = tmp_path_factory.mktemp("many")
    shutil.copytree(kept[1], folder / "library")
    with open_library(folder / "library") as library:
        known = library.find("support@1")
        crowd(library.engine, known.entry, [f"style-{n}" for n in range(10_000)])
    with Served(folder, kept[0], folder / "library") as server:
        yield server


def crowd(engine: Engine, entry: str, names: list[str]) -> None:
    """Names for one content, as `Library.add` would have given them one by one."""
    with ix.index_transaction(engine) as connection:
        connection.execute(insert(ix.names), [{"name": n, "latest": 1, "next": 2} for n in names])
        added = [
            {"name": n, "version": 1, "entry": entry, "added": "2026-01-01T00:00:00Z", "source": ""} for n in names
        ]
        connection.execute(insert(ix.versions), added)
        ix.changed(connection)


_FOCUSED = """() => {
  const at = document.activeElement;
  const label = at.closest("label")?.querySelector(".name")?.textContent;
  return (at.getAttribute("aria-label") || label || at.textContent).trim();
}"""


@dataclass
class Window:
    """A page of Chromium's before a server, and what went wrong on it."""

    page: Any
    address: str
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.wrong.append(f"thrown: {error}"))
        self.page.on("console", lambda said: said.type == "error" and self.wrong.append(f"console: {said.text}"))
        self.page.on("dialog", self._called)
        self.page.route("**/*", self._guard)

    def _called(self, dialog: Any) -> None:
        self.wrong.append(f"a script of somebody's ran: {dialog.message}")
        dialog.dismiss()

    def _guard(self, route: Any) -> None:
        if route.request.url.startswith(("data:", "blob:")) or urlsplit(route.request.url).netloc == self.place:
            route.continue_()
        else:
            self.wrong.append(f"asked of another host: {route.request.url}")
            route.abort()

    @property
    def place(self) -> str:
        return urlsplit(self.address).netloc

    def at(self, path: str = "", *, there: bool = True) -> Window:
        """Open a view, and wait until its programs are there."""
        self.page.goto(f"{self.address}/studio/{path}")
        self.page.wait_for_function("window.did_handshake === true && document.querySelector('.view h1')")
        if not there:  # the browser says on its console that the page was a 404
            self.wrong = [line for line in self.wrong if "404" not in line]
        return self

    def until(self, words: str) -> None:
        """Until these words can be seen."""
        self.page.get_by_text(words).first.wait_for(timeout=PATIENCE)

    def heading(self, words: str) -> None:
        self.page.wait_for_function("words => document.querySelector('h1')?.textContent === words", arg=words)

    def tab_to(self, name: str) -> None:
        """By the Tab key, to what is called so."""
        for _ in range(100):
            self.page.keyboard.press("Tab")
            if self.page.evaluate(_FOCUSED) == name:
                return
        raise AssertionError(f"the Tab key does not lead to {name}")

    def sound(self) -> None:
        """axe finds nothing serious, and nothing is wider than the window."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(pytest.importorskip("axe_playwright_python.base").AXE_SCRIPT)
        found = self.page.evaluate("axe.run()")["violations"]
        bad = [
            f"{v['id']}: {v['help']}: {[n['html'][:200] for n in v['nodes'][:3]]}"
            for v in found
            if v["impact"] in ("serious", "critical")
        ]
        assert not bad, "\n".join(bad)
        wide = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{wide} pixels are cut off"


@contextmanager
def seen_in(chromium: Any, address: str, width: int = 1280, **options: Any) -> Iterator[Window]:
    """A browser of its own, with nothing of anybody's, before a server."""
    context = chromium.new_context(viewport={"width": width, "height": 800}, **options)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    made = Window(context.new_page(), address)
    made.page.set_default_timeout(PATIENCE)
    try:
        yield made
    finally:
        context.close()
    assert not made.wrong, made.wrong


@pytest.fixture
def window(chromium: Any, served: Served) -> Iterator[Window]:
    with seen_in(chromium, served.address) as made:
        yield made


@dataclass
class Spent:
    """Seconds of a block by the clock, and by the processors: of the latter what servers and browsers took, so that
    it says the same whoever else computes here."""

    clock: float = 0.0
    processors: float = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        began, took = time.perf_counter(), _taken()
        yield
        self.clock, self.processors = time.perf_counter() - began, _taken() - took

    @staticmethod
    def least(many: list[Spent]) -> Spent:
        """The least of each."""
        return Spent(min(each.clock for each in many), min(each.processors for each in many))

    def within(self, seconds: float, more: Spent | None = None) -> bool:
        """Whether it took no more than so many beyond `more`. On a machine of its own what waits for nobody takes by
        the clock at most what it takes of processors; so either will do."""
        more = more or Spent()
        return self.clock < more.clock + seconds or self.processors < more.processors + seconds


def _taken() -> float:
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total
