"""Tokens to text as they come, and where an answer ends.

    answer = AnswerText(tokenizer, sampling, ends=base_stop_ids)
    piece = answer.add(token)            piece.text goes out; piece.reason ends the answer
    answer.rest()                        what was held back and belongs to it

Text is held back where the next tokens may change it (a character in parts) and where a stop text may have begun.

Knows what a tokenizer decodes; no model, no HTTP.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from veneer.serve.request import Sampling

_BROKEN = "�"
"""What bytes that are no character, or not yet one, decode to."""
WINDOW = 16
"""Tokens that are decoded again with each new one, or a few more."""


class Decoder(Protocol):
    """As transformers' tokenizers do it."""

    def decode(self, token_ids: Any, **settings: Any) -> Any: ...


@dataclass(frozen=True)
class Piece:
    """What a token adds to the answer, and whether it ends it: `reason` "stop" with the text or id that did it."""

    text: str
    reason: Literal["stop", "length"] | None = None
    stop: str | int | None = None


@dataclass
class Pieces:
    """The tokens of one answer as text, piece by piece; the pieces joined are what all of them decode to.

    A token may end within a character, and its text may depend on the tokens before it, so what is new is read off a
    window of the last tokens. Broken characters at its end wait for what follows. One tokenizer cannot keep the whole
    promise: with bytes as a fallback (Llama 2's), a byte that fits nothing turns characters before it into broken ones;
    those that are out stay as they were."""

    tokenizer: Decoder
    window: list[int] = field(default_factory=list)
    sent: int = 0
    """Characters of the window's text that are out."""

    def add(self, token: int) -> str:
        self.window.append(token)
        now = self._decode(self.window)
        stable = now.rstrip(_BROKEN)
        if len(self.window) >= 4 * WINDOW:
            stable = now[: max(len(stable), len(now) - 3)]  # no character has so many bytes: they stay broken
        new, self.sent = stable[self.sent :], max(self.sent, len(stable))
        if len(self.window) >= WINDOW and len(self.window) % 8 == 0:
            self._shorten(now)
        return new

    def rest(self) -> str:
        now = self._decode(self.window)
        new, self.sent = now[self.sent :], max(self.sent, len(now))
        return new

    def _shorten(self, now: str) -> None:
        """Keep the last few tokens, from where a character begins, whose text is the end of the window's. Where every
        token begins within a character, a window four times as long gives that up."""
        held = max(len(now) - self.sent, 0)
        for n in range(8, 3, -1):
            text = self._decode(self.window[-n:])
            if len(self.window) < 4 * WINDOW and text.startswith(_BROKEN):
                continue
            if len(text) >= held and now.endswith(text.lstrip(_BROKEN)):
                self.window, self.sent = self.window[-n:], len(text) - held
                return

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


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
