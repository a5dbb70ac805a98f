"""Each line of a batch file can set its own mix; missing keys take the caller's values.

Invalid lines are listed in the error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from veneer.errors import DataError
from veneer.imaging.adapters import parse_use
from veneer.imaging.batch import read_batch
from veneer.imaging.generate import ImageRequest


def lines(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_missing_keys_take_the_callers_values(tmp_path: Path) -> None:
    shared = ImageRequest("", "blurry", 7, (parse_use("house"),))
    found = read_batch(
        lines(
            tmp_path / "b.jsonl",
            {"prompt": "a fox", "adapters": ["brand:0.8", "look@steps=0.5-1"], "seed": 5, "negative": ""},
            "",
            {"prompt": "a\u2028hat"},
            {"prompt": "a hat", "adapters": []},
        ),
        shared,
    )
    assert found == [
        ImageRequest("a fox", "", 5, (parse_use("brand:0.8"), parse_use("look@steps=0.5-1"))),
        ImageRequest("a\u2028hat", "blurry", 7, shared.uses),
        ImageRequest("a hat", "blurry", 7, ()),
    ]
    assert read_batch(tmp_path / "b.jsonl")[1] == ImageRequest("a\u2028hat")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "adapter": ["x"]}, "unknown key 'adapter', the nearest is 'adapters'"),
        ({"prompt": "a", "qqq": 1}, "unknown key 'qqq'"),
        ({"seed": 1}, "no prompt"),
        ({"prompt": 3}, "the prompt is 3"),
        ({"prompt": "a", "negative": None}, "the negative prompt is None"),
        ({"prompt": "a", "seed": "5"}, "seed '5'"),
        ({"prompt": "a", "seed": -1}, "seed -1"),
        ({"prompt": "a", "adapters": "brand"}, "adapters is 'brand'; it must be a list of strings"),
        ({"prompt": "a", "adapters": ["brand@steps=2-3"]}, "not a range of steps"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' appears twice"),
        (r'{"prompt": "a \ud83d fox"}', r"the prompt is 'a \ud83d fox'"),
        ("a fox", "not JSON"),
        ([1], "not a JSON object"),
    ],
)
def test_invalid_line_is_reported_with_its_number(row: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_batch(lines(tmp_path / "b.jsonl", {"prompt": "a"}, row, {"sede": 1}))
    assert "2 invalid lines:\n  - line 2: " in error.value.what
    assert says in error.value.what
    assert "line 3: unknown key 'sede'" in error.value.what


def test_missing_or_empty_batch_is_refused(tmp_path: Path) -> None:
    lines(tmp_path / "batch.jsonl", "", "")
    with pytest.raises(DataError, match="no such batch file"):
        read_batch(tmp_path / "bach.jsonl")
    with pytest.raises(DataError, match="has no lines"):
        read_batch(tmp_path / "batch.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_batch(tmp_path)
