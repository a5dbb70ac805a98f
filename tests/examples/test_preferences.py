"""Preference pairs have their documented properties, and the example runs on a tiny base."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import script_module
from tests.test_readme import roomy
from tests.tiny_base import tiny_base_dir

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def script(path: Path) -> ModuleType:
    return script_module(path)


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[dict[str, Any]]]:
    files = {side: EXAMPLES / "tickets" / f"preferences-{side}.jsonl" for side in ("train", "test")}
    return {side: [json.loads(line) for line in file.read_text().splitlines()] for side, file in files.items()}


def test_script_reproduces_the_committed_files() -> None:
    script(EXAMPLES / "tickets" / "make_preferences.py").main(["--check"])


def test_chosen_replies_are_short_and_polite(pairs: dict[str, list[dict[str, Any]]]) -> None:
    polite = script(EXAMPLES / "preferences.py").POLITE
    for rows in pairs.values():
        kinds = set()
        for row in rows:
            assert polite.search(row["chosen"])
            assert len(row["chosen"].split()) < 30
            long, curt = len(row["rejected"].split()) > 60, not polite.search(row["rejected"].split(".")[0])
            assert long or curt
            kinds.add((long, curt))
        assert len(kinds) == 3  # so neither length nor politeness alone identifies the chosen reply


def test_train_and_test_share_no_sentence_or_ticket(pairs: dict[str, list[dict[str, Any]]]) -> None:
    def sentences(rows: list[dict[str, Any]]) -> set[str]:
        return {s for row in rows for side in ("chosen", "rejected") for s in re.split(r"(?<=\.) ", row[side])}

    assert not sentences(pairs["train"]) & sentences(pairs["test"])
    tickets = [{row["prompt"][-1]["content"] for row in rows} for rows in pairs.values()]
    assert not tickets[0] & tickets[1]
    assert [len(t) for t in tickets] == [240, 80]


def test_the_preferences_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = roomy(tiny_base_dir(tmp_path))
    config = (EXAMPLES / "tickets" / "preferences.yaml").read_text(encoding="utf-8")
    folder = EXAMPLES / "tickets"
    held_out = (folder / "preferences-test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(held_out[:8]), encoding="utf-8")
    for old, new in (
        ("train: preferences-train.jsonl", f"limit: 12\n  train: {folder / 'preferences-train.jsonl'}"),
        ("validation: preferences-test.jsonl", f"validation: {tmp_path / 'test.jsonl'}"),
        ("max_length: 512", "max_length: 1024"),
        ("rows: 40", "rows: 4"),
    ):
        assert old in config
        config = config.replace(old, new)
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    script(EXAMPLES / "preferences.py").main(
        ["--base", str(base), "--config", "config.yaml", "--output", "runs/p", "--tickets", "4", "--tokens", "8"]
    )
    printed = capsys.readouterr().out
    for words in (
        "4 held-out tickets",
        "words in a reply",
        "polite phrase",
        "likelier",
        "gained",
        "log p of the chosen",
    ):
        assert words in printed
    assert (tmp_path / "runs" / "p" / "adapter_model.safetensors").is_file()
