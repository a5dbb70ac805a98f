"""A batch file: a mix for each picture, the caller's for what a line leaves out, and every fault with its line."""

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


def test_a_line_is_an_ask_and_what_it_leaves_out_is_the_callers(tmp_path: Path) -> None:
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
        ({"seed": 1}, "it has no prompt"),
        ({"prompt": 3}, "prompt is 3, and a text is wanted"),
        ({"prompt": "a", "negative": None}, "negative is None, and a text is wanted"),
        ({"prompt": "a", "seed": "5"}, "seed is '5', and a whole number is wanted"),
        ({"prompt": "a", "seed": True}, "seed is True, and a whole number is wanted"),
        ({"prompt": "a", "seed": -1}, "seed -1"),
        ({"prompt": "a", "adapters": "brand"}, "adapters is 'brand', and a list of texts is wanted"),
        ({"prompt": "a", "adapters": ["brand@steps=2-3"]}, "not a range of steps"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' appears twice"),
        (r'{"prompt": "a \ud83d fox"}', "the prompt has half a character"),
        ("a fox", "not JSON"),
        ([1], "not a JSON object"),
    ],
)
def test_a_fault_is_said_with_its_line(row: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_batch(lines(tmp_path / "b.jsonl", {"prompt": "a"}, row))
    assert "1 fault:\n  - line 2: " in error.value.what
    assert says in error.value.what


def test_all_faults_of_a_file_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"3 faults:[\s\S]*line 1: it has no prompt[\s\S]*line 3: unknown key 'sed'"):
        read_batch(lines(tmp_path / "b.jsonl", {"sede": 1}, {"prompt": "b"}, {"prompt": "c", "sed": 2}))


def test_a_file_that_is_not_there_or_empty(tmp_path: Path) -> None:
    lines(tmp_path / "batch.jsonl", "", "")
    with pytest.raises(DataError, match=r"did you mean .*batch.jsonl"):
        read_batch(tmp_path / "bach.jsonl")
    with pytest.raises(DataError, match="has no lines"):
        read_batch(tmp_path / "batch.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_batch(tmp_path)
