"""`veneer eval`: the table, the JSON object, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.run import run
from tests.families import llama3
from tests.tiny_base import tiny_base_dir, tiny_tokenizer
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.formats import peft
from veneer.models.text.base import load_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with a base, an adapter for the base, and a few held-out rows."""
    folder = tmp_path_factory.mktemp("eval")
    base = load_text(str(tiny_base_dir(folder)))
    adapter = create(base.model, LoraSpec(rank=2), seed=0)
    for pair in adapter.pairs.values():
        pair.B.fill_(0.1)
    adapter.card.base, adapter.card.base_fingerprint = str(folder / "tiny-base"), base.fingerprint
    peft.write_folder(adapter, folder / "mine", base_name=str(folder / "tiny-base"), base=base.model)
    rows = [{"prompt": f"Ticket {i}", "completion": json.dumps({"team": "it"})} for i in range(5)]
    (folder / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_json_has_base_and_each_mix(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, held = str(folder / "mine"), str(folder / "held.jsonl")
    options = ["--base", str(folder / "tiny-base"), "--adapter", mine, "--adapter", f"{mine}:0.5", "--data", held]
    result = json.loads(run(capsys, "eval", *options, "-n", "4", "--json", "--answers").out)
    assert list(result) == ["base", mine, f"{mine}:0.5"]
    for scores in result.values():
        assert scores["rows"] == 5
        assert {"exact_match", "valid_json", "loss", "perplexity", "json_fields"} <= scores.keys()
        assert len(scores["answers"]) == 5
    assert len({s["loss"] for s in result.values()}) == 3


def test_base_defaults_to_the_adapters_base(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(
        capsys, "eval", "--adapter", str(folder / "mine"), "--data", str(folder / "held.jsonl"), "--loss-only"
    ).out
    for word in ("base", "mine", "loss", "perplexity", "rows"):
        assert word in out
    assert "exact match" not in out


def test_answers_are_scored_by_field(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, held = str(folder / "mine"), str(folder / "held.jsonl")
    out = run(capsys, "eval", "--adapter", f"{mine}:0.3", "--data", held, "-n", "3", "--limit", "2").out
    assert "exact match" in out
    assert "team right" in out


def test_a_foreign_adapter_is_refused_with_both_fingerprints(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    llama3(hidden_size=64, vocab_size=384, architectures=["LlamaForCausalLM"]).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    held = str(folder / "held.jsonl")
    err = run(
        capsys, "eval", "--base", str(other), "--adapter", str(folder / "mine"), "--data", held, "--loss-only", code=2
    ).err
    assert "belongs to another base" in err
    assert err.count("sha256:") >= 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "no base"), (["--base", "x"], "nothing to evaluate on"), (["--base", "x", "--data", "no.jsonl"], "no.jsonl")],
)
def test_missing_parts_are_reported(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in run(capsys, "eval", *arguments, code=2).err


@pytest.mark.parametrize("more", [["--loss-only"], ["-n", "2"]])
def test_an_overflow_names_its_adapter(
    more: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = load_text(str(folder / "tiny-base"))
    adapter = create(base.model, LoraSpec(rank=2), seed=0)
    for pair in adapter.pairs.values():
        pair.B.fill_(1e36)  # valid in float32, but its products overflow
    peft.write_folder(adapter, tmp_path / "loud", base_name=str(folder / "tiny-base"), base=base.model)
    held = str(folder / "held.jsonl")
    asked = ("--base", str(folder / "tiny-base"), "--adapter", "loud:9000", "--data", held, *more)
    said = run(capsys, "eval", *asked, code=2).err
    assert "finite" in said
    assert "loud:9000" in said
