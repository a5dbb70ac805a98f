"""Pictures of every view of a Studio that runs, light and dark, on a desk and on a telephone.

    veneer studio &
    python benchmarks/studio_pictures.py docs/images/studio --address http://127.0.0.1:8000

Names: library-light-1280.webp. The views are those that the page links to, and the first adapter, run and steps there
are.
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIZES = {1280: 800, 390: 844}
FURTHER = {"adapter": "a[href*='/adapter?']", "run": "a[href*='/run?']", "steps": "a[href*='/steps?']"}
"""Views that are reached from another one -> the link that leads there."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pictures of a Studio's views.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--address", default="http://127.0.0.1:8000")
    parser.add_argument("--views", nargs="*", help="these alone")
    parser.add_argument("--full", action="store_true", help="the whole page, not one screen of it")
    args = parser.parse_args(argv)
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    args.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        views = views_of(browser, f"{args.address}/studio/")
        views = {name: url for name, url in views.items() if not args.views or name in args.views}
        for scheme in ("light", "dark"):
            for width, height in SIZES.items():
                context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
                for name, url in views.items():
                    page = opened(context, url)
                    page.wait_for_timeout(600)
                    write(page.screenshot(full_page=args.full), args.output / f"{name}-{scheme}-{width}.webp")
                    print(f"{name}-{scheme}-{width}.webp")
                    page.close()
                context.close()
        browser.close()


def opened(context: Any, url: str) -> Any:
    """A page that is alive."""
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_function("window.did_handshake === true && !document.getElementById('shell')")
    return page


def views_of(browser: Any, url: str) -> dict[str, str]:
    """Name -> address."""
    context = browser.new_context()
    page = opened(context, url)
    links = page.eval_on_selector_all(".views a", "all => all.map(a => [a.textContent.toLowerCase(), a.href])")
    views: dict[str, str] = dict(links)
    for start in list(views.values()):
        there = opened(context, start)
        for name, selector in FURTHER.items():
            if name not in views and (found := there.query_selector(selector)) is not None:
                views[name] = found.evaluate("a => a.href")
        there.close()
    context.close()
    return views


def write(png: bytes, path: Path) -> None:
    from PIL import Image

    Image.open(io.BytesIO(png)).convert("RGB").save(path, quality=82, method=6)


if __name__ == "__main__":
    main()
