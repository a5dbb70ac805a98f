"""Screenshots of every view of the Studio, light and dark, wide and narrow.

Also writes a strip of screenshots that follow a new user from an empty library to a canary route.

    python benchmarks/studio_pictures.py docs/images

Takes about half an hour on two cores, because it trains on the quickstart's tickets and on an image style.
Existing results in `--home` are reused, so it is quick to take a few screenshots again, e.g. with
`--views live`. Writes studio/library-light-1280.webp and so on, and studio-strip.webp."""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from PIL import Image, ImageOps

from veneer.models.home import bases_home

TEXTS, IMAGES = "smollm2-135m", "catalogue-flux"
"""The bases for text and for images."""
PROMPT = "a {} on a white table, white wall, soft daylight, front view"
THINGS = (
    "red apple", "yellow rubber duck", "blue rocket", "red umbrella", "white toy house", "brown boot", "red mushroom",
    "green jar", "grey padlock", "teal teapot", "yellow watering can", "black top hat",
)  # fmt: skip
SIZES = {1280: 860, 390: 844}
STRIP = {"width": 960, "height": 620}
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TICKET = (
    "The bolt of my front door lock stays half out since the last update, and I cannot close the door. Please help!"
)
STYLE = (
    f"base={IMAGES}",
    "data.pictures=prints",
    "adapter.rank=8",
    "schedule.steps=200",
    "optimizer.learning_rate=0.001",
    "loss.guidance=3",
    "loss.keep_guidance=2",
    "samples.every=100",
    f"samples.prompts={json.dumps([PROMPT.format(thing) for thing in ('vase', 'camera')])}",
    "output=runs/ink",
)
"""Settings of the run that trains the style, with the loss settings of docs/how-to/train-images.md."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Screenshots of the Studio's views.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--home", type=Path, default=Path("runs/studio-pictures"), help="keeps what was trained")
    parser.add_argument("--views", nargs="*", help="only these views")
    args = parser.parse_args(argv)
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    home = Home(args.home.resolve())
    (args.output / "studio").mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        screens = Screens(browser, args.output / "studio", set(args.views or ()))
        with home.server(IMAGES, "drawing") as address:
            home.once("style", lambda: train_style(home, address))
            if screens.any("pictures"):
                screens.take(address, image_views(home, address))
        stops: list[bytes] = []
        if not home.done("strip"):
            with home.server(TEXTS, "empty") as address:
                stops += first_stops(browser, address)
        with home.server(TEXTS, "writing") as address:
            if stops:
                stops += later_stops(browser, address, home.jobs("writing"))
                write_strip(stops, args.output / "studio-strip.webp")
                home.mark("strip")
            home.once("busy", lambda: add_use(home, address))
            screens.take(address, text_views(home))
        browser.close()


# -- servers and their content -----------------------------------------------------------------------------------------


class Home:
    """A separate home and working directory, so that screenshots show no path of this machine."""

    def __init__(self, home: Path) -> None:
        self.home, self.work = home, home / "veneer"
        if not self.work.exists():
            shutil.copytree(EXAMPLES / "tickets", self.work / "examples" / "tickets")

    def done(self, name: str) -> bool:
        return (self.home / f".{name}").exists()

    def mark(self, name: str) -> None:
        (self.home / f".{name}").touch()

    def once(self, name: str, work: Callable[[], None]) -> None:
        if not self.done(name):
            work()
            self.mark(name)

    def environment(self, name: str) -> dict[str, str]:
        own = self.home / name
        (own / "bases").mkdir(parents=True, exist_ok=True)
        for base in bases_home().glob("*/"):
            if not (own / "bases" / base.name).exists():
                (own / "bases" / base.name).symlink_to(base)
        return os.environ | {"VENEER_HOME": str(own), "HOME": str(self.home)}

    def run(self, name: str, *words: str) -> str:
        """Run a veneer command with the home `name`, and return its output."""
        command, env = (
            [sys.executable, "-c", "from veneer.cli.main import main; main()", *words],
            self.environment(name),
        )
        return subprocess.run(command, cwd=self.work, env=env, check=True, text=True, stdout=subprocess.PIPE).stdout

    def jobs(self, name: str) -> list[dict[str, Any]]:
        """Return the jobs of the home `name`, newest first."""
        found: list[dict[str, Any]] = json.loads(self.run(name, "jobs", "list", "--json"))["jobs"]
        return found

    @contextmanager
    def server(self, base: str, name: str) -> Iterator[str]:
        """Run a server with the home `name`; when it is ready, yield its address."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-c", "from veneer.cli.main import main; main()", "studio", "--base", base]
        command += ["--port", str(port), "--no-browser"]
        address, log = f"http://127.0.0.1:{port}", self.home / f"{name}.log"
        with log.open("w") as file:
            env = self.environment(name)
            process = subprocess.Popen(command, cwd=self.work, env=env, stdout=file, stderr=file)
        try:
            wait(lambda: process.poll() is not None or answers(f"{address}/ready"), 600)
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            yield address
        finally:
            process.terminate()
            process.wait()


def wait(ready: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            raise SystemExit("timeout")
        time.sleep(0.5)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def post(address: str, path: str, body: Mapping[str, Any]) -> Any:
    answer = httpx.post(f"{address}{path}", json=body, timeout=600)
    answer.raise_for_status()
    return answer.json()


def train_style(home: Home, address: str) -> None:
    """Train an adapter on generated images that are recolored as dark blue prints.

    The captions are the base's prompts without the colors."""
    folder = home.work / "prints"
    folder.mkdir(exist_ok=True)
    for n, thing in enumerate(THINGS):
        body = {"prompt": PROMPT.format(thing), "seed": n, "response_format": "b64_json"}
        data = base64.b64decode(post(address, "/v1/images/generations", body)["data"][0]["b64_json"])
        gray = ImageOps.autocontrast(ImageOps.grayscale(Image.open(io.BytesIO(data)).convert("RGB")))
        ImageOps.colorize(gray, "#123a7a", "#f4ead6").save(folder / f"{thing.replace(' ', '-')}.png")
        (folder / f"{thing.replace(' ', '-')}.txt").write_text(PROMPT.format(thing.partition(" ")[2]))
    submitted = home.run("drawing", "jobs", "submit", *STYLE, "checkpoint.adapters=true", "checkpoint.every=50")
    home.run("drawing", "jobs", "watch", submitted.split()[0])
    file = httpx.get(f"{address}/v1/adapter_files/ink", params={"to": "kohya"}, timeout=600)
    (home.work / "ink.safetensors").write_bytes(file.content)


def first_stops(browser: Any, address: str) -> list[bytes]:
    """Return the screenshots of a new user's path before the run."""
    page = open_page(browser.new_context(viewport=STRIP, color_scheme="light"), f"{address}/studio/")
    stops = [stop(page)]
    page.get_by_role("link", name="Train on").click()
    previewed(page)
    stops.append(stop(page))
    page.context.close()
    return stops


def later_stops(browser: Any, address: str, jobs: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """Return the screenshots of a new user's path from the run on.

    If an earlier call has started the run, it is used again."""
    page = open_page(browser.new_context(viewport=STRIP, color_scheme="light"), f"{address}/studio/")
    if jobs:
        page = open_page(page.context, f"{address}/studio/run?job={jobs[-1]['id']}")
    else:
        page.get_by_role("link", name="Train on").click()
        previewed(page)
        page.get_by_role("button", name="Start", exact=True).click()
    adapter = page.get_by_role("link", name="Open ")
    adapter.wait_for(timeout=7_200_000)
    run, stops = page.url, [stop(page)]
    page.get_by_role("link", name="Compare checkpoints").click()
    page.locator("section.column").nth(2).wait_for()
    press("Ask", 6)(page)
    stops.append(stop(page))
    open_page(page.context, run, page)
    adapter.click()
    page.get_by_role("link", name="Go live").click()
    page.get_by_role("button", name="Create route").wait_for()
    stops.append(stop(page))
    page.get_by_role("button", name="Create route").click()
    page.get_by_role("link", name="Try in Compare").wait_for()
    page.evaluate("scrollTo(0, 0)")
    stops.append(stop(page))
    page.context.close()
    return stops


def stop(page: Any) -> bytes:
    page.wait_for_timeout(700)
    return bytes(page.screenshot())


def write_strip(stops: Sequence[bytes], path: Path) -> None:
    """Write the screenshots as an image with three per row, each in a thin frame."""
    wide, high, gap = STRIP["width"] * 3 // 5, STRIP["height"] * 3 // 5, 16
    rows = -(-len(stops) // 3)
    whole = Image.new("RGB", (3 * wide + 2 * gap, rows * high + (rows - 1) * gap), "white")
    for n, png in enumerate(stops):
        small = Image.open(io.BytesIO(png)).convert("RGB").resize((wide - 2, high - 2), Image.Resampling.LANCZOS)
        whole.paste(ImageOps.expand(small, 1, "#d8d2ca"), (n % 3 * (wide + gap), n // 3 * (high + gap)))
    whole.save(path, quality=80, method=6)
    print(path)


def add_use(home: Home, address: str) -> None:
    """Add a mix, a route with a shadow, and requests of several users."""
    models = httpx.get(f"{address}/v1/models").json()["data"]
    name = next(each["id"] for each in models if "@" not in each["id"] and each["id"] != TEXTS)
    home.run("writing", "library", "mix", f"{name}-softly", f"{name}@1:0.6")
    home.run("writing", "library", "tag", f"{name}@1", "tickets")
    home.run("writing", "library", "alias", f"{name}@1", "prod")
    home.run("writing", "library", "verify", f"{name}@1")
    shares = f"{TEXTS}=90", f"{name}@1=10"
    home.run("writing", "tenant", "route", "set", name, "--force", *shares, "--shadow", f"{name}-softly@1")
    time.sleep(3)
    rows = (EXAMPLES / "tickets" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    for n, row in enumerate(rows):
        messages = json.loads(row)["messages"][:-1]
        body = {"model": name, "messages": messages, "max_tokens": 24, "user": f"user-{n}"}
        post(address, "/v1/chat/completions", body)


# -- screenshots -------------------------------------------------------------------------------------------------------

View = tuple[str, Callable[[Any], None]]
"""Path of a page, and the action before its screenshot."""


def nothing(page: Any) -> None:
    pass


def press(name: str, count: int) -> Callable[[Any], None]:
    """Press Ask or Generate, and wait for `count` answers or images."""

    def act(page: Any) -> None:
        page.get_by_role("button", name=name, exact=True).click()
        done = ".spoken .row" if name == "Ask" else ".drawn img"
        page.locator(done).nth(count - 1).wait_for(timeout=1_200_000)

    return act


def previewed(page: Any) -> None:
    page.locator(".figures .number").first.wait_for(timeout=600_000)
    page.locator(".rows tr, .sheet li").nth(3).wait_for(timeout=600_000)


def text_views(home: Home) -> dict[str, View]:
    first = home.jobs("writing")[-1]
    job, name = first["id"], first["name"]
    system = "Route this Tarnhill ticket. Answer in JSON: team, priority, product_area."
    query = httpx.QueryParams([("c", f"{name}@1"), ("c", f"{name}@1:0.4"), ("p", TICKET), ("s", system), ("m", "48")])
    settings = (f"base={TEXTS}", "data.train=examples/tickets/train.jsonl", "adapter.rank=16", "schedule.steps=400")
    again = httpx.QueryParams([("s", setting) for setting in (*settings, "output=tickets-again")])

    def drop(page: Any) -> None:
        page.set_input_files("input[type=file]", str(home.work / "ink.safetensors"))
        page.get_by_role("heading", name="Other tools").wait_for(timeout=600_000)

    return {
        "library": ("", nothing),
        "adapter": (f"adapter?ref={name}@1", nothing),
        "compare": (f"compare?{query}", press("Ask", 3)),
        "train": (f"train?{again}", previewed),
        "run": (f"run?job={job}", nothing),
        "live": ("live", nothing),
        "doctor": ("doctor", drop),
    }


def image_views(home: Home, address: str) -> dict[str, View]:
    job = home.jobs("drawing")[-1]["id"]
    mixes = [("c", "ink@1:0.5"), ("c", "ink@1"), ("p", PROMPT.format("kettle")), ("n", 2)]
    settings = [("s", setting) for setting in STYLE]
    return {
        "pictures-library": ("", nothing),
        "pictures-compare": (f"compare?{httpx.QueryParams(mixes)}", press("Generate", 6)),
        "pictures-train": (f"train?{httpx.QueryParams(settings)}", previewed),
        "pictures-run": (f"run?job={job}", nothing),
    }


class Screens:
    """Takes screenshots. `only`: names of the views to take; if empty, all."""

    def __init__(self, browser: Any, folder: Path, only: set[str]) -> None:
        self.browser, self.folder, self.only = browser, folder, only

    def any(self, start: str) -> bool:
        return not self.only or any(name.startswith(start) for name in self.only)

    def take(self, address: str, views: Mapping[str, View]) -> None:
        for name, (path, act) in views.items():
            if self.only and name not in self.only:
                continue
            for width, height in SIZES.items():
                context = self.browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
                page = open_page(context, f"{address}/studio/{path}")
                act(page)
                for scheme in ("light", "dark"):
                    page.emulate_media(color_scheme=scheme)
                    page.wait_for_timeout(700)
                    write(page.screenshot(), self.folder / f"{name}-{scheme}-{width}.webp")
                context.close()


def open_page(context: Any, url: str, page: Any = None) -> Any:
    """Open a page, and wait until its scripts are running."""
    page = page or context.new_page()
    page.set_default_timeout(120_000)
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_function("window.did_handshake === true && !document.getElementById('shell')")
    return page


def write(png: bytes, path: Path) -> None:
    Image.open(io.BytesIO(png)).convert("RGB").save(path, quality=78, method=6)
    print(path)


if __name__ == "__main__":
    main()
