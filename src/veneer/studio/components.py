"""Interactive elements of the Compare view; each has its own JavaScript file."""

from __future__ import annotations

from collections.abc import Sequence

from nicegui import ui

from veneer.studio.elements import Handler, event_handler

TokenInfo = tuple[str, float | None, list[tuple[str, float]]]
"""(text, logprob, [(text, logprob) of the most likely tokens])."""


class Answers(ui.element, component="answers.js"):
    """The answers of one column.

    leads: whether the other columns are compared with this column
    vote(i): handler of a vote for the i-th answer; None if there is only one column
    correct([i, text]): handler of a correction of the i-th answer"""

    def __init__(self, label: str, position: int, *, leads: bool, vote: Handler | None, correct: Handler) -> None:
        super().__init__()
        for name, value in {"label": label, "leads": leads, "position": position, "votes": vote is not None}.items():
            self.props[name] = value
        if vote is not None:
            self.on("better", event_handler(vote))
        self.on("corrected", event_handler(correct))

    def begin(self, count: int) -> None:
        """Clear the column and reserve space for `count` answers."""
        self.run_method("begin", count)

    def add(self, tokens: Sequence[tuple[int, TokenInfo]]) -> None:
        """Append (answer index, token) pairs."""
        self.run_method("add", tokens)

    def end(self, index: int, note: str) -> None:
        """Mark an answer as finished. `note`: text shown below the answer."""
        self.run_method("end", index, note)

    def show_feedback(self, index: int, text: str) -> None:
        """Show the result of a vote or a correction."""
        self.run_method("judged", index, text)


class Images(ui.element, component="images.js"):
    """The images of one column."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.props["label"] = label

    def begin(self, seeds: Sequence[int], width: int, height: int) -> None:
        """Clear the column and reserve space for one image per seed."""
        self.run_method("begin", list(seeds), width, height)

    def step(self, index: int, share: float) -> None:
        self.run_method("step", index, share)

    def show(self, index: int, source: str, note: str) -> None:
        """Show an image. `source`: a data: URL that this process created."""
        self.run_method("show", index, source, note)
