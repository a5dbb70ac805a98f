"""Parts that move by themselves in the browser, each with a file beside this one: answers that come token by token,
pictures that come step by step, two of them with a wipe between them, a picture from the visitor's disk, shares of a
whole as a bar to drag."""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import ui

from veneer.studio import parts

SpokenToken = tuple[str, float | None, list[tuple[str, float]]]
"""(its text, its log-probability, the likeliest in its place)."""


class Answers(ui.element, component="answers.js"):
    """The answers of one column. `leads`: the other columns are compared with this one. `better(i)` and
    `corrected([i, text])` are what somebody says of its i-th answer; `better` is None where there is one column."""

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
        """So many answers come now; what was there is gone."""
        self.run_method("begin", count)

    def add(self, tokens: Sequence[tuple[int, SpokenToken]]) -> None:
        """(which answer, the token) of each that has come."""
        self.run_method("add", tokens)

    def end(self, index: int, note: str) -> None:
        """An answer is whole. `note`: what is said under it."""
        self.run_method("end", index, note)

    def judged(self, index: int, text: str) -> None:
        """What became of a vote or a correction."""
        self.run_method("judged", index, text)


class Wipe(ui.element, component="wipe.js"):
    """Two pictures of one size, each as a data: URL that this process made, under their names."""

    def __init__(self, left: str, right: str, names: tuple[str, str]) -> None:
        super().__init__()
        for name, value in {"left": left, "right": right, "names": list(names)}.items():
            self.props[name] = value


class WeightBar(ui.element, component="weights.js"):
    """Shares in per cent, (name, share). `moved(shares)`: while an edge is moved, in the parts' order."""

    def __init__(self, shares: Sequence[tuple[str, float]], moved: parts.Handler) -> None:
        super().__init__()
        self.props["parts"] = [list(part) for part in shares]
        self.on("moved", parts.heard(moved))

    def put(self, shares: Sequence[tuple[str, float]]) -> None:
        self.props["parts"] = [list(part) for part in shares]
        self.update()


class Drawn(ui.element, component="drawn.js"):
    """The pictures of one column. `marked(i)`: one is to be laid over another."""

    def __init__(self, label: str, marked: parts.Handler) -> None:
        super().__init__()
        self.props["label"] = label
        self.on("marked", parts.heard(marked))

    def begin(self, seeds: Sequence[int], width: int, height: int) -> None:
        """So many pictures come now; what was there is gone."""
        self.run_method("begin", list(seeds), width, height)

    def step(self, index: int, share: float) -> None:
        self.run_method("step", index, share)

    def show(self, index: int, source: str, note: str) -> None:
        """`source`: a data: URL that this process made."""
        self.run_method("show", index, source, note)

    def lay(self, index: int, marked: bool) -> None:
        self.run_method("lay", index, marked)


class Sketch(ui.element, component="sketch.js"):
    """A picture from the visitor's disk. `picked(data)`: it, as a data: URL; "" where it was taken away."""

    def __init__(self, label: str, picked: parts.Handler) -> None:
        super().__init__()
        self.props["label"] = label
        self.on("picked", parts.heard(picked))
