"""Drafts: guesses of a completion's next tokens, which one forward pass verifies (n-gram speculation).

    drafter = drafts.drafter(root, prompt)                     once per request
    drafter.propose(most)    drafter.add(token)                each step
    drafts.finished(drafter)                                   at the end of the completion

A guess is the text that followed the last occurrence of the latest 4, 3 or 2 tokens, in the completion and
its prompt, or in earlier completions with the same `request.cache_root`: the same mix and tenant, so that
drafts reveal no more than the prefix cache does. A completion that repeats its prompt, or the format of
earlier completions, is drafted well.

The engine samples each token from its own logits, as without drafts, and keeps drafts only while they equal
the samples. So drafts change neither tokens nor their distribution.

Each drafter estimates the probability p that a guess is right. A draft's n-th token is right with probability
pⁿ. If `rows` sequences decode, the token costs a step about 0.8 ms and saves the row a step's share, (5 +
0.8 rows) / rows ms (smollm2-135m, docs/notes/serving.md), so it pays if pⁿ > rows / (rows + 6). Guesses are
checked against the sampled tokens even when they are not drafted, so that p stays up to date at no cost.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field

_LONGEST, _SHORTEST = 4, 2
"""Tokens of an n-gram that is looked up."""
_FREE_ROWS = 6
_RATE = 0.125
"""Weight of the latest guess in p."""
_GUESS = 64
"""Maximum tokens of a guess."""
_REMEMBERED, _ROOTS = 4096, 256
"""Tokens of earlier completions per root, and number of roots."""


@dataclass(eq=False)
class _Earlier:
    """Earlier completions of one root, as text with a character per token, and the last p."""

    text: str = ""
    right: float = 0.5


@dataclass(eq=False)
class Drafter:
    """Drafts one completion. `text`: its prompt and tokens, with a character per token, so that `str` searches."""

    earlier: _Earlier
    text: str
    prompt: int
    right: float
    guess: str = ""

    def add(self, token: int, *, sampled: bool = True) -> None:
        """Record the completion's next token. `sampled`: False for a forced token, which needs no draft."""
        character = chr(token)
        if self.guess:
            right = self.guess[0] == character
            self.guess = self.guess[1:] if right else ""
            if sampled:
                self.right += _RATE * (right - self.right)
        self.text += character

    def propose(self, most: int, rows: int) -> tuple[int, ...]:
        """Return the tokens, at most `most`, whose verification pays with `rows` decoding sequences."""
        if not self.guess:
            self.guess = self._guess()
        pays = math.log(rows / (rows + _FREE_ROWS)) / math.log(min(max(self.right, 0.01), 0.99))
        return tuple(map(ord, self.guess[: min(most, int(pays))]))

    def _guess(self) -> str:
        for n in range(_LONGEST, _SHORTEST - 1, -1):
            latest = self.text[-n:]
            for text, end in ((self.text, len(self.text) - 1), (self.earlier.text, len(self.earlier.text))):
                if (at := text.rfind(latest, 0, end)) >= 0 and at + n < len(text):
                    return text[at + n : at + n + _GUESS]
        return ""


@dataclass(eq=False)
class Drafts:
    """Drafters of all requests. The least recently used roots are forgotten."""

    roots: OrderedDict[bytes, _Earlier] = field(default_factory=OrderedDict)

    def drafter(self, root: bytes, tokens: list[int], prompt: int) -> Drafter:
        """Return the drafter of a completion that has these tokens, of which the first `prompt` are its prompt."""
        earlier = self.roots.setdefault(root, _Earlier())
        self.roots.move_to_end(root)
        if len(self.roots) > _ROOTS:
            self.roots.popitem(last=False)
        return Drafter(earlier, "".join(map(chr, tokens)), prompt, earlier.right)

    def finished(self, drafter: Drafter) -> None:
        """Remember a completion for later drafts."""
        earlier, new = drafter.earlier, drafter.text[max(0, drafter.prompt - _LONGEST) :]
        earlier.text, earlier.right = (earlier.text + new)[-_REMEMBERED:], drafter.right
