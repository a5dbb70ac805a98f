"""`veneer library …` as a user types it, and the commands on its docs page."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.cli.run import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Create two adapters in PEFT's format, and a separate veneer home."""
    import torch

    from veneer.core.adapter import Adapter, Card, Pair
    from veneer.formats import peft

    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    out = []
    for n in (1, 2):
        pair = Pair(torch.full((2, 3), float(n)), torch.ones(4, 2), 1.0)
        card = Card(base="org/Base", rank=2, alpha=2.0, targets=["q"], trigger_words=["hello"])
        peft.write_folder(Adapter({"model.q": pair}, card=card), tmp_path / f"runs/{n}")
        out.append(tmp_path / f"runs/{n}")
    return out


def result(capsys: Any, *arguments: str) -> Any:
    return json.loads(run(capsys, "library", *arguments, "--json").out)


def test_every_subcommand_gives_json(capsys: Any, adapters: list[Path], tmp_path: Path) -> None:
    first = result(capsys, "add", "runs/1", "support", "--tag", "x", "--alias", "prod")
    assert (first["new"], first["version"]["reference"], first["version"]["aliases"]) == (True, "support@1", ["prod"])
    assert result(capsys, "add", "runs/2", "support")["version"]["version"] == 2
    assert [v["reference"] for v in result(capsys, "list")["versions"]] == ["support@2"]
    found = result(capsys, "search", "hello", "--base", "base", "--tag", "x", "--all-versions")
    assert [v["reference"] for v in found["versions"]] == ["support@1"]
    assert (Path(result(capsys, "show", "support@prod")["path"]) / "adapter_config.json").is_file()
    assert result(capsys, "tag", "support@2", "y", "z")["tags"] == ["y", "z"]
    assert result(capsys, "untag", "support@2", "y")["tags"] == ["z"]
    assert result(capsys, "alias", "support@2", "prod")["aliases"] == ["prod"]
    mixed = result(capsys, "mix", "softer", "support@1:0.6", "support@2:0.4", "--alias", "prod")
    assert (mixed["version"]["reference"], mixed["version"]["aliases"]) == ("softer@1", ["prod"])
    assert mixed["mix"]["error"] < 1e-6
    assert result(capsys, "remove", "softer", "--with-aliases")["removed"] == ["softer@prod", "softer@1"]
    assert result(capsys, "push", "support@prod", str(tmp_path / "there"))["place"] == str(tmp_path / "there")
    digest = result(capsys, "show", "support")["digest"]
    assert result(capsys, "pull", str(tmp_path / "there"), "copy")["version"]["digest"] == digest
    assert result(capsys, "remove", "support@1")["removed"] == ["support@1"]
    assert result(capsys, "gc", "--grace", "0", "--dry-run")["entries"] == 2
    assert result(capsys, "gc", "--grace", "0")["entries"] == 2
    assert result(capsys, "verify")["ok"] is True


def test_text_output_and_error_messages_are_helpful(capsys: Any, adapters: list[Path]) -> None:
    assert run(capsys, "library", "add", "runs/1", "support").out.startswith("support@1  sha256:")
    assert "no new version" in run(capsys, "library", "add", "runs/1", "support").out
    listed = run(capsys, "library", "list").out.splitlines()
    assert listed[0].split() == ["adapter", "aliases", "base", "rank", "gain", "format", "size", "health", "tags"]
    assert "org/Base" in listed[1]
    assert "hello" in run(capsys, "library", "show", "support").out
    assert "did you mean support?" in run(capsys, "library", "show", "suport", code=2).err
    run(capsys, "library", "add", "runs/1", "No Name", code=2)


def test_lists_are_sorted_counted_and_show_health(capsys: Any, adapters: list[Path]) -> None:
    for n in (1, 2):
        result(capsys, "add", f"runs/{n}", f"n{n}", "--tag", "x")
    listed = result(capsys, "list", "--sort", "added", "--limit", "1")
    assert (listed["total"], listed["more"], listed["facets"]["rank"]) == (2, True, {"2": 2})
    assert "… and 1 more: --skip 1" in run(capsys, "library", "list", "--limit", "1").out
    assert "one of name, added, gain" in run(capsys, "library", "list", "--sort", "best", code=2).err
    place = Path(result(capsys, "show", "n1")["path"])
    (place / "adapter_model.safetensors").chmod(0o600)
    (place / "adapter_model.safetensors").write_bytes(b"other bytes")
    ran = run(capsys, "library", "verify", "n1", "n2", code=2)
    assert "n1@1  FAILED    files" in ran.out
    assert "n2@1  ok        contents" in ran.out
    assert [v["name"] for v in result(capsys, "search", "--health", "sound", "--kind", "text")["versions"]] == ["n2"]
    assert [v["name"] for v in result(capsys, "search", "--health", "faulty", "--rank", "2")["versions"]] == ["n1"]
    assert "check files" in run(capsys, "library", "show", "n1").out
    run(capsys, "library", "verify", "n1", "--repair", code=2)


def test_verify_exits_with_2_for_missing_files(capsys: Any, adapters: list[Path], tmp_path: Path) -> None:
    run(capsys, "library", "add", "runs/1", "support")
    for blob in (tmp_path / "home" / "library" / "blobs").glob("*/*"):
        blob.unlink()
    ran = run(capsys, "library", "verify", code=2)
    assert ran.out.count("MISSING") >= 2
    assert "support@1" in ran.out


def test_a_lost_index_is_rebuilt(capsys: Any, adapters: list[Path], tmp_path: Path) -> None:
    run(capsys, "library", "add", "runs/1", "support", "--alias", "prod")
    for file in (tmp_path / "home" / "library").glob("index.sqlite*"):
        file.unlink()
    assert "verify --rebuild" in run(capsys, "library", "list", code=2).err
    assert "1 versions of 1 names" in run(capsys, "library", "verify", "--rebuild").out
    assert result(capsys, "show", "support@prod")["version"] == 1


def test_the_commands_of_the_docs_page_run(capsys: Any, adapters: list[Path], tmp_path: Path) -> None:
    (tmp_path / "runs/1").rename(tmp_path / "runs/quickstart")
    (tmp_path / "runs/2").rename(tmp_path / "runs/second")
    page = (ROOT / "docs" / "how-to" / "library.md").read_text(encoding="utf-8")
    lines = [
        line.split(" #")[0].strip()
        for body in re.findall(r"```\n(.*?)```", page, flags=re.S)
        for line in body.splitlines()
    ]
    ran = 0
    for line in lines:
        if line.startswith("veneer library ") and "hf:" not in line and "://" not in line:
            run(capsys, *shlex.split(line)[1:])
            ran += 1
    assert ran >= 12


def test_an_empty_list_explains_why(capsys: Any, adapters: list[Path]) -> None:
    assert "empty: veneer library add PATH NAME" in run(capsys, "library", "list").out
    run(capsys, "library", "add", "runs/1", "support", "--tag", "x")
    run(capsys, "library", "add", "runs/2", "support")
    assert run(capsys, "library", "search", "--tag", "x").out.strip() == (
        "no latest version matches; matching older versions: 1 (--all-versions)"
    )
    assert run(capsys, "library", "search", "nowhere").out.strip() == "no matches"


def test_layouts_of_other_tools_have_equal_digests(capsys: Any, adapters: list[Path], tmp_path: Path) -> None:
    """The same adapter in three layouts has one digest, and keeps the trigger words of its metadata."""
    import torch

    from veneer.core.adapter import Adapter, Card, Pair
    from veneer.formats import convert

    name = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = Pair(torch.ones(2, 640), torch.ones(640, 2), 0.5)
    adapter = Adapter({name: pair}, card=Card(kind="image", trigger_words=["inkwash"]))
    for layout, file in (("kohya", "a.safetensors"), ("diffusers", "b.safetensors"), ("peft", "c")):
        convert.write(adapter, tmp_path / file, layout, family="sdxl")
        added = result(capsys, "add", str(tmp_path / file), layout)["version"]
        assert (added["digest"], added["format"]) == (adapter.digest(), layout)
        assert added["trigger_words"] == ["inkwash"]
    found = result(capsys, "search", "INKWASH")["versions"]
    assert [v["name"] for v in found] == ["diffusers", "kohya", "peft"]
    run(capsys, "library", "show", adapter.digest()[:15])
