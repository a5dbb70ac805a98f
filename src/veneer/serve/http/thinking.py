"""Separates the thinking of an answer from the answer itself."""

from __future__ import annotations

from typing import Literal

THINK, THOUGHT = "<think>", "</think>"
"""The tags around the thinking of bases whose chat template has the variable `enable_thinking`."""


class ThinkingReader:
    """Splits an answer that can begin with <think>…</think>.

    `at`: start (thinking can begin here), thinking, gap (white space after the thinking), or answer.
    """

    def __init__(self, at: Literal["start", "thinking", "gap", "answer"]) -> None:
        self.at, self.held = at, ""

    def feed(self, text: str, *, end: bool) -> tuple[str, str]:
        """Return the next text that belongs to the thinking, and the next text that belongs to the answer.

        `end`: whether this is the last text. Text that can still become a tag is held back."""
        thinking, self.held = "", self.held + text
        if self.at == "start":
            begun = self.held.lstrip()
            if not end and len(begun) < len(THINK) and THINK.startswith(begun):
                return "", ""
            self.at = "thinking" if begun.startswith(THINK) else "answer"
            self.held = begun.removeprefix(THINK) if self.at == "thinking" else self.held
        if self.at == "thinking":
            thinking, closed, rest = self.held.partition(THOUGHT)
            if not closed:
                kept = (
                    0 if end else next((n for n in range(len(THOUGHT) - 1, 0, -1) if thinking.endswith(THOUGHT[:n])), 0)
                )
                self.held = thinking[len(thinking) - kept :]
                return thinking[: len(thinking) - kept], ""
            self.at, self.held = "gap", rest
        if self.at == "gap":  # the template writes line breaks between thinking and answer
            self.held = self.held.lstrip()
            self.at = "answer" if self.held else "gap"
        answer, self.held = self.held, ""
        return thinking, answer
