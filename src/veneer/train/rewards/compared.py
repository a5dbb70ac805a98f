"""Compare two texts: an answer and the expected text.

same_text     equal, ignoring outer white space; JSON by value: key order is ignored, 12.0 equals 12
bleu, rouge   sacrebleu's and rouge-score's, from 0 to 1        (extra `metrics`)
fuzzy         2·LCS(a, b) / (|a| + |b|), rapidfuzz's ratio, from 0 to 1
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from veneer.errors import MissingExtraError

_FREQUENT = 8
"""Number of occurrences from which an item's mask is cached."""


def as_json(text: str) -> Any:
    """Return the value of a JSON text; None if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _equal_json(a: Any, b: Any) -> bool:
    """Return whether two JSON values are equal: 12.0 equals 12, not true and 1.

    Does not recurse, so any depth works."""
    pairs = [(a, b)]
    while pairs:
        a, b = pairs.pop()
        if isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                return False
            pairs += [(a[key], b[key]) for key in a]
        elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
            if len(a) != len(b):
                return False
            pairs += zip(a, b, strict=True)
        elif isinstance(a, bool) != isinstance(b, bool) or a != b:
            return False
    return True


def same_text(answer: str, wanted: Any) -> bool:
    """Return whether an answer equals `wanted`, a text or another JSON value.

    Bare numbers in texts are compared as text."""
    text = wanted if isinstance(wanted, str) else json.dumps(wanted, ensure_ascii=False)
    if answer.strip() == text.strip():
        return True
    expected = as_json(text) if isinstance(wanted, str) else wanted
    known = isinstance(expected, dict | list | tuple) or isinstance(wanted, int | float)
    return known and _equal_json(as_json(answer), expected)


def same_field(value: Any, wanted: dict[str, Any], key: str) -> bool:
    """Return whether an answer's JSON value has the expected value under `key`."""
    return isinstance(value, dict) and key in value and _equal_json(value[key], wanted[key])


def bleu(answer: str, wanted: str) -> float:
    """Return sacrebleu's sentence BLEU, from 0 to 1. Raises MissingExtraError."""
    try:
        from sacrebleu import sentence_bleu
    except ImportError as error:
        raise _missing("BLEU", "sacrebleu") from error
    return float(sentence_bleu(answer, [wanted]).score) / 100


def rouge(answer: str, wanted: str, measure: str = "rougeL") -> float:
    """Return the F1 of one of rouge-score's measures. Raises MissingExtraError."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise _missing("ROUGE", "rouge-score") from error
    if measure != "rougeL":
        return float(_scorer(RougeScorer, measure).score(wanted, answer)[measure].fmeasure)
    words = DefaultTokenizer(use_stemmer=False)  # rouge-score's rougeL needs a table of len(a) * len(b)
    a, b = words.tokenize(answer), words.tokenize(wanted)
    return 2 * _common(a, b) / (len(a) + len(b)) if a and b else 0.0


@functools.cache
def _scorer(kind: Any, measure: str) -> Any:
    return kind([measure])


def _missing(what: str, package: str) -> MissingExtraError:
    return MissingExtraError(f"{what} needs {package}", fix="pip install 'veneer[metrics]'")


def fuzzy(a: str, b: str) -> float:
    """Return the share of both texts in their longest common subsequence.

    1 for two empty texts."""
    return 2 * _common(a, b) / (len(a) + len(b)) if a or b else 1.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of a longest common subsequence.

    Hyyrö's bit vectors ("Bit-parallel LCS-length computation revisited", 2004): bit i of `row` is 0 where the
    length of the LCS grows at a's item i. A step is a few operations on one integer of |a| bits. Masks are
    cached only for the few frequent items: |a| masks of |a| bits would need quadratic memory."""
    places: dict[str, list[int]] = {}
    for i, item in enumerate(a):
        places.setdefault(item, []).append(i)
    masks = {item: _mask(found) for item, found in places.items() if len(found) >= _FREQUENT}
    full = row = (1 << len(a)) - 1
    for item in b:
        found = masks.get(item)
        met = row & (_mask(places.get(item, ())) if found is None else found)
        row = ((row + met) | (row - met)) & full
    return len(a) - row.bit_count()


def _mask(places: Sequence[int]) -> int:
    bits = bytearray(places[-1] // 8 + 1 if places else 0)
    for i in places:
        bits[i // 8] |= 1 << (i % 8)
    return int.from_bytes(bits, "little")
