"""Two texts compared: an answer and what was wanted.

same_text     equal, white space at both ends aside; JSON as values: the order of keys is nothing, and 12.0 is 12
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
"""Occurrences from which an item's mask is kept."""


def as_json(text: str) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _equal_json(a: Any, b: Any) -> bool:
    """Equal as JSON values: 12.0 is 12, and true is not 1. Values may be nested deeper than Python recurses."""
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
    """`wanted`: a text, or any other value of JSON. Texts that are bare numbers are compared as texts."""
    text = wanted if isinstance(wanted, str) else json.dumps(wanted, ensure_ascii=False)
    if answer.strip() == text.strip():
        return True
    expected = as_json(text) if isinstance(wanted, str) else wanted
    known = isinstance(expected, dict | list | tuple) or isinstance(wanted, int | float)
    return known and _equal_json(as_json(answer), expected)


def same_field(value: Any, wanted: dict[str, Any], key: str) -> bool:
    """Whether an answer's JSON value has the wanted object's value under `key`."""
    return isinstance(value, dict) and key in value and _equal_json(value[key], wanted[key])


def bleu(answer: str, wanted: str) -> float:
    """sacrebleu's sentence BLEU, of 1. Raises MissingExtraError."""
    try:
        from sacrebleu import sentence_bleu
    except ImportError as error:
        raise _missing("BLEU", "sacrebleu") from error
    return float(sentence_bleu(answer, [wanted]).score) / 100


def rouge(answer: str, wanted: str, measure: str = "rougeL") -> float:
    """F1 of one of rouge-score's measures. Raises MissingExtraError."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer
    except ImportError as error:
        raise _missing("ROUGE", "rouge-score") from error
    if measure != "rougeL":
        return float(_scorer(RougeScorer, measure).score(wanted, answer)[measure].fmeasure)
    words = DefaultTokenizer(use_stemmer=False)  # rouge-score's own rougeL fills a table of len(a) * len(b) numbers
    a, b = words.tokenize(answer), words.tokenize(wanted)
    return 2 * _common(a, b) / (len(a) + len(b)) if a and b else 0.0


@functools.cache
def _scorer(kind: Any, measure: str) -> Any:
    return kind([measure])


def _missing(what: str, package: str) -> MissingExtraError:
    return MissingExtraError(f"{what} needs {package}", fix="pip install 'veneer[metrics]'")


def fuzzy(a: str, b: str) -> float:
    """The share of both that a longest common subsequence covers; two empty texts are equal."""
    return 2 * _common(a, b) / (len(a) + len(b)) if a or b else 1.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of a longest common subsequence.

    Hyyrö's bit vectors ("Bit-parallel LCS-length computation revisited", 2004): bit i of `row` is 0 where the length of
    the LCS grows at a's item i. A step is a few operations on one whole number of |a| bits. Masks are kept of frequent
    items alone, of which there are few: |a| masks of |a| bits would be quadratic in memory."""
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
