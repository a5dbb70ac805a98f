"""Compare a completion with the expected text. Rewards, graders and evaluation use these functions.

same_text     whether the texts are equal, ignoring leading and trailing white space. JSON is compared by
              value: key order is ignored, 12.0 equals 12
bleu, rouge   the scores of sacrebleu and rouge-score, from 0 to 1           (extra `metrics`)
fuzzy         rapidfuzz's ratio, 2·LCS(a, b) / (|a| + |b|), from 0 to 1      (extra `metrics`)
gleu          Google's BLEU, from 0 to 1
"""

from __future__ import annotations

import functools
import importlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from veneer.errors import MissingExtraError


def as_json(text: str) -> Any:
    """Return the value of a JSON text, or None if the text is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _equal_json(a: Any, b: Any) -> bool:
    """Return whether two JSON values are equal: 12.0 equals 12, but true does not equal 1.

    The comparison is not recursive, so any depth works."""
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


def same_text(answer: str, expected: Any) -> bool:
    """Return whether a completion equals `expected`, which is a text or another JSON value.

    If `expected` is a text that contains only a number, the number is compared as text, not by value."""
    text = expected if isinstance(expected, str) else json.dumps(expected, ensure_ascii=False)
    if answer.strip() == text.strip():
        return True
    value = as_json(text) if isinstance(expected, str) else expected
    by_value = isinstance(value, dict | list | tuple) or isinstance(expected, int | float)
    return by_value and _equal_json(as_json(answer), value)


def same_field(value: Any, expected: dict[str, Any], key: str) -> bool:
    """Return whether a completion's JSON value has the expected value under `key`."""
    return isinstance(value, dict) and key in value and _equal_json(value[key], expected[key])


def bleu(answer: str, expected: str) -> float:
    """Return sacrebleu's sentence BLEU, from 0 to 1. Raise MissingExtraError if sacrebleu is missing."""
    return float(_import_metric("sacrebleu").sentence_bleu(answer, [expected]).score) / 100


def rouge(answer: str, expected: str, measure: str = "rougeL") -> float:
    """Return the F1 of a rouge-score measure. Raise MissingExtraError if rouge-score is missing."""
    if measure != "rougeL":
        return float(_rouge_scorer(measure).score(expected, answer)[measure].fmeasure)
    words = _import_metric("rouge_score.tokenizers").DefaultTokenizer(use_stemmer=False)
    a, b = words.tokenize(answer), words.tokenize(expected)
    # This avoids the table of len(a) * len(b) that rouge-score builds.
    return 2 * _common(a, b) / (len(a) + len(b)) if a and b else 0.0


@functools.cache
def _rouge_scorer(measure: str) -> Any:
    return _import_metric("rouge_score.rouge_scorer").RougeScorer([measure])


def fuzzy(a: str, b: str) -> float:
    """Return rapidfuzz's ratio, 2·LCS(a, b) / (|a| + |b|); 1 for two empty texts.

    Raises MissingExtraError if rapidfuzz is missing."""
    return 2 * _common(a, b) / (len(a) + len(b)) if a or b else 1.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    return int(_import_metric("rapidfuzz.distance").LCSseq.similarity(a, b))


def gleu(answer: str, expected: str) -> float:
    """Return Google's BLEU (arXiv 1609.08144): min(precision, recall) of all n-grams of 1 to 4 words."""

    def grams(text: str) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))

    ours, theirs = grams(answer), grams(expected)
    most = max(ours.total(), theirs.total())
    return (ours & theirs).total() / most if most else 0.0


def _import_metric(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise MissingExtraError(f"this score needs {package}", extra="metrics") from error
