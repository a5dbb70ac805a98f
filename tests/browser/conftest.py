"""Chromium in front of a server with a Studio: `make test-browser`.

    def test_x(window: Window) -> None:
        window.open("?q=tone")                 opens the view, and waits until its scripts run
        window.page.keyboard.press("j")        `page` is Playwright's page

A request to another host, a console error or an exception on the page fails the test.
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
from sqlalchemy import insert

from tests.serve.saved_adapters import saved
from tests.studio.conftest import HOSTILE, StudioServer
from tests.studio.recorded_jobs import parcel_rows, recorded_job
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
TIMEOUT = 60_000
"""Milliseconds to wait for an element."""
SMOLLM2 = bases_home() / "smollm2-135m"
"""The copy of this base in the user's home, because tests have a separate, empty home."""
LONG = "a-name-that-somebody-gave-who-never-thought-of-those-that-would-have-to-read-it-on-a-telephone"
ROUTE = LONG.replace("name", "route", 1)
SAMPLE = {"prompt": "I was charged twice.", "base": "I am sorry to hear that.", "adapter": '{"team": "billing"}'}
ANSWERED = "n => document.querySelectorAll('.spoken .chip').length >= n"
"""JavaScript function: whether finished completions have at least n buttons."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def tiny_library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a base, and a library with ordinary and hostile adapters."""
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
def server(tiny_library: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    """Start a server without sign-in, with a route that has a long name."""
    folder = tmp_path_factory.mktemp("server")
    with StudioServer(folder, *tiny_library, "--open", "--tenants", str(folder / "tenants.sqlite")) as server:
        with closing(Store(str(folder / "tenants.sqlite"))) as store:
            for targets in ([("support@2", 1)], [("support@2", 90), (f"{LONG}@1", 10)]):
                routes.set_route(store, ROUTE, targets, actor="test")
        yield server


@pytest.fixture
def store(server: StudioServer) -> Iterator[Store]:
    """Open the server's store, and reset the route at the end of the test."""
    with closing(Store(str(server.home / "tenants.sqlite"))) as found:
        yield found
        routes.set_route(found, ROUTE, [("support@2", 90), (f"{LONG}@1", 10)], actor="test")


@pytest.fixture(scope="session")
def job(server: StudioServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Create a job with two recorded steps; no process trains it."""
    with open_library(server.library) as library:
        rows = parcel_rows(tmp_path_factory.mktemp("job"))
        return recorded_job(JobStore(library), server.base, rows, server.home).id


@pytest.fixture(scope="session")
def trainer(tiny_library: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    """Start a server like `veneer studio`: no sign-in, with routes, jobs and its own library."""
    folder = tmp_path_factory.mktemp("trainer")
    shutil.copytree(tiny_library[1], folder / "library")
    options = ("--open", "--tenants", str(folder / "tenants.sqlite"), "--train")
    with StudioServer(folder, tiny_library[0], folder / "library", *options) as server:
        yield server


@pytest.fixture(scope="session")
def crowded(tiny_library: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[StudioServer]:
    """Start a server whose library has ten thousand more names, all for the same adapter."""
    folder = tmp_path_factory.mktemp("crowded")
    shutil.copytree(tiny_library[1], folder / "library")
    names = [f"style-{n}" for n in range(10_000)]
    with open_library(folder / "library") as library:
        version = {"version": 1, "entry": library.find("support@1").entry, "added": "2026-01-01T00:00:00Z"}
        with ix.index_transaction(library.engine) as connection:
            connection.execute(insert(ix.names), [{"name": name, "latest": 1, "next": 2} for name in names])
            connection.execute(insert(ix.versions), [version | {"name": name, "source": ""} for name in names])
            ix.announce_changes(connection)
    with StudioServer(folder, tiny_library[0], folder / "library") as server:
        yield server


_FOCUSED = """() => {
  const at = document.activeElement;
  const label = at.closest("label")?.querySelector(".name")?.textContent;
  return (at.getAttribute("aria-label") || label || at.textContent).trim();
}"""


@dataclass
class Window:
    """A Chromium page at a server. `errors`: the page's errors and its forbidden requests."""

    page: Any
    address: str
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(f"exception: {error}"))
        self.page.on("console", lambda m: m.type == "error" and self.errors.append(f"console: {m.text}"))
        self.page.on("dialog", self._script_ran)
        self.page.route("**/*", self._guard)

    def _script_ran(self, dialog: Any) -> None:
        self.errors.append(f"a hostile script ran: {dialog.message}")
        dialog.dismiss()

    def _guard(self, route: Any) -> None:
        own = urlsplit(route.request.url).netloc == urlsplit(self.address).netloc
        if own or route.request.url.startswith(("data:", "blob:")):
            route.continue_()
        else:
            self.errors.append(f"request to another host: {route.request.url}")
            route.abort()

    def open(self, path: str = "", *, status: str = "") -> Window:
        """Open a view, and wait until its scripts run. `status`: HTTP error status that is expected."""
        self.page.goto(f"{self.address}/studio/{path}")
        self.page.wait_for_function("window.did_handshake === true && document.querySelector('.view h1')")
        if status:
            self.ignore(status)
        return self

    def ignore(self, status: str) -> None:
        """Remove the errors that contain this HTTP status."""
        self.errors[:] = [line for line in self.errors if status not in line]

    def until(self, words: str) -> None:
        """Wait until these words are visible."""
        self.page.get_by_text(words).first.wait_for(timeout=TIMEOUT)

    def has_value(self, field: Any, value: str) -> None:
        playwright.expect(field).to_have_value(value, timeout=TIMEOUT)

    def heading(self, words: str) -> None:
        self.page.wait_for_function("words => document.querySelector('h1')?.textContent === words", arg=words)

    def press(self, name: str, **options: Any) -> None:
        """Click the first button with exactly this name."""
        self.page.get_by_role("button", name=name, exact=True).first.click(**options)

    def confirm(self, name: str) -> None:
        """Click the button with exactly this name in the open dialog."""
        self.page.locator("dialog[open]").get_by_role("button", name=name, exact=True).click()

    def keys(self, *names: str) -> None:
        for name in names:
            self.page.keyboard.press(name)

    def tab_to(self, name: str) -> None:
        """Press Tab until the element with exactly this name has the focus."""
        for _ in range(100):
            self.page.keyboard.press("Tab")
            if self.page.evaluate(_FOCUSED) == name:
                return
        raise AssertionError(f"the Tab key does not lead to {name}")

    def no_overflow(self) -> None:
        width = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert width <= 0, f"{width} pixels are cut off"

    def accessible(self) -> None:
        """Assert that axe finds no serious problem, and that nothing is wider than the window."""
        if not self.page.evaluate("'axe' in window"):
            self.page.evaluate(pytest.importorskip("axe_playwright_python.base").AXE_SCRIPT)
        found = [v for v in self.page.evaluate("axe.run()")["violations"] if v["impact"] in ("serious", "critical")]
        bad = [f"{v['id']}: {v['help']}: {[n['html'][:200] for n in v['nodes'][:3]]}" for v in found]
        assert not bad, "\n".join(bad)
        self.no_overflow()


@contextmanager
def new_window(chromium: Any, address: str, width: int = 1280) -> Iterator[Window]:
    """Open a window with a separate browser profile; at the end, assert that it had no errors."""
    context = chromium.new_context(viewport={"width": width, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    window = Window(context.new_page(), address)
    window.page.set_default_timeout(TIMEOUT)
    try:
        yield window
    finally:
        context.close()
    assert not window.errors, window.errors


@pytest.fixture
def window(chromium: Any, server: StudioServer) -> Iterator[Window]:
    with new_window(chromium, server.address) as made:
        yield made


@dataclass
class Spent:
    """Seconds that a block takes: of wall-clock time, and of processor time of servers and browsers.

    Other load on the machine does not change the processor time."""

    clock: float = 0.0
    processors: float = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        began, used = time.perf_counter(), _processor_seconds()
        yield
        self.clock, self.processors = time.perf_counter() - began, _processor_seconds() - used

    @staticmethod
    def least(many: list[Spent]) -> Spent:
        return Spent(min(each.clock for each in many), min(each.processors for each in many))

    def within(self, seconds: float, more: Spent | None = None) -> bool:
        """Return whether the wall-clock or processor time is below `more` plus `seconds`."""
        more = more or Spent()
        return self.clock < more.clock + seconds or self.processors < more.processors + seconds


def _processor_seconds() -> float:
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            total += sum(process.cpu_times()[:2])
    return total
