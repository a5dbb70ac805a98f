"""Merging adapters trained over a 4-bit base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.qlora import qlora_run
from veneer.adapters import use as using
from veneer.adapters.merge import merge, merge_shards
from veneer.models.text.base import load_text

Qlora = tuple[Path, str, Path]


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Qlora:
    return qlora_run(tmp_path_factory.mktemp("merging"))


def test_merge_into_dequantized_base_equals_unmerged(qlora: Qlora, tmp_path: Path) -> None:
    folder, adapter, _ = qlora
    base = load_text(str(folder), dtype="float32", quantize="nf4")
    assert merge(base, [adapter], tmp_path / "m").seen == "nf4"
    merged = load_text(str(tmp_path / "m"), dtype="float32")
    assert merged.quantized == ""
    ids = torch.arange(24)[None]
    with using.attach_adapters(base, [adapter]), torch.no_grad():
        torch.testing.assert_close(merged.model(ids).logits, base.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "m" / "merge.json").read_text())["seen"] == "nf4"


def test_merge_by_shard_equals_merge_in_memory(qlora: Qlora, tmp_path: Path) -> None:
    folder, adapter, _ = qlora
    merge(load_text(str(folder), dtype="float32", quantize="nf4"), [adapter], tmp_path / "whole")
    assert merge_shards(folder, [adapter], tmp_path / "shards", seen="nf4").seen == "nf4"
    one, two = (load_text(str(tmp_path / n), dtype="float32").model.state_dict() for n in ("whole", "shards"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-7)
