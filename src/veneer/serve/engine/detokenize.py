"""Incremental detokenization: the text of a completion as its tokens arrive, and its end.

    answer = AnswerText(tokenizer, sampling, ends=base_stop_ids)
    piece = answer.add(token)            send piece.text; piece.reason ends the completion
    answer.flush()                       text that was held back and belongs to the completion

Text is held back while later tokens can change it (an incomplete character), and while it can be the start of
a stop text. Depends only on the tokenizer's decoder, not on a model or HTTP.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from veneer.models.text.incremental_decoding import Decoder, Pieces
from veneer.serve.request import Sampling


@dataclass(frozen=True)
class Piece:
    """The text that a token adds, and whether the token ends the completion.

    If `reason` is "stop", `stop` is the stop text or stop id.
    """

    text: str
    reason: Literal["stop", "length"] | None = None
    stop: str | int | None = None


class AnswerText:
    """The text of one completion up to its end.

    `ends`: the base's stop ids, which end a completion unless the request ignores them. With a grammar, the
    base's stop ids always apply, because nothing else can follow a complete text. The request's own
    `stop_ids` always apply.

    Stop texts are matched after the first `min_tokens` tokens. The first complete match ends the completion;
    if several matches are complete at the same character, the longest one counts. How tokens divide the text
    makes no difference.
    """

    def __init__(self, tokenizer: Decoder, sampling: Sampling, ends: Collection[int] = ()) -> None:
        self.pieces = Pieces(tokenizer)
        self.sampling = sampling
        ignored = sampling.ignore_eos and sampling.grammar is None
        self.ends = frozenset(sampling.stop_ids) | (frozenset() if ignored else frozenset(ends))
        self.count = 0
        self._stops = tuple(s for s in sampling.stop if s)
        self._longest = max(map(len, self._stops), default=0)
        self._buffer = ""
        self._stopped = False

    def add(self, token: int) -> Piece:
        self.count += 1
        if token in self.ends:
            return Piece("", "stop", token)
        text, stop = self._split(self.pieces.add(token))
        if stop is not None:
            return Piece(text, "stop", stop)
        return Piece(text, "length" if self.count >= self.sampling.max_tokens else None)

    def flush(self) -> str:
        """Return the text that is still held back, up to a stop text. Further calls return ""."""
        text, stop = self._split(self.pieces.rest())
        buffer, self._buffer = self._buffer, ""
        return text if stop is not None else text + buffer

    def _split(self, new: str) -> tuple[str, str | None]:
        """Return (text to send, completed stop text or None)."""
        if self._stopped:
            return "", None
        text, self._buffer = self._buffer + new, ""
        if not self._stops or self.count <= self.sampling.min_tokens:
            return text, None
        matches = [(at + len(s), at, s) for s in self._stops if (at := text.find(s)) >= 0]
        if matches:
            self._stopped = True
            _, at, stop = min(matches)
            return text[:at], stop
        for n in range(min(len(text), self._longest - 1), 0, -1):
            if any(s.startswith(text[-n:]) for s in self._stops):
                self._buffer = text[-n:]
                return text[:-n], None
        return text, None
