"""Merging adapters trained over a 4-bit base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.qlora import qlora_run
from veneer.adapters import use as using
from veneer.adapters.merge import compare_merges, merge, merge_shards, merged_model
from veneer.models.text.base import TextBase, load_text
from veneer.train.config.text import DataSection
from veneer.train.text.encode import Example, encode_rows
from veneer.train.text.rows import read_rows

Qlora = tuple[Path, str, Path]


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Qlora:
    return qlora_run(tmp_path_factory.mktemp("merging"))


def examples_of(base: TextBase, rows: Path) -> list[Example]:
    return encode_rows(read_rows([str(rows)])[0][:6], base.tokenizer, DataSection(train="-")).examples


def test_merge_into_dequantized_base_equals_unmerged(qlora: Qlora, tmp_path: Path) -> None:
    folder, adapter, rows = qlora
    base = load_text(str(folder), dtype="float32", quantize="nf4")
    original = load_text(str(folder), dtype="float32")
    examples = examples_of(base, rows)
    found = compare_merges(base, [adapter], examples, original=original)
    assert set(found) == {"seen", "original"}
    assert found["seen"].kl < 1e-8
    assert found["seen"].agree == 1.0
    assert found["seen"].kept == pytest.approx(1.0, abs=1e-4)
    assert found["seen"].unmerged_loss < found["seen"].base_loss
    assert found["original"].kl > 1e3 * max(found["seen"].kl, 1e-12)  # it was trained on other weights
    report = merge(base, [adapter], tmp_path / "m", difference=found)
    assert report.seen == "nf4"
    merged = load_text(str(tmp_path / "m"), dtype="float32")
    assert merged.quantized == ""
    ids = torch.tensor(examples[0].input_ids)[None]
    with using.attach_adapters(base, [adapter]), torch.no_grad():
        torch.testing.assert_close(merged.model(ids).logits, base.model(ids).logits, rtol=1e-4, atol=1e-4)
    written = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert written["seen"] == "nf4"
    assert written["difference"]["original"]["kl"] == found["original"].kl


def test_compare_merges_matches_float64(qlora: Qlora) -> None:
    folder, adapter, rows = qlora
    base = load_text(str(folder), dtype="float32", quantize="nf4")
    original = load_text(str(folder), dtype="float32")
    examples = examples_of(base, rows)
    found = compare_merges(base, [adapter], examples, original=original)["original"]
    kls, nlls = [], []
    with using.attach_adapters(base, [adapter]) as one, using.attach_adapters(original, [adapter]) as two:
        merged = merged_model(original.model, two.selection.mix, torch.float32)
        assert one.selection.mix
        for row in examples:
            ids = torch.tensor(row.input_ids)[None]
            with torch.no_grad():
                p, q = (m(ids).logits[0].double().softmax(-1) for m in (base.model, merged))
            for i, trained in enumerate(row.trained):
                if trained:
                    kls.append(float((p[i - 1] * (p[i - 1] / q[i - 1]).log()).sum()))
                    nlls.append(-float(q[i - 1, row.input_ids[i]].log()))
    assert found.tokens == len(kls)
    assert found.kl == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert found.kl_most == pytest.approx(max(kls), rel=1e-3)
    assert found.loss == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)


def test_merge_by_shard_equals_merge_in_memory(qlora: Qlora, tmp_path: Path) -> None:
    folder, adapter, _ = qlora
    base = load_text(str(folder), dtype="float32", quantize="nf4")
    merge(base, [adapter], tmp_path / "whole")
    report = merge_shards(folder, [adapter], tmp_path / "shards", seen="nf4")
    assert report.seen == "nf4"
    one, two = (load_text(str(tmp_path / n), dtype="float32").model.state_dict() for n in ("whole", "shards"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-7)
