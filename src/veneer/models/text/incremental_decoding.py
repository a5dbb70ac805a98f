"""Decode tokens to text incrementally, for generation, streaming and serving.

This module uses a tokenizer but no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

_BROKEN = "�"
"""The replacement character, which invalid or incomplete bytes decode to."""
_WINDOW = 16
"""Approximate number of preceding tokens decoded again with each new token."""


class Decoder(Protocol):
    """An object with the `decode` method of transformers' tokenizers."""

    def decode(self, token_ids: Any, **settings: Any) -> Any: ...


def decode_text(tokenizer: Decoder, ids: Sequence[int]) -> str:
    """Decode tokens to text, without special tokens and with spaces unchanged."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@dataclass
class Pieces:
    """Decodes the tokens of a completion into pieces of text.

    The joined pieces equal the text of all tokens. A token can end inside a character, and its text can
    depend on preceding tokens, so each new piece comes from decoding a window of the most recent tokens.
    Incomplete characters at the end of the window are held back until further tokens complete them.
    Exception: with byte fallback (Llama 2), an invalid byte turns earlier characters into replacement
    characters, but pieces that have already been returned do not change.
    """

    tokenizer: Decoder
    window: list[int] = field(default_factory=list)
    sent: int = 0
    """Number of characters of the window's text that have been returned."""

    def add(self, token: int) -> str:
        self.window.append(token)
        now = decode_text(self.tokenizer, self.window)
        stable = now.rstrip(_BROKEN)
        if len(self.window) >= 4 * _WINDOW:
            stable = now[: max(len(stable), len(now) - 3)]  # The longest incomplete character has 3 bytes.
        new, self.sent = stable[self.sent :], max(self.sent, len(stable))
        if len(self.window) >= _WINDOW and len(self.window) % 8 == 0:
            self._shorten(now)
        return new

    def rest(self) -> str:
        now = decode_text(self.tokenizer, self.window)
        new, self.sent = now[self.sent :], max(self.sent, len(now))
        return new

    def _shorten(self, now: str) -> None:
        """Shorten the window to a few tokens whose text is the end of the current text.

        The new window starts at the beginning of a character. If no such token is found before the window has
        4 · _WINDOW tokens, the window is shortened anyway."""
        unsent = max(len(now) - self.sent, 0)
        for n in range(8, 3, -1):
            text = decode_text(self.tokenizer, self.window[-n:])
            if len(self.window) < 4 * _WINDOW and text.startswith(_BROKEN):
                continue
            if len(text) >= unsent and now.endswith(text.lstrip(_BROKEN)):
                self.window, self.sent = self.window[-n:], len(text) - unsent
                return
