"""Interactive parts, each with its own JavaScript file.

Streaming answers, images with progress, a wipe between two images, an image picker, a draggable bar of
shares."""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import ui

from veneer.studio import parts

SpokenToken = tuple[str, float | None, list[tuple[str, float]]]
"""(text, log-probability, [(text, log-probability) of the likeliest tokens])."""


class Answers(ui.element, component="answers.js"):
    """The answers of one column.

    leads: other columns are compared with this column
    better(i): handler of a vote for the i-th answer; None for a single column
    corrected([i, text]): handler of a correction of the i-th answer"""

    def __init__(
        self,
        label: str,
        place: int,
        *,
        leads: bool,
        better: parts.Handler | None,
        corrected: parts.Handler,
    ) -> None:
        super().__init__()
        given = {"label": label, "leads": leads, "place": place, "votes": better is not None}
        for name, value in given.items():
            self.props[name] = value
        if better is not None:
            self.on("better", parts.heard(better))
        self.on("corrected", parts.heard(corrected))

    def begin(self, count: int) -> None:
        """Clear the column and expect `count` answers."""
        self.run_method("begin", count)

    def add(self, tokens: Sequence[tuple[int, SpokenToken]]) -> None:
        """Append (answer index, token) pairs."""
        self.run_method("add", tokens)

    def end(self, index: int, note: str) -> None:
        """Finish an answer. `note`: text below the answer."""
        self.run_method("end", index, note)

    def judged(self, index: int, text: str) -> None:
        """Show the result of a vote or a correction."""
        self.run_method("judged", index, text)


class Wipe(ui.element, component="wipe.js"):
    """Two images of equal size with a wipe, as data: URLs that this process created."""

    def __init__(self, left: str, right: str, names: tuple[str, str]) -> None:
        super().__init__()
        for name, value in {"left": left, "right": right, "names": list(names)}.items():
            self.props[name] = value


class WeightBar(ui.element, component="weights.js"):
    """A bar of (name, share in percent). `moved(shares)`: called while an edge moves."""

    def __init__(self, shares: Sequence[tuple[str, float]], moved: parts.Handler) -> None:
        super().__init__()
        self.props["parts"] = [list(part) for part in shares]
        self.on("moved", parts.heard(moved))

    def put(self, shares: Sequence[tuple[str, float]]) -> None:
        self.props["parts"] = [list(part) for part in shares]
        self.update()


class Drawn(ui.element, component="drawn.js"):
    """The images of one column. `marked(i)`: called to overlay the i-th image."""

    def __init__(self, label: str, marked: parts.Handler) -> None:
        super().__init__()
        self.props["label"] = label
        self.on("marked", parts.heard(marked))

    def begin(self, seeds: Sequence[int], width: int, height: int) -> None:
        """Clear the column and expect one image per seed."""
        self.run_method("begin", list(seeds), width, height)

    def step(self, index: int, share: float) -> None:
        self.run_method("step", index, share)

    def show(self, index: int, source: str, note: str) -> None:
        """Show an image. `source`: a data: URL that this process created."""
        self.run_method("show", index, source, note)

    def lay(self, index: int, marked: bool) -> None:
        self.run_method("lay", index, marked)


class Sketch(ui.element, component="sketch.js"):
    """A picker for an image file. `picked(data)`: a data: URL, or "" after removal."""

    def __init__(self, label: str, picked: parts.Handler) -> None:
        super().__init__()
        self.props["label"] = label
        self.on("picked", parts.heard(picked))
