"""Grammars as token masks: a JSON schema, any JSON object, or a regular expression.

    start = compile_grammar(*sampling.grammar, tokenizer, …)               once per request, in a thread
    matcher = start.copy()
    matcher.mask()    matcher.advance(token)    matcher.done               the sampler, each step
    matcher.forced()                                                       tokens without an alternative

llguidance compiles and matches. A mask takes well under a millisecond. Compiling can take a second; it
releases the GIL, and results are cached by the grammar's text. Both times grow with the square of a schema's
size, which is therefore limited. Compiling also computes the first mask, so that a grammar without a valid
first token is refused before the request runs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from veneer.errors import MissingExtraError
from veneer.serve.request import Refused, invalid

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

GrammarKind = Literal["json_schema", "json_object", "regex"]

MAX_TEXT = 256 << 10
_MAX_PARTS = 2000
"""Maximum number of objects and lists in a JSON schema.

A schema of this size takes half a second to compile. If all parts are properties of one object, each mask
takes 40 ms.
"""
_COMPACT: Any = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
"""No whitespace between the tokens of JSON under a schema, so that keys and punctuation are forced.

A schema's own `x-guidance` overrides this. Without a schema, whitespace stays free, because keys are not known.
"""
_ANY_OBJECT = '{"type": "object"}'


class Matcher:
    """The grammar state of one completion. Errors are Refused, and end only the completion's row."""

    def __init__(self, state: LLMatcher, vocabulary: int) -> None:
        self._state, self.vocabulary = state, vocabulary

    def copy(self) -> Matcher:
        """Return a copy in the same state, for another completion. Copying is cheap."""
        return Matcher(self._state.deep_copy(), self.vocabulary)

    def mask(self) -> Tensor:
        """Return the allowed next tokens: bool, (vocabulary,).

        Stop ids are allowed only if the completion is complete, and are the only allowed tokens if nothing
        can follow. Raises Refused if the grammar turns out to be too large.
        """
        bits = self._state.compute_bitmask()
        self._check()
        allowed = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little").view(np.bool_)
        out = torch.zeros(self.vocabulary, dtype=torch.bool)
        n = min(len(allowed), self.vocabulary)
        out[:n] = torch.from_numpy(allowed[:n])
        return out

    def forced(self) -> list[int]:
        """Return the next tokens for which the mask allows no alternative; often none.

        Where only one text can follow, llguidance's masks allow only the tokens into which the tokenizer divides
        that text. The last tokens are left out if the tokenizer could merge them with later text.
        """
        tokens: list[int] = self._state.compute_ff_tokens()
        self._check()
        if not tokens and (self.done or self._state.compute_ff_bytes()):
            allowed = self.mask().nonzero().flatten().tolist()
            tokens = allowed if len(allowed) == 1 else []
        return tokens

    def allowed(self, tokens: Sequence[int]) -> int:
        """Return how many of these tokens, from the first one on, the grammar accepts."""
        return int(self._state.validate_tokens(list(tokens)))

    def advance(self, token: int) -> None:
        """Advance by a token that the mask allows. Raises Refused for any other token."""
        if not self._state.consume_token(token):
            self._check()
            raise Refused(f"token {token} does not match the grammar", status=500, code="internal")

    @property
    def complete(self) -> bool:
        """Whether the completion can end here."""
        return bool(self._state.is_accepting())

    @property
    def done(self) -> bool:
        """Whether only the completion's end can follow."""
        return bool(self._state.is_stopped())

    def _check(self) -> None:
        if self._state.is_error():
            raise _refused(self._state.get_error())


def compile_grammar(
    kind: GrammarKind, text: str, tokenizer: Any, *, vocabulary: int | None = None, ends: Collection[int] = ()
) -> Matcher:
    """Compile a grammar and return its start state; copy the state for each completion. Blocking.

    `tokenizer`: a fast tokenizer of transformers. `vocabulary`: the model's number of logits; by default the
    tokenizer's length. `ends`: stop ids; by default the tokenizer's eos. Raises Refused (400) with
    llguidance's message if the grammar does not compile, MissingExtraError without llguidance.
    """
    if len(text) > MAX_TEXT:
        raise _refused(f"{len(text):,} characters; at most {MAX_TEXT:,}")
    if kind == "json_schema" and (parts := text.count("{") + text.count("[")) > _MAX_PARTS:
        raise _refused(f"a schema of {parts:,} objects and lists; at most {_MAX_PARTS:,}")
    vocabulary = vocabulary or len(tokenizer)
    llg_tokenizer = _tokenizer(tokenizer, vocabulary, tuple(sorted(ends)))
    return _compiled(kind, _ANY_OBJECT if kind == "json_object" else text, llg_tokenizer, vocabulary)


@lru_cache(maxsize=256)
def _compiled(kind: GrammarKind, text: str, tokenizer: LLTokenizer, vocabulary: int) -> Matcher:
    from llguidance import LLMatcher

    try:
        regex = kind == "regex"
        defaults = _COMPACT if kind == "json_schema" else None
        grammar = LLMatcher.grammar_from_regex(text) if regex else LLMatcher.grammar_from_json_schema(text, defaults)
    except ValueError as error:
        raise _refused(str(error)) from error
    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, tokenizer)
    if wrong:
        raise _refused(messages[0])
    start = Matcher(LLMatcher(tokenizer, grammar, log_level=0), vocabulary)
    start.copy().mask()
    return start


@lru_cache(maxsize=8)
def _tokenizer(tokenizer: Any, vocabulary: int, ends: tuple[int, ...]) -> LLTokenizer:
    """Return an llguidance tokenizer. Cached, because building one takes about a second."""
    try:
        from llguidance import LLTokenizer
    except ImportError as error:
        message = "grammars need llguidance"
        raise MissingExtraError(message, extra="serve") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("this base has no fast tokenizer, which grammars need")
    raw = copy(backend)
    raw.no_padding()
    raw.no_truncation()
    return LLTokenizer(raw.to_str(), n_vocab=vocabulary, eos_token=list(ends) or tokenizer.eos_token_id)


def _refused(message: str) -> Refused:
    """Return an error with the first line of llguidance's message, without its internal state."""
    first = [*message.strip().splitlines(), ""][0].partition("<")[0].strip()[:300]
    if not first or first.isalnum():  # an error code of llguidance, not a message
        first = "llguidance gave no reason"
    if "regex parse error:" in first:
        why = re.search(r"^error: (.+)$", message, re.MULTILINE)
        first = f"it contains an invalid regular expression{': ' + why[1][:200] if why else ''}"
    return invalid(f"the grammar cannot be used: {first}", "response_format")
