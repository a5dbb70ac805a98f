"""Reading data files of every kind for text runs, and errors for invalid files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.train.text.test_rows import TURNS, jsonl, wrong
from veneer.errors import DataError
from veneer.train.config.image import ImageDataSection
from veneer.train.image.pictures import count_pictures
from veneer.train.records import count_lines, count_records, data_stamp
from veneer.train.text.rows import data_digest, read_rows


def test_every_file_kind_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"What, is {i}?\nNow", "completion": f'a "{i}" é'} for i in range(5)]
    lines = jsonl(tmp_path, rows)
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows, indent=1))
    table = tmp_path / "rows.csv"
    quoted = ('"' + r["prompt"] + '","' + r["completion"].replace('"', '""') + '"' for r in rows)
    table.write_text("prompt,completion\n" + "\n".join(quoted), encoding="utf-8")
    tabs = tmp_path / "rows.tsv"
    tabs.write_text(table.read_text("utf-8").replace('","', '"\t"').replace("prompt,", "prompt\t"), encoding="utf-8")
    columns = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), columns)
    digests = {data_digest(read_rows(str(f))[0]) for f in (lines, array, table, tabs, columns)}
    assert len(digests) == 1
    assert read_rows(str(table))[0][1].where.endswith("rows.csv:4")
    assert read_rows(str(array))[0][1].where.endswith("rows.json row 2")


def test_globs_folders_several_files_and_a_limit(tmp_path: Path) -> None:
    for i in range(3):
        jsonl(tmp_path, [{"text": f"{i}-{j}"} for j in range(4)], f"part{i}.jsonl")
    rows, _ = read_rows(str(tmp_path / "part*.jsonl"))
    assert [r.text for r in rows[:5]] == ["0-0", "0-1", "0-2", "0-3", "1-0"]
    assert [r.text for r in read_rows(str(tmp_path))[0]] == [r.text for r in rows]
    assert len(read_rows([str(tmp_path / "part0.jsonl"), str(tmp_path / "part1.jsonl")], limit=6)[0]) == 6


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_byte_order_marks_line_ends_and_blank_lines_are_accepted(tmp_path: Path, ending: str) -> None:
    file = tmp_path / "rows.jsonl"
    lines = ['{"text": "a\u2028b"}', "", '{"text": "c"}', "   ", ""]
    file.write_bytes(b"\xef\xbb\xbf" + ending.join(lines).encode())
    rows, _ = read_rows(str(file))
    assert [r.text for r in rows] == ["a\u2028b", "c"]
    assert rows[1].where.endswith(":3")
    table = tmp_path / "rows.csv"
    table.write_bytes(b"\xef\xbb\xbf" + ending.join(["text", "", "a", ",", "b"]).replace(",", " ").encode())
    assert [r.text for r in read_rows(str(table))[0]] == ["a", "b"]


def test_bad_lines_are_listed_with_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n{"text": "b"\n[1]\n{"text": c}\n')
    text = wrong(str(file))
    assert text.startswith("3 malformed row(s):")
    assert "rows.jsonl:2: not valid JSON" in text
    assert "rows.jsonl:3: expected a JSON object, found list" in text
    assert "rows.jsonl:4: not valid JSON: Expecting value at column 10" in text
    file.write_text("{\n" * 30)
    assert "and 10 more" in wrong(str(file))


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (r'{"text": "so \ud83d"}', "half of a surrogate pair"),
        (r'{"messages": [{"role": "user", "\uDe00": 1}]}', "half of a surrogate pair"),
        ('{"weight": ' + "9" * 5000 + "}", "a number with too many digits"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
    ids=["half a text", "half a key", "digits", "depth"],
)
def test_unusable_json_values_are_named(tmp_path: Path, row: str, what: str) -> None:
    """JavaScript can split an emoji into lone surrogates. Complete surrogate pairs and U+FFFD are valid."""
    good = r'{"text": "\ud83d\ude00 😀 \\ud83d"}'
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(f"{good}\n{row}\n{good}\n", encoding="utf-8")
    array.write_text(f"[{good},\n{row}]", encoding="utf-8")
    assert f"rows.jsonl:2: {what}" in wrong(str(lines))
    assert what in wrong(str(array))
    lines.write_text(good, encoding="utf-8")
    assert read_rows(str(lines))[0][0].text == "😀 😀 \\ud83d"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("empty.jsonl", b"\n\n", "the data file is empty"),
        ("header.csv", b"prompt,completion\n", "this file has no rows"),
        ("array.json", b"[]", "this file has no rows"),
        ("x.txt", b"a", "unknown kind of data file `.txt`"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "bad.jsonl:2"),
        ("utf16.jsonl", '{"text": "Gr\u00fc\u00dfe"}\n'.encode("utf-16"), "not UTF-8 text"),
        ("cut.json", b'[{"text": "a"},\n {"text": "b"}', "cut.json:2: not valid JSON"),
        ("cut.json", b'[{"text": "a"},\n {"text": "b]', "cut.json:2: not valid JSON"),
        ("ragged.csv", b"prompt,completion\na,b\nc\n", "ragged.csv:3: 1 cells, but the header has 2"),
        ("ragged.csv", b"prompt,completion\na,b\n\nd,e,f\n", "ragged.csv:4: 3 cells"),
        ("fake.parquet", b"hello", "not a Parquet file"),
        ("pointer.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert what in wrong(str(tmp_path / name))


def test_missing_files_are_refused(tmp_path: Path) -> None:
    jsonl(tmp_path, [{"text": "x"}], "tickets.jsonl")
    assert f"did you mean {tmp_path / 'tickets.jsonl'}?" in wrong(str(tmp_path / "ticket.jsonl"))
    assert "matches no file" in wrong(str(tmp_path / "*.parquet"))
    assert "does not exist" in wrong(str(tmp_path / "no" / "x.jsonl"))
    with pytest.raises(DataError, match="the data file does not exist"):
        read_rows("x" * 1500)
    with pytest.raises(DataError, match="the folder does not exist"):
        count_pictures(ImageDataSection(pictures="x" * 1500))


@pytest.mark.parametrize("mark", [";", "\t", ","])
def test_csv_delimiters_are_detected(tmp_path: Path, mark: str) -> None:
    """In locales with a decimal comma, spreadsheets separate cells with semicolons."""
    table = tmp_path / "rows.csv"
    price = "2.5 EUR" if mark == "," else "2,5 EUR"
    table.write_text(f'prompt{mark}completion\n"1{mark}5 kg"{mark}{price}\n')
    (row,), _ = read_rows(str(table))
    assert [m["content"] for m in row.messages] == [f"1{mark}5 kg", price]


def test_an_unavailable_hub_data_set_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no network here")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert "the hub data set `org/set` cannot be loaded: no network here" in wrong("hub:org/set@train")


def test_a_dataset_of_the_hub_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(ident: str, subset: str | None, *, split: str) -> Any:
        asked.append((ident, subset, split))
        return datasets.Dataset.from_list([{"messages": TURNS}] * 5)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows, about = read_rows("hub:org/set:en@test[:5]", limit=3)
    assert asked == [("org/set", "en", "test[:5]")]
    assert (len(rows), about.format) == (3, "messages")
    assert rows[0].where == "hub:org/set:en@test[:5] row 1"


def test_lines_are_counted_across_chunks(tmp_path: Path) -> None:
    file, draw = tmp_path / "rows.jsonl", random.Random(0)
    for _ in range(300):
        data = b"".join(draw.choices([b"\n", b" ", b"\r\n", b"x", b"xyz", b"\t"], k=draw.randrange(16)))
        file.write_bytes(data)
        wanted = sum(bool(line.strip()) for line in data.split(b"\n"))
        assert count_lines(file, 100, chunk=5) == wanted
        assert count_lines(file, 2, chunk=5) == min(wanted, 2)


def test_rows_are_counted_and_file_changes_detected(tmp_path: Path) -> None:
    jsonl(tmp_path, [{"text": f"row {i}"} for i in range(7)])
    (tmp_path / "more.csv").write_text("text\na\nb\n")
    names = [str(tmp_path / "*.jsonl"), str(tmp_path / "more.csv")]
    assert count_records(names) == len(read_rows(names)[0])
    assert count_records(["hub:org/set"]) is None
    before = data_stamp(names)
    (tmp_path / "more.csv").write_text("text\na\nb\nc\n")
    assert data_stamp(names) != before


def test_only_the_first_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('\n{"text": "a"}\n\n{"text": "b"}\nthis is no JSON\n')
    rows, _ = read_rows(str(tmp_path / "rows.jsonl"), limit=2)
    assert [row.where for row in rows] == [f"{tmp_path}/rows.jsonl:2", f"{tmp_path}/rows.jsonl:4"]
