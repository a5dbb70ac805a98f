"""Shards read from files equal the shards of the full weight, bit for bit."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.tiny_base import tiny_base_dir
from veneer.errors import BaseError
from veneer.files.safetensors import write_tensors
from veneer.files.weights import read_values, tensor_table
from veneer.models.quantize import load_quantized
from veneer.models.shard import blocks, shard
from veneer.models.sharded_weights import ShardReader, shard_rows
from veneer.models.text.base import load_text, read_base_config
from veneer.ops.quantized import Quantized, quantize
from veneer.train.devices import launch

COUNT = 3
KINDS = {"": "bfloat16", "nf4": "bfloat16", "fp4": "float32", "int8": "bfloat16"}


@given(st.integers(0, 300), st.integers(1, 9))
def test_shard_rows_match_torch_chunk(n: int, count: int) -> None:
    whole = torch.arange(n)
    parts = [whole[slice(*shard_rows(n, rank, count))] for rank in range(count)]
    assert torch.equal(torch.cat(parts), whole)
    chunks = whole.chunk(count) if n else ()
    assert all(torch.equal(a, b) for a, b in zip(parts, chunks, strict=False))


def test_changed_file_is_refused(tmp_path: Path) -> None:
    """Covers a replaced file of the same size and shapes, and a file changed in place."""
    file = tmp_path / "model.safetensors"
    values = {"weight": torch.zeros(4, 4), "other": torch.zeros(4, 4)}
    write_tensors(file, values)
    for change in ("replaced", "written"):
        unread = ShardReader({t.name: t for t in tensor_table(tmp_path)}, "", torch.float32)
        assert torch.equal(unread.read_full("weight", torch.device("cpu")), values["weight"])
        if change == "replaced":
            write_tensors(file, {name: value + 1 for name, value in values.items()})
        else:
            file.write_bytes(file.read_bytes())
            before = file.stat()
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))  # file timestamps can be coarse
        with pytest.raises(BaseError, match="has changed since the base was found"):
            unread.read_full("other", torch.device("cpu"))
        values = {name: value + 1 for name, value in values.items()}


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", ""])
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (7, 64), (130, 129), (1, 1), (64, 300)])
def test_weight_shards_are_bit_equal_to_the_whole(kind: str, rows: int, columns: int, tmp_path: Path) -> None:
    """Covers blocks that two shards share, and more shards than rows."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    write_tensors(tmp_path / "model.safetensors", {"weight": weight})
    (stored,) = tensor_table(tmp_path)
    whole: list[Tensor] = [weight.bfloat16()]
    absent: Tensor = whole[0].to("meta")
    if kind:
        made = quantize(whole[0], kind)
        whole, absent = list(made.stored.tensors().values()), made.like(made.stored.moved(lambda t: t.to("meta")))
    for count in (2, 3, 5):
        reader = ShardReader({"weight": stored}, kind, torch.bfloat16)
        for rank in range(count):
            parts = reader.part(["weight"], absent, rank, count, torch.device("cpu"))
            for part, tensor in zip(parts, whole, strict=True):
                flat = tensor.reshape(tensor.shape or 1)
                assert torch.equal(part, flat[slice(*shard_rows(len(flat), rank, count))])
        assert reader.bytes_read == stored.size * (count if kind else 1)


def local_parts(model: nn.Module) -> dict[str, Any]:
    return {name: p.to_local() for name, p in model.named_parameters() if hasattr(p, "to_local")}


def logits_of(model: Any) -> Tensor:
    out: Tensor = model(input_ids=torch.arange(3, 20)[None], use_cache=False).logits
    return out


def main(folder: Path) -> None:
    """In each process, compare shards read from files with shards of the full base."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    where, device, found = str(tiny_base_dir(folder)), torch.device("cpu"), {}
    for kind, dtype in KINDS.items():
        base = load_text(where, dtype=dtype, device="cpu", quantize=kind or None, parts=COUNT)
        assert base.unread is not None, base.notes
        call = shard(base.model, blocks(base.model), device, base.unread)
        whole = load_text(where, dtype=dtype, device="cpu", quantize=kind or None)
        before = {n: b.clone() for n, b in whole.model.named_buffers()}
        held = shard(whole.model, blocks(whole.model), device)
        mine, theirs = local_parts(base.model), local_parts(whole.model)
        assert mine.keys() == theirs.keys()
        assert mine
        for name, part in mine.items():
            assert part.dtype == theirs[name].dtype, name
            assert torch.equal(part, theirs[name]), name
        for name, buffer in base.model.named_buffers():
            assert torch.equal(buffer, before[name]), name
        assert torch.equal(call(logits_of, base.model), held(logits_of, whole.model))
        found[kind] = [base.unread.bytes_read, base.fingerprint == whole.fingerprint]
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_three_shards_equal_the_whole_model(tmp_path: Path) -> None:
    stored = sum(t.size for t in tensor_table(tiny_base_dir(tmp_path)))
    assert launch(COUNT, [sys.executable, "-m", "tests.models.test_sharded_weights", str(tmp_path)]) == 0
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(COUNT)]
    for kind in KINDS:
        read = [each[kind][0] for each in seen]
        assert stored <= sum(read) <= stored * (COUNT if kind else 1)
        assert all(each[kind][1] for each in seen)


def test_renamed_families_are_read_whole_with_a_note(tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    weights = {t.name: read_values(t) for t in tensor_table(folder)}
    file = next(folder.glob("*.safetensors"))
    first, *_ = sorted(n for n in weights if n.endswith("q_proj.weight"))
    write_tensors(file, {n.replace("model.", "", 1) if n != first else n: t for n, t in weights.items()})
    base = load_text(str(folder), device="cpu", parts=2)
    assert base.unread is None
    assert any("each process reads all of the weights" in note for note in base.notes)


@pytest.mark.parametrize("kind", ["", "nf4"])
def test_rows_and_full_weights_equal_those_in_files(kind: str, tmp_path: Path) -> None:
    folder = tiny_base_dir(tmp_path)
    base = load_text(str(folder), dtype="float32", device="cpu", quantize=kind or None, parts=2)
    assert base.unread is not None
    assert all(p.is_meta for p in base.model.parameters())
    model, _ = load_quantized(folder, read_base_config(folder), tensor_table(folder), kind, torch.float32)
    name = "model.embed_tokens.weight"
    own = model.get_parameter(name)
    assert torch.equal(base.unread.rows(name, [3, 0]).float(), own[[3, 0]])
    assert torch.equal(base.unread.read_full(name, torch.device("cpu")), own)
    quantized = [n for n, p in base.model.named_parameters() if isinstance(p, Quantized)]
    assert quantized == [n for n, p in model.named_parameters() if isinstance(p, Quantized)]


def test_model_with_float32_weights_is_read_whole(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, device="meta")
    model._keep_in_fp32_modules = ["weight"]  # type: ignore[assignment]
    write_tensors(tmp_path / "model.safetensors", {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
    assert "float32" in str(ShardReader.for_model(model, tensor_table(tmp_path), "", torch.bfloat16))
    assert "no bias" in str(
        ShardReader.for_model(nn.Linear(2, 2, device="meta"), tensor_table(tmp_path)[1:], "", torch.bfloat16)
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
