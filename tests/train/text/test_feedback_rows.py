"""Feedback on completions becomes training rows; invalid feedback does not change its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.run import run
from veneer.errors import DataError
from veneer.train.text.feedback_rows import add_row, corrected_row, feedback_file, preference_row
from veneer.train.text.rows import read_rows

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is my parcel?\n"}]


def test_votes_and_corrections_are_training_rows(tmp_path: Path) -> None:
    votes, corrections = tmp_path / "new" / "votes.jsonl", tmp_path / "corrections.jsonl"
    assert [add_row(votes, preference_row(ASKED, f"By noon, {n}.", "Soon.")) for n in range(3)] == [1, 2, 3]
    assert add_row(corrections, corrected_row(ASKED, "By noon, at your door: \u201cü\u201d.")) == 1
    rows, about = read_rows([str(votes)])
    assert (len(rows), about.format) == (3, "preference")
    rows, about = read_rows([str(corrections)])
    assert (len(rows), about.format) == (1, "messages")
    assert json.loads(corrections.read_text())["messages"][:2] == ASKED


def test_each_base_has_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VENEER_HOME", str(tmp_path))
    bases = ("smollm2-135m", "org/Base", "../../etc", "..")
    files = [feedback_file(base, kind) for base in bases for kind in ("preference", "messages")]
    assert len(set(files)) == len(files)
    assert all(file.parent.parent == tmp_path / "judged" for file in files)


def test_row_begins_a_new_line_after_an_unfinished_one(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    file.write_text(json.dumps(preference_row(ASKED, "a", "b")))
    assert add_row(file, preference_row(ASKED, "c", "d")) == 2
    assert len(read_rows([str(file)])[0]) == 2


def test_refused_row_changes_no_file(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    add_row(file, preference_row(ASKED, "a", "b"))
    before = file.read_bytes()
    with pytest.raises(DataError, match="rows in `preference` format, but the new row has `messages` format"):
        add_row(file, corrected_row(ASKED, "c"))
    assert file.read_bytes() == before
    with pytest.raises(DataError, match="both answers are the same"):
        preference_row(ASKED, "a", "a")
    with pytest.raises(DataError, match="the answer is empty"):
        corrected_row(ASKED, "  ")
    with pytest.raises(DataError, match="prompt is empty"):
        corrected_row([], "a")
    with pytest.raises(DataError, match=r"ends in \.jsonl"):
        add_row(tmp_path / "votes.csv", preference_row(ASKED, "a", "b"))
    assert not (tmp_path / "votes.csv").exists()


def test_data_add_command_writes_the_same_rows(capsys: Any, tmp_path: Path) -> None:
    votes, corrections = str(tmp_path / "votes.jsonl"), str(tmp_path / "corrections.jsonl")
    arguments = [votes, "Where?", "--system", "Be brief.", "--chosen", "By noon.", "--rejected", "Soon."]
    assert json.loads(run(capsys, "data", "add", *arguments, "--json").out) == {"file": votes, "rows": 1}
    assert "1 row" in run(capsys, "data", "add", corrections, "Where?", "--answer", "By noon.").out
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    assert json.loads(Path(votes).read_text()) == preference_row(messages, "By noon.", "Soon.")
    assert json.loads(Path(corrections).read_text()) == corrected_row(messages[1:], "By noon.")
    for wrong in (["--chosen", "a"], [], ["--chosen", "a", "--rejected", "b", "--answer", "c"]):
        run(capsys, "data", "add", votes, "Where?", *wrong, code=2)
