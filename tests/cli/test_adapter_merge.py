"""`veneer adapter merge` for adapters that were trained over a 4-bit base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.cli.run import Ran, run
from tests.qlora import qlora_run
from veneer.formats.card import CARD_FILE
from veneer.models.text.base import load_text

Qlora = tuple[Path, str, Path]


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Qlora:
    return qlora_run(tmp_path_factory.mktemp("merging"))


def test_a_merge_follows_the_card_unless_into_original_is_given(
    qlora: Qlora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, adapter, _ = qlora

    def merge(*more: str, code: int = 0) -> Ran:
        return run(capsys, "adapter", "merge", adapter, "--base", str(folder), *more, code=code)

    assert "merged into the dequantized nf4 weights" in merge("-o", str(tmp_path / "m")).out
    assert "dequantized" not in merge("--into", "original", "-o", str(tmp_path / "o")).out
    merge(code=2)


def test_a_card_with_the_old_spelling_merges_into_its_weights(
    qlora: Qlora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, adapter, _ = qlora
    older = tmp_path / "older"
    shutil.copytree(adapter, older)
    card = json.loads((older / CARD_FILE).read_text(encoding="utf-8"))
    card["recipe"]["base"]["quantise"] = card["recipe"]["base"].pop("quantize")
    (older / CARD_FILE).write_text(json.dumps(card), encoding="utf-8")
    ran = run(capsys, "adapter", "merge", str(older), "--base", str(folder), "-o", str(tmp_path / "m"))
    assert "merged into the dequantized nf4 weights" in ran.out


def test_adapters_of_different_precisions_merge_into_original_weights_only(
    qlora: Qlora, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, adapter, _ = qlora
    plain = tmp_path / "plain"
    shutil.copytree(adapter, plain)
    card = json.loads((plain / CARD_FILE).read_text(encoding="utf-8"))
    del card["recipe"]["base"]["quantize"]
    (plain / CARD_FILE).write_text(json.dumps(card), encoding="utf-8")

    def merge(to: str, adapters: tuple[str, ...], *more: str, code: int = 0) -> Ran:
        asked = (*adapters, "--base", str(folder), "-o", str(tmp_path / to), *more)
        return run(capsys, "adapter", "merge", *asked, code=code)

    both, exactly = (adapter, f"{plain}:0.5"), ("--into", "original", "--dtype", "float32")
    refused = merge("m", both, code=2)
    assert "different precisions" in refused.err
    assert "--into original" in refused.err
    merge("m", both, *exactly)
    merge("t", (f"{adapter}:1.5",), *exactly)
    one, other = (load_text(str(tmp_path / name), dtype="float32").model.state_dict() for name in "mt")
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-5, atol=1e-6)
