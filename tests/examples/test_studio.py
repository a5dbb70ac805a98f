"""`make studio`, up to the opening of the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scripts import script_module
from tests.serve.saved_adapters import saved
from tests.tiny_base import tiny_base_dir
from veneer.library.library import open_library
from veneer.models.text.base import load_text

ROOT = Path(__file__).resolve().parents[2]


def test_the_studio_example_registers_the_quickstart_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    studio = script_module(ROOT / "examples" / "studio.py", "studio_example")
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    ran: list[list[str]] = []
    given = ["--output", str(tmp_path / "run"), "--no-browser", "--port", "8123"]
    studio.main(given, ran.append)  # asks no question, because stdin is not a terminal
    assert ran == [["studio", "--base", "smollm2-135m", "--port", "8123", "--no-browser"]]
    saved(load_text(str(tiny_base_dir(tmp_path))), tmp_path / "run" / "adapter")
    for _ in range(2):
        studio.main(given, ran.append)
    with open_library() as library:
        assert [v.reference for v in library.search()] == [f"{studio.NAME}@1"]
    assert capsys.readouterr().out.count("in the library") == 1
