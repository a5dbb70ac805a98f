"""Texts from files are escaped before they are printed to a terminal or page."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch

from tests.cli.run import run
from tests.edits import edit_json
from tests.formats.twins import linear_pairs
from veneer.cli import output
from veneer.errors import AdapterError, VeneerError, shown
from veneer.files.safetensors import encode_tensors
from veneer.formats import peft

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil\u2066\x7f\nok      contents   all is well\r[bold red]x[/]"
ESCAPES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
TO_Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def hostile(tmp_path: Path) -> list[Path]:
    """Create a valid file, an invalid file and a folder, all with escape sequences in their metadata."""
    metadata = {
        "modelspec.title": EVIL,
        "modelspec.trigger_phrase": EVIL,
        "modelspec.license": EVIL,
        "ss_output_name": EVIL,
        "ss_base_model_version": EVIL,
        "ss_network_module": EVIL,
        "modelspec.architecture": EVIL,
        "veneer.card": json.dumps({"base": EVIL, "trigger_words": [EVIL], "licence": EVIL, "created": EVIL}),
    }
    pair = {f"{TO_Q}.lora_down.weight": torch.ones(2, 6), f"{TO_Q}.lora_up.weight": torch.ones(4, 2)}
    most = {  # at least half of the names must match for a family to be recognized
        f"lora_unet_{block}_1_transformer_blocks_0_attn1_{to}.lora_{side}.weight": torch.ones(*shape)
        for block in [*(f"input_blocks_{n}" for n in (1, 2, 4, 5, 7, 8)), *(f"output_blocks_{n}" for n in range(3, 12))]
        for to in ("to_q", "to_k", "to_v")
        for side, shape in (("down", (2, 6)), ("up", (6, 2)))
    }
    stray = {f"\u202e\x9b31m{i}.lora_down.weight": torch.ones(2, 6) for i in range(40)}
    good, bad, folder = tmp_path / "good.safetensors", tmp_path / "bad.safetensors", tmp_path / "folder"
    good.write_bytes(b"".join(encode_tensors(pair, metadata)))
    bad.write_bytes(b"".join(encode_tensors(most | stray, metadata)))
    peft.write_folder(linear_pairs(["a.q_proj"]), folder)
    edit_json(folder / peft.CONFIG_FILE, **{EVIL: EVIL, "base_model_name_or_path": EVIL})
    return [good, bad, folder]


def checked(command: list[str], code: int, out: str, err: str) -> None:
    text = out + err
    assert code in (0, 2), text
    assert ESCAPES.search(text) is None, (command, ESCAPES.search(text), text)
    assert not re.search(r"^ok +contents +all is well", text, re.M), text
    if "--json" in command and out:
        assert json.loads(out)["card"]["trigger_words"][0].startswith("\x1b]0;owned")


def test_hostile_file_is_escaped_by_every_command(hostile, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    for path in hostile:
        for command in (
            ["adapter", "inspect"],
            ["adapter", "inspect", "--json"],
            ["adapter", "verify"],
            ["adapter", "convert", "--to", "comfyui", "-o", str(tmp_path / "out.safetensors")],
            ["library", "add"],
        ):
            ran = run(capsys, *command, str(path), code=None)
            checked([*command, str(path)], ran.code, ran.out, ran.err)


def test_escaped_output_is_readable(hostile, capsys):
    text = run(capsys, "adapter", "inspect", str(hostile[0])).out
    assert text.splitlines()[0] == "usable"
    assert r"licence      \u001b]0;owned\u0007" in text


def test_long_list_is_cut_unless_all_is_given(hostile, capsys):
    ran = run(capsys, "adapter", "inspect", str(hostile[1]), code=2)
    assert ran.out.startswith("refused: the adapter cannot be read completely (40 problem(s)):")
    assert "and 20 more (--all shows them)" in ran.out
    whole = run(capsys, "adapter", "inspect", "--all", str(hostile[1]), code=2)
    assert len(re.findall("^unused: ", whole.out, re.M)) == 40
    assert "more (--all" not in whole.out
    refused = run(
        capsys, "adapter", "convert", "--to", "peft", "-o", str(hostile[1].with_name("o")), str(hostile[1]), code=2
    )
    assert "where: " in refused.err
    assert "fix: " in refused.err
    assert len(refused.err.splitlines()) < 60


@pytest.mark.parametrize("text", ["plain", "ünï 漢字 🙂", "عربي\u200f", "a\tb"])
def test_plain_text_is_unchanged(text):
    assert shown(text, lines=True) == text


def test_stream_passes_progress_lines_only():
    inner = io.StringIO()
    stream = output.Guarded(inner)
    print("\rstep 1\rstep 2\n\x1b[31mred", file=stream, end="")
    assert inner.getvalue() == "\rstep 1\rstep 2\n\\u001b[31mred"
    assert output.unwrapped(stream) is inner  # type: ignore[arg-type]


def test_errors_are_escaped():
    assert "\x1b" not in str(VeneerError("a\x1b", where="b\x9b", fix="c\u202e"))
    assert "\x1b" not in output.error_text(AdapterError("a\x1b\nb", where="w\x1b", fix="f\x1b"))


def test_console_and_report_escape_text():
    from rich.console import Console

    from veneer.train.events import Note
    from veneer.train.report.log import ConsoleView
    from veneer.train.report.page import Page, render_page

    seen = io.StringIO()
    ConsoleView(Console(file=seen, force_terminal=True, color_system=None, width=300))(Note(text=EVIL))
    assert ESCAPES.search(seen.getvalue()) is None
    assert "[bold red]x[/]" in seen.getvalue()
    page = render_page(Page(title=EVIL, cards=[(EVIL, "<script>", "")], records=[{"event": "note", "text": EVIL}]))
    assert ESCAPES.search(page) is None
    assert "<script>" not in page
