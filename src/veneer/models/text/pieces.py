"""Tokens to text as they come: generated, streamed, served.

Knows what a tokenizer decodes; no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

_BROKEN = "�"
"""What bytes that are no character, or not yet one, decode to."""
_WINDOW = 16
"""Tokens that are decoded again with each new one, or a few more."""


class Decoder(Protocol):
    """As transformers' tokenizers do it."""

    def decode(self, token_ids: Any, **settings: Any) -> Any: ...


def decode_text(tokenizer: Decoder, ids: Sequence[int]) -> str:
    """What an answer's tokens say: without special ones, and with spaces as they are."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


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
        now = decode_text(self.tokenizer, self.window)
        stable = now.rstrip(_BROKEN)
        if len(self.window) >= 4 * _WINDOW:
            stable = now[: max(len(stable), len(now) - 3)]  # no character has so many bytes: they stay broken
        new, self.sent = stable[self.sent :], max(self.sent, len(stable))
        if len(self.window) >= _WINDOW and len(self.window) % 8 == 0:
            self._shorten(now)
        return new

    def rest(self) -> str:
        now = decode_text(self.tokenizer, self.window)
        new, self.sent = now[self.sent :], max(self.sent, len(now))
        return new

    def _shorten(self, now: str) -> None:
        """Keep the last few tokens, from where a character begins, whose text is the end of the window's. Where every
        token begins within a character, a window four times as long gives that up."""
        held = max(len(now) - self.sent, 0)
        for n in range(8, 3, -1):
            text = decode_text(self.tokenizer, self.window[-n:])
            if len(self.window) < 4 * _WINDOW and text.startswith(_BROKEN):
                continue
            if len(text) >= held and now.endswith(text.lstrip(_BROKEN)):
                self.window, self.sent = self.window[-n:], len(text) - held
                return
