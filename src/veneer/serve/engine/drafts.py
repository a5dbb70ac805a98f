"""N-gram speculation: guesses of a completion's next tokens, which one forward pass verifies.

    drafter = drafts.drafter(root, tokens)                       once per request
    drafter.propose(most, rows)    drafter.add(token)            each step
    drafts.finished(drafter, prompt)                             at the end of the completion

Guesses have two sources:

    own        what followed the last occurrence of the latest 4, 3 or 2 tokens, in the prompt and completion
    earlier    what followed the latest 3 tokens in earlier completions with the same `request.cache_root`: the
               same mix and tenant, so that drafts reveal no more than the prefix cache does

The engine samples each token from its own logits, as without drafts, and keeps drafts only while they equal
the samples. So drafts change neither tokens nor their distribution.

A drafter estimates how often guesses are right, by source and by how well the source has agreed so far. With
`rows` decoding sequences, computing a draft costs a step about 0.8 ms, and accepting it saves a sequence's share
of a step, (5 + 0.8 rows) / rows ms (smollm2-135m on two cores, docs/notes/serving.md). So a draft pays if it is
right with a probability above rows / (rows + 6). A guess that is not drafted is also compared with the sampled
token, so that estimates cost no forward pass.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

_NGRAMS = (4, 3, 2)
_KEY = 3
"""Number of tokens that must match before a token of an earlier completion is guessed."""
_FREE_ROWS = 6
_RATE = 0.125
"""Weight of the latest guess in an estimate."""
_GUESS = 64
"""Maximum tokens of a guess from the completion's own text."""
_KEYS, _ROOTS = 4096, 64
"""Maximum number of keys per root, and of roots."""
_OWN = (0.35, 0.6, 0.8, 0.9, 0.95)
"""Initial probabilities that a guess from the own text is right, after 2, 4, 8, 16, 32 or more equal tokens."""
_EARLIER = (0.4, 0.6, 0.8, 0.9)
"""The same for earlier completions, by how often in a row the token followed the key: 1, 2, 4, 8 or more times."""


@dataclass(eq=False)
class _Earlier:
    """Earlier completions of one root: key -> (next token, how often in a row), and the latest estimates."""

    followed: dict[str, tuple[str, int]] = field(default_factory=dict)
    right: list[float] = field(default_factory=lambda: [*_OWN, *_EARLIER])


@dataclass(eq=False)
class Drafter:
    """The drafter of one completion. Texts have one character per token, because searching a `str` is fast.

    `text`: prompt and completion. `guess`: tokens that followed the last occurrence of the latest `equal` tokens.
    `right`: estimated probabilities that guesses are right, in the order of _OWN and then _EARLIER.
    """

    earlier: _Earlier
    text: str
    right: list[float]
    guess: str = ""
    equal: int = 0

    def add(self, token: int, *, sampled: bool = True) -> None:
        """Record the completion's next token. `sampled`: False for a forced token, which needs no draft."""
        character = chr(token)
        for guess, kind in self._guesses(self.guess, self.equal, self.text[-_KEY:]) if sampled else ():
            self.right[kind] += _RATE * ((guess == character) - self.right[kind])
        same = self.guess.startswith(character)
        self.guess, self.equal = (self.guess[1:], self.equal + 1) if same else ("", 0)
        self.text += character

    def propose(self, most: int, rows: int) -> tuple[int, ...]:
        """Return up to `most` tokens that are worth verifying in a step with `rows` decoding sequences."""
        if not self.guess:
            self.guess, self.equal = self._search()
        own, equal, key, drafts, right = self.guess, self.equal, self.text[-_KEY:], "", 1.0
        while len(drafts) < most and (guesses := self._guesses(own, equal, key)):
            guess, kind = max(guesses, key=lambda each: self.right[each[1]])
            right *= self.right[kind]
            if right <= rows / (rows + _FREE_ROWS):
                break
            own, equal = (own[1:], equal + 1) if own.startswith(guess) else ("", 0)
            key, drafts = key[1:] + guess, drafts + guess
        return tuple(map(ord, drafts))

    def _guesses(self, own: str, equal: int, key: str) -> list[tuple[str, int]]:
        """Return each source's guess of the next token, with the index of its estimate in `right`."""
        out = [(own[0], min(equal.bit_length(), len(_OWN) + 1) - 2)] if own else []
        if (earlier := self.earlier.followed.get(key)) is not None:
            out.append((earlier[0], len(_OWN) + min(earlier[1].bit_length(), len(_EARLIER)) - 1))
        return out

    def _search(self) -> tuple[str, int]:
        for n in _NGRAMS:
            if (at := self.text.rfind(self.text[-n:], 0, len(self.text) - 1)) >= 0:
                return self.text[at + n : at + n + _GUESS], n
        return "", 0


@dataclass(eq=False)
class Drafts:
    """The drafters' memory. The least recently used roots are forgotten."""

    roots: OrderedDict[bytes, _Earlier] = field(default_factory=OrderedDict)

    def drafter(self, root: bytes, tokens: list[int]) -> Drafter:
        """Return the drafter of a completion whose prompt, and tokens so far, are `tokens`."""
        earlier = self.roots.setdefault(root, _Earlier())
        self.roots.move_to_end(root)
        if len(self.roots) > _ROOTS:
            self.roots.popitem(last=False)
        return Drafter(earlier, "".join(map(chr, tokens)), list(earlier.right))

    def finished(self, drafter: Drafter, prompt: int) -> None:
        """Remember a finished completion for later drafts. `prompt`: number of tokens of its prompt."""
        earlier, text = drafter.earlier, drafter.text
        earlier.right = drafter.right
        if len(earlier.followed) > _KEYS:
            earlier.followed.clear()
        for at in range(max(prompt, _KEY), len(text)):
            key, token = text[at - _KEY : at], text[at]
            last, times = earlier.followed.get(key, ("", 0))
            earlier.followed[key] = (token, times + 1 if last == token else 1)
