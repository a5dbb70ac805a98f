"""The reference's log-probabilities are computed once, whatever else changes, and never taken for another's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from veneer.errors import ResourceError
from veneer.train.text.encode import Example
from veneer.train.text.preference import cached_logps

EXAMPLES = [Example([1, n, n + 1], [False, False, True], 0) for n in range(7)]


class Model:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, examples: Sequence[Example]) -> list[float]:
        self.asked += [e.input_ids for e in examples]
        return [-0.1 * sum(e.input_ids) - 7.3 * e.trained_tokens for e in examples]


def wanted(examples: Sequence[Example]) -> list[float]:
    return Model()(examples)


def test_logprobs_are_computed_once_and_read_back_exactly(tmp_path: Path) -> None:
    model, path = Model(), tmp_path / "cache" / "reference.jsonl"
    assert cached_logps([*EXAMPLES, EXAMPLES[3]], path, "base", model) == wanted([*EXAMPLES, EXAMPLES[3]])
    assert len(model.asked) == 7
    assert cached_logps(list(reversed(EXAMPLES)), path, "base", model) == wanted(list(reversed(EXAMPLES)))
    assert len(model.asked) == 7


@pytest.mark.parametrize("change", ["tokens", "mask", "base"])
def test_changed_examples_are_computed_again(change: str, tmp_path: Path) -> None:
    model, path = Model(), tmp_path / "reference.jsonl"
    cached_logps(EXAMPLES, path, "base", model)
    other = list(EXAMPLES)
    if change == "tokens":
        other[2] = Example([1, 50, 3], [False, False, True], 0)
    elif change == "mask":
        other[2] = Example(other[2].input_ids, [False, True, True], 0)
    assert cached_logps(other, path, "other" if change == "base" else "base", model) == wanted(other)
    assert len(model.asked) == 7 + (7 if change == "base" else 1)


def test_interruption_keeps_complete_lines(tmp_path: Path) -> None:
    model, path = Model(), tmp_path / "reference.jsonl"

    def stop(line: str) -> None:
        if line.startswith("reference: 4 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_logps(EXAMPLES, path, "base", model, stop, chunk=2)
    path.write_text(path.read_text()[:-9])  # the kill came while the fourth line was written
    message: list[str] = []
    assert cached_logps(EXAMPLES, path, "base", model, message.append, chunk=2) == wanted(EXAMPLES)
    assert "7 answers, 3 already computed" in message[0]
    assert len(model.asked) == 4 + 4
    cached_logps(EXAMPLES, path, "base", model)
    assert len(model.asked) == 8


def test_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ResourceError, match="disk is full"):
        cached_logps(EXAMPLES, tmp_path / "reference.jsonl", "base", Model())
