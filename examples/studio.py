"""`make studio`: open the Studio with the quickstart's adapter.

The script adds the adapter to the library, or offers to train it first.

python examples/studio.py [--output runs/quickstart] [--base smollm2-135m] [--port 8000] [--no-browser]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from veneer.cli.main import main as veneer
from veneer.library.library import NotInLibrary, open_library

NAME = "support-tickets"


def main(argv: Sequence[str] | None = None, run: Callable[[list[str]], None] = veneer) -> None:
    args = arguments(argv)
    if not keep_quickstart(args.output) and sys.stdin.isatty() and wanted():
        from quickstart import main as quickstart

        quickstart(["--output", str(args.output), "--base", args.base])
        keep_quickstart(args.output)
    given = ["--base", args.base, "--port", str(args.port)]
    run(["studio", *given, *(["--no-browser"] if args.no_browser else [])])


def keep_quickstart(output: Path) -> bool:
    """Add the quickstart's adapter to the library, if it is trained.

    Returns whether the library contains the adapter."""
    with open_library() as library:
        if (output / "adapter").is_dir():
            added = library.add(output, NAME)
            if added.new:
                print(f"the quickstart's adapter is {added.version.reference} in the library")
            return True
        try:
            return bool(library.find(NAME))
        except NotInLibrary:
            return False


def wanted() -> bool:
    print("There is no adapter of the quickstart yet: it answers support tickets, and trains in three to six minutes.")
    return input("Train it first? [y/N] ").strip().lower() in ("y", "yes")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Open the Studio.")
    parser.add_argument("--base", default="smollm2-135m", help="built-in name, folder, .gguf file or hub id")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="where the quickstart's run is")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--no-browser", action="store_true", help="leave opening the page to you")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
