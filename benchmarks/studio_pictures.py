"""Pictures of every view of the Studio with something in it, light and dark, on a desk and on a telephone, and a strip
of a newcomer's way from an empty library to a canary, taken while a mouse goes it.

    python benchmarks/studio_pictures.py docs/images

About half an hour on two cores: it trains the quickstart's tickets and a style as somebody would, on the page. What
`--home` holds already is not made again, so that one picture more is quick: `--views live`. The names are
studio/library-light-1280.webp and studio-strip.webp.
"""

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

TEXTS = "smollm2-135m"
PICTURES, DRAWN = "catalogue-flux", "a {} on a white table, white wall, soft daylight, front view"
"""A base that draws, and how it is told what."""
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pictures of the Studio's views.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--home", type=Path, default=Path("runs/studio-pictures"), help="what was trained for them")
    parser.add_argument("--views", nargs="*", help="these alone")
    args = parser.parse_args(argv)
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    place = Place(args.home.resolve())
    (args.output / "studio").mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        shots = Shots(browser, args.output / "studio", set(args.views or ()))
        with place.server(PICTURES, "drawing") as address:
            if not place.done("style"):
                teach_a_style(place, address)
            if shots.any("pictures"):
                shots.all(address, picture_views(place, address))
        stops: list[bytes] = []
        if not place.done("strip"):
            with place.server(TEXTS, "empty") as address:
                stops += offer(browser, address)
        with place.server(TEXTS, "writing") as address:
            if stops:
                stops += way(browser, address, place.jobs("writing"))
                strip(stops, args.output / "studio-strip.webp")
                place.mark("strip")
            if not place.done("busy"):
                fill(place, address)
            shots.all(address, text_views(place))
        browser.close()


# -- servers and what is in them ---------------------------------------------------------------------------------------


class Place:
    """A home of its own with a folder as somebody works in it, so that no path of this machine is in a picture."""

    def __init__(self, home: Path) -> None:
        self.home, self.work = home, home / "veneer"
        if not self.work.exists():
            shutil.copytree(EXAMPLES / "tickets", self.work / "examples" / "tickets")

    def done(self, what: str) -> bool:
        return (self.home / f".{what}").exists()

    def mark(self, what: str) -> None:
        (self.home / f".{what}").touch()

    def environment(self, which: str) -> dict[str, str]:
        own = self.home / which
        (own / "bases").mkdir(parents=True, exist_ok=True)
        for base in bases_home().glob("*/"):
            if not (own / "bases" / base.name).exists():
                (own / "bases" / base.name).symlink_to(base)
        return os.environ | {"VENEER_HOME": str(own), "HOME": str(self.home)}

    def run(self, which: str, *words: str) -> str:
        """A command of veneer's, in this place."""
        given = [sys.executable, "-c", "from veneer.cli.main import main; main()", *words]
        return subprocess.run(
            given, cwd=self.work, env=self.environment(which), check=True, text=True, stdout=subprocess.PIPE
        ).stdout

    def jobs(self, which: str) -> list[dict[str, Any]]:
        """The newest first."""
        found: list[dict[str, Any]] = json.loads(self.run(which, "jobs", "list", "--json"))["jobs"]
        return found

    @contextmanager
    def server(self, base: str, which: str) -> Iterator[str]:
        """Its address, from when it answers on."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        given = [sys.executable, "-c", "from veneer.cli.main import main; main()", "studio", "--base", base]
        given += ["--port", str(port), "--no-browser"]
        address = f"http://127.0.0.1:{port}"
        with (self.home / f"{which}.log").open("w") as log:
            process = subprocess.Popen(given, cwd=self.work, env=self.environment(which), stdout=log, stderr=log)
        try:
            wait(lambda: process.poll() is not None or answers(f"{address}/ready"), 600)
            if process.poll() is not None:
                raise SystemExit((self.home / f"{which}.log").read_text())
            yield address
        finally:
            process.terminate()
            process.wait()


def wait(met: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not met():
        if time.monotonic() > until:
            raise SystemExit("it takes too long")
        time.sleep(0.5)


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


def asked(address: str, path: str, body: Mapping[str, Any]) -> Any:
    answer = httpx.post(f"{address}{path}", json=body, timeout=600)
    answer.raise_for_status()
    return answer.json()


def teach_a_style(place: Place, address: str) -> None:
    """A folder of pictures that the base drew, printed in dark blue ink on paper, and an adapter that learned to draw
    so. Captions say what is in them, in the base's words: there is no other colour any more."""
    folder = place.work / "prints"
    folder.mkdir(exist_ok=True)
    for n, thing in enumerate(THINGS):
        body = {"prompt": DRAWN.format(thing), "seed": n, "response_format": "b64_json"}
        drawn = base64.b64decode(asked(address, "/v1/images/generations", body)["data"][0]["b64_json"])
        grey = ImageOps.autocontrast(ImageOps.grayscale(Image.open(io.BytesIO(drawn)).convert("RGB")))
        ImageOps.colorize(grey, "#123a7a", "#f4ead6").save(folder / f"{thing.replace(' ', '-')}.png")
        (folder / f"{thing.replace(' ', '-')}.txt").write_text(DRAWN.format(thing.partition(" ")[2]))
    said = place.run("drawing", "jobs", "submit", STYLE, "checkpoint.adapters=true", "checkpoint.every=50")
    place.run("drawing", "jobs", "watch", said.split()[0])
    found = httpx.get(f"{address}/v1/adapters").json()["data"]
    file = httpx.get(f"{address}/v1/adapter_files/{found[0]['id']}", params={"to": "kohya"}, timeout=600)
    (place.work / "ink.safetensors").write_bytes(file.content)
    place.mark("style")


STYLE = f"teach {PICTURES} from folder prints, rank 8, 200 steps, learning rate 0.001, loss.guidance=3, "
STYLE += "loss.keep_guidance=2, sample every 100 steps, "
STYLE += "".join(f"sample '{DRAWN.format(thing)}', " for thing in ("vase", "camera")) + "call it ink"
"""Its losses are as docs/how-to/train-images.md has it of a look."""


def offer(browser: Any, address: str) -> list[bytes]:
    """The newcomer's way before anything is begun, with the mouse alone: a picture of each stop."""
    page = opened(browser.new_context(viewport=STRIP, color_scheme="light"), f"{address}/studio/")
    stops = [stop(page)]
    page.get_by_text("Teach it from", exact=False).click()
    looked(page)
    stops.append(stop(page))
    page.context.close()
    return stops


def way(browser: Any, address: str, begun: Sequence[Mapping[str, Any]]) -> list[bytes]:
    """The way again, and on from there, or from the run that an earlier call began."""
    page = opened(browser.new_context(viewport=STRIP, color_scheme="light"), f"{address}/studio/")
    if begun:
        page = opened(page.context, f"{address}/studio/run?job={begun[-1]['id']}")
    else:
        page.get_by_text("Teach it from", exact=False).click()
        looked(page)
        page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_role("link", name="Choose a step").wait_for(timeout=7_200_000)
    stops = [stop(page)]
    page.get_by_role("link", name="Choose a step").click()
    answered(page)
    stops.append(stop(page))
    best = page.locator(".steps tr", has=page.get_by_text("lowest", exact=True))
    best.get_by_role("link", name="Go live").click()
    page.get_by_role("button", name="Create route").wait_for()
    stops.append(stop(page))
    page.get_by_role("button", name="Create route").click()
    page.get_by_role("button", name="Promote").first.wait_for()
    stops.append(stop(page))
    page.context.close()
    return stops


def stop(page: Any) -> bytes:
    page.wait_for_timeout(700)
    return bytes(page.screenshot())


def strip(stops: Sequence[bytes], path: Path) -> None:
    """Three in a row, thinly framed."""
    wide, high, gap = STRIP["width"] * 3 // 5, STRIP["height"] * 3 // 5, 16
    rows = -(-len(stops) // 3)
    whole = Image.new("RGB", (3 * wide + 2 * gap, rows * high + (rows - 1) * gap), "white")
    for n, png in enumerate(stops):
        small = Image.open(io.BytesIO(png)).convert("RGB").resize((wide - 2, high - 2), Image.Resampling.LANCZOS)
        whole.paste(ImageOps.expand(small, 1, "#d8d2ca"), (n % 3 * (wide + gap), n // 3 * (high + gap)))
    whole.save(path, quality=80, method=6)
    print(path)


def fill(place: Place, address: str) -> None:
    """Some use, as a page has that is worth a look: a mix, a shadow, requests of several users."""
    models = httpx.get(f"{address}/v1/models").json()["data"]
    name = next(each["id"] for each in models if "@" not in each["id"] and each["id"] != TEXTS)
    place.run("writing", "library", "mix", f"{name}-softly", f"{name}@1:0.6")
    place.run("writing", "library", "tag", f"{name}@1", "tickets")
    place.run("writing", "library", "alias", f"{name}@1", "prod")
    place.run("writing", "library", "verify", f"{name}@1")
    place.run("writing", "tenant", "feedback", "keep", "--days", "7")
    shares = f"{TEXTS}=90", f"{name}@1=10"
    place.run("writing", "tenant", "route", "set", name, "--force", *shares, "--shadow", f"{name}-softly@1")
    time.sleep(3)
    rows = (EXAMPLES / "tickets" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    for n, row in enumerate(rows):
        messages = json.loads(row)["messages"][:-1]
        body = {"model": name, "messages": messages, "max_tokens": 24, "user": f"user-{n}"}
        asked(address, "/v1/chat/completions", body)
    place.mark("busy")


# -- pictures ----------------------------------------------------------------------------------------------------------

View = tuple[str, Callable[[Any], None]]
"""Where it is, and what is done there before it is worth a look."""


def nothing(page: Any) -> None:
    pass


def ask(what: str, count: int) -> Callable[[Any], None]:
    def does(page: Any) -> None:
        page.get_by_role("button", name=what, exact=True).click()
        done = ".spoken .row" if what == "Ask" else ".drawn img"
        page.locator(done).nth(count - 1).wait_for(timeout=600_000)

    return does


def looked(page: Any) -> None:
    page.locator(".figures .number").first.wait_for(timeout=600_000)
    page.locator(".rows tr, .sheet li").nth(3).wait_for(timeout=600_000)


def answered(page: Any) -> None:
    page.locator(".asked .panel").nth(5).wait_for(timeout=600_000)
    page.wait_for_function("!document.querySelector('.asked [aria-busy]')", timeout=1_200_000)


def text_views(place: Place) -> dict[str, View]:
    first = place.jobs("writing")[-1]
    job, name = first["id"], first["name"]
    system = "Route this Tarnhill ticket. Answer in JSON: team, priority, product_area."
    query = httpx.QueryParams([("c", f"{name}@1"), ("c", f"{name}@1:0.4"), ("p", TICKET), ("s", system), ("m", "48")])
    settings = (f"base={TEXTS}", "data.train=examples/tickets/train.jsonl", "adapter.rank=16", "schedule.steps=400")
    again = httpx.QueryParams([("s", setting) for setting in (*settings, "output=tickets-again")])

    def dropped(page: Any) -> None:
        page.set_input_files("input[type=file]", str(place.work / "ink.safetensors"))
        page.get_by_text("In other tools").wait_for(timeout=600_000)

    return {
        "library": ("", nothing),
        "adapter": (f"adapter?ref={name}@1", nothing),
        "compare": (f"compare?{query}", ask("Ask", 3)),
        "train": (f"train?{again}", looked),
        "run": (f"run?job={job}", nothing),
        "steps": (f"steps?job={job}", answered),
        "live": ("live", nothing),
        "doctor": ("doctor", dropped),
    }


def picture_views(place: Place, address: str) -> dict[str, View]:
    name = httpx.get(f"{address}/v1/adapters").json()["data"][0]["id"]
    job = place.jobs("drawing")[-1]["id"]
    mixes = [("c", f"{name}:0.5"), ("c", name), ("p", DRAWN.format("kettle")), ("n", 2)]
    return {
        "pictures-library": ("", nothing),
        "pictures-compare": (f"compare?{httpx.QueryParams(mixes)}", ask("Draw", 6)),
        "pictures-train": (f"train?{httpx.QueryParams(q=STYLE)}", looked),
        "pictures-steps": (f"steps?job={job}", nothing),
    }


class Shots:
    """`only`: names of views; all where it is empty."""

    def __init__(self, browser: Any, folder: Path, only: set[str]) -> None:
        self.browser, self.folder, self.only = browser, folder, only

    def any(self, start: str) -> bool:
        return not self.only or any(name.startswith(start) for name in self.only)

    def all(self, address: str, views: Mapping[str, View]) -> None:
        """Each view is filled once, and looked at in every light and width."""
        for name, (path, does) in views.items():
            if self.only and name not in self.only:
                continue
            for width, height in SIZES.items():
                context = self.browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
                page = opened(context, f"{address}/studio/{path}")
                does(page)
                for scheme in ("light", "dark"):
                    page.emulate_media(color_scheme=scheme)
                    page.wait_for_timeout(700)
                    write(page.screenshot(), self.folder / f"{name}-{scheme}-{width}.webp")
                context.close()


def opened(context: Any, url: str) -> Any:
    """A page that is alive."""
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_function("window.did_handshake === true && !document.getElementById('shell')")
    return page


def write(png: bytes, path: Path) -> None:
    Image.open(io.BytesIO(png)).convert("RGB").save(path, quality=78, method=6)
    print(path)


if __name__ == "__main__":
    main()
