"""Where an answer ends, and its text as it comes.

    answer = AnswerText(tokenizer, sampling, ends=base_stop_ids)
    piece = answer.add(token)            piece.text goes out; piece.reason ends the answer
    answer.rest()                        what was held back and belongs to it

Text is held back where the next tokens may change it (a character in parts) and where a stop text may have begun.

Knows what a tokenizer decodes; no model, no HTTP.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from veneer.models.text.pieces import Decoder, Pieces
from veneer.serve.request import Sampling


@dataclass(frozen=True)
class Piece:
    """What a token adds to the answer, and whether it ends it: `reason` "stop" with the text or id that did it."""

    text: str
    reason: Literal["stop", "length"] | None = None
    stop: str | int | None = None


class AnswerText:
    """The text of one answer up to its end.

    `ends`: the ids that end an answer on this base, unless the request ignores them, which it cannot where a grammar
    lets nothing follow; its own `stop_ids` always do.
    Stop texts are looked for behind the first `min_tokens` tokens. The first to be complete ends the answer, and of
    several that end together the longest, which does not depend on how the text is cut into tokens."""

    def __init__(self, tokenizer: Decoder, sampling: Sampling, ends: Collection[int] = ()) -> None:
        self.pieces = Pieces(tokenizer)
        self.sampling = sampling
        ignored = sampling.ignore_eos and sampling.grammar is None
        self.ends = frozenset(sampling.stop_ids) | (frozenset() if ignored else frozenset(ends))
        self.made = 0
        self._stops = tuple(s for s in sampling.stop if s)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self._stopped = False

    def add(self, token: int) -> Piece:
        self.made += 1
        if token in self.ends:
            return Piece("", "stop", token)
        text, stop = self._look(self.pieces.add(token))
        if stop is not None:
            return Piece(text, "stop", stop)
        return Piece(text, "length" if self.made >= self.sampling.max_tokens else None)

    def rest(self) -> str:
        """What was held back; once, however the answer ended. Nothing behind a stop text."""
        text, stop = self._look(self.pieces.rest())
        held, self._held = self._held, ""
        return text if stop is not None else text + held

    def _look(self, new: str) -> tuple[str, str | None]:
        """(what may go out, the stop text that came to its end)."""
        if self._stopped:
            return "", None
        text, self._held = self._held + new, ""
        if not self._stops or self.made <= self.sampling.min_tokens:
            return text, None
        found = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self._stopped = True
            _, at, stop = min(found)
            return text[:at], stop
        for n in range(min(len(text), self._longest - 1), 0, -1):
            if any(s.startswith(text[-n:]) for s in self._stops):
                self._held = text[-n:]
                return text[:-n], None
        return text, None
