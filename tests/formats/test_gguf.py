"""GGUF adapters are compatible with llama.cpp's converter, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.formats.test_module_tensors import rand
from tests.tiny_gguf import interleaved
from veneer.core.adapter import Adapter, Pair
from veneer.core.forms import Delta
from veneer.core.merge import pair_matrix
from veneer.errors import AdapterError
from veneer.files.gguf import read_gguf_file
from veneer.formats.gguf import GGUF_ARCHITECTURES, read_gguf, write_gguf

HEAD = 4
Q, K, V = (f"model.layers.11.self_attn.{p}_proj" for p in "qkv")
OUT = {Q: 16, K: 8, V: 8, "model.layers.0.mlp.down_proj": 32, "lm_head": 100}


def adapter(dtype: torch.dtype = torch.float32, scale: float = 0.5, embedding: bool = True) -> Adapter:
    pairs = {n: Pair(rand(2, 32).to(dtype), rand(out, 2).to(dtype), scale) for n, out in OUT.items()}
    if embedding:
        pairs["model.embed_tokens"] = Pair(rand(2, 100).to(dtype), rand(32, 2).to(dtype), scale, "embedding")
    return Adapter(pairs=pairs)


def llama_cpp(path: Path, pairs: dict[str, Pair], alpha: float = 1.0, arch: str = "llama", **more: Any) -> Path:
    """Write a file as llama.cpp's convert_lora_to_gguf does.

    Uses the gguf package's writer and name table. For the architecture llama, permutes the rows of q and
    k."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 12)
    tensors = {}
    for name, pair in pairs.items():
        a, b = pair.A.float().numpy(), pair.B.float().numpy()
        if arch == "llama" and name in (Q, K):
            b = interleaved(b, b.shape[0] // HEAD)
        a = a.T if name == "model.embed_tokens" else a
        for half, value in (("a", a), ("b", b)):
            tensors[f"{table.get_name(name)}.weight.lora_{half}"] = np.ascontiguousarray(value)
    return written(path, tensors, alpha, arch, **more)


def written(path: Path, tensors: dict[str, Any], alpha: float = 1.0, arch: str = "qwen2", **more: Any) -> Path:
    """Write a file with the gguf package. `tensors`: arrays, or (quantized codes, their type)."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for key, value in more.items():
        writer.add_string(key.replace("__", "."), value)
    for name, value in tensors.items():
        raw, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(one: Adapter, two: Adapter) -> None:
    assert sorted(one.pairs) == sorted(two.pairs)
    for name, pair in one.pairs.items():
        other = two.pairs[name]
        assert (pair.kind, pair.rank) == (other.kind, other.rank)
        torch.testing.assert_close(pair_matrix(other), pair_matrix(pair), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arch", GGUF_ARCHITECTURES)
def test_files_in_the_format_of_llama_cpp_are_read(tmp_path, arch):
    ours = adapter()
    if arch in ("gemma", "gemma2"):
        del ours.pairs["lm_head"]  # these architectures tie the head to the embedding
    path = llama_cpp(tmp_path / "x.gguf", ours.pairs, arch=arch, general__name="dog")
    read = read_gguf(path, head_dim=HEAD)
    same(ours, read.adapter)
    assert all(torch.equal(read.adapter.pairs[n].B, p.B) for n, p in ours.pairs.items())
    assert read.adapter.pairs[Q].scale == 0.5
    assert (read.architecture, read.unused) == (arch, [])
    assert (read.adapter.card.rank, read.adapter.card.alpha, read.adapter.card.extra) == (2, 1.0, {"title": "dog"})


def test_delta_rows_are_permuted_like_the_base(tmp_path):
    """Permute W + ΔW as llama.cpp permutes W: the result is the permuted W plus the file's ΔW."""
    ours = adapter()
    write_gguf(ours, tmp_path / "x.gguf", architecture="llama", head_dim=HEAD)
    file = read_gguf_file(tmp_path / "x.gguf")
    for name, heads in ((Q, 4), (K, 2)):
        W, delta = rand(OUT[name], 32).float(), pair_matrix(ours.pairs[name])
        stored = "blk.11.attn_" + ("q" if name == Q else "k") + ".weight.lora_"
        added = 0.5 * file.tensor(stored + "b") @ file.tensor(stored + "a")
        want = interleaved((W + delta).numpy(), heads)
        got = interleaved(W.numpy(), heads) + added.numpy()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_round_trip_is_bit_for_bit(tmp_path, arch, dtype):
    ours = adapter(dtype)
    assert write_gguf(ours, tmp_path / "x.gguf", architecture=arch, head_dim=HEAD, name="dog") == []
    again = read_gguf(tmp_path / "x.gguf").adapter
    for name, pair in ours.pairs.items():
        assert torch.equal(again.pairs[name].A, pair.A)
        assert torch.equal(again.pairs[name].B, pair.B)
        assert again.pairs[name].scale == pair.scale
    before = (tmp_path / "x.gguf").read_bytes()
    write_gguf(ours, tmp_path / "x.gguf", architecture=arch, head_dim=HEAD, name="dog")
    assert (tmp_path / "x.gguf").read_bytes() == before


def test_the_gguf_package_reads_what_is_written(tmp_path):
    ours = adapter()
    write_gguf(ours, tmp_path / "x.gguf", architecture="llama", head_dim=HEAD)
    theirs = gguf.GGUFReader(tmp_path / "x.gguf")
    assert theirs.fields["general.type"].contents() == "adapter"
    assert theirs.fields["adapter.lora.alpha"].contents() == 1.0
    tensors = {t.name: t for t in theirs.tensors}
    assert tensors["token_embd.weight.lora_a"].shape.tolist() == [2, 100]  # in ggml's order: rank, rows
    assert tensors["token_embd.weight.lora_b"].shape.tolist() == [2, 32]
    A = torch.from_numpy(np.array(tensors["blk.0.ffn_down.weight.lora_a"].data))
    assert torch.equal(A, ours.pairs["model.layers.0.mlp.down_proj"].A)
    again = llama_cpp(tmp_path / "y.gguf", ours.pairs)
    assert {t.name: t.data.tobytes() for t in gguf.GGUFReader(again).tensors} == {
        name: t.data.tobytes() for name, t in tensors.items()
    }


def test_different_scales_are_applied_to_b(tmp_path):
    ours = adapter()
    ours.pairs[V].scale = 0.3
    ours.pairs[Q] = Pair(
        rand(4, 32).float(), rand(16, 4).float(), 0.5
    )  # alpha is 2 because of rank 4; the other pairs have alpha 1
    assert len(write_gguf(ours, tmp_path / "x.gguf", architecture="llama", head_dim=HEAD)) == 2
    same(ours, read_gguf(tmp_path / "x.gguf").adapter)


def test_alpha_zero_means_scale_one(tmp_path):
    path = llama_cpp(tmp_path / "x.gguf", adapter().pairs, alpha=0.0)
    assert read_gguf(path, head_dim=HEAD).adapter.pairs[Q].scale == 1.0


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_quantized_tensors_are_dequantized(tmp_path, kind):
    pair = Pair(rand(2, 64).float(), rand(8, 2).float(), 0.5)
    qtype = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(pair.A.numpy(), qtype)
    stored = "blk.0.attn_v.weight.lora_"
    written(tmp_path / "x.gguf", {f"{stored}a": (raw, qtype), f"{stored}b": pair.B.numpy()})
    read = read_gguf(tmp_path / "x.gguf").adapter.pairs["model.layers.0.self_attn.v_proj"]
    assert torch.equal(read.A.float(), torch.from_numpy(gguf.quants.dequantize(raw, qtype)))
    torch.testing.assert_close(read.A.float(), pair.A, rtol=0.2, atol=0.4)


def test_norms_are_listed(tmp_path):
    tensors = {"norm.weight": (4,), "v.weight.lora_a": (2, 4), "v.weight.lora_b": (4, 2)}
    ones = {f"blk.0.attn_{name}": np.ones(shape, np.float32) for name, shape in tensors.items()}
    assert read_gguf(written(tmp_path / "x.gguf", ones)).unused == ["blk.0.attn_norm.weight"]


def fails(path: Path, words: str, **how: Any) -> None:
    with pytest.raises(AdapterError, match=words) as caught:
        read_gguf(path, **how)
    assert caught.value.where == str(path)


def small(path: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    from veneer.files.gguf import write_gguf_file

    own = {"general.architecture": "qwen2", "general.type": "adapter", "adapter.type": "lora"}
    own |= {"adapter.lora.alpha": 1.0}
    own |= {k.replace("__", "."): v for k, v in fields.items()}
    write_gguf_file(path, {k: v for k, v in own.items() if v is not None}, tensors)
    return path


def test_files_that_are_not_adapters_are_refused(tmp_path):
    a, b = {"blk.0.attn_v.weight.lora_a": torch.ones(2, 4)}, {"blk.0.attn_v.weight.lora_b": torch.ones(4, 2)}
    path = tmp_path / "x.gguf"
    fails(small(path, a | b, general__type="model"), "not a LoRA adapter: general.type = 'model'")
    fails(small(path, a | b, general__type=None), "not a LoRA adapter")
    fails(small(path, a | b, general__architecture="qwen"), "architecture 'qwen'")
    fails(small(path, a | b, general__architecture="clip"), "architecture 'clip'")
    fails(small(path, a | b, adapter__lora__alpha="one"), "adapter.lora.alpha")
    fails(small(path, a | b, adapter__lora__alpha=float("nan")), "adapter.lora.alpha = nan")
    fails(small(path, a | b, adapter__alora__invocation_tokens=1), "activated LoRA")
    fails(small(path, a), "without its other half")
    fails(small(path, a | {"blk.0.attn_v.weight.lora_b": torch.ones(4, 3)}), "do not fit together")
    fails(small(path, a | b | {"blk.0.attn_v.bias": torch.ones(4)}), r"blk.0.attn_v.bias \(4,\)")
    fails(small(path, a | b | {"blk.0.nothing.weight.lora_a": torch.ones(4, 2)}), "blk.0.nothing")
    fails(small(path, {}), "no pairs")
    fails(small(path, a | {"blk.0.attn_v.weight.lora_b": torch.full((4, 2), float("inf"))}), "infinity")
    q = {f"blk.0.attn_q.weight.lora_{h}": t for h, t in (("a", torch.ones(2, 4)), ("b", torch.ones(6, 2)))}
    fails(small(path, q, general__architecture="llama"), "lacks the size of a head")
    fails(path, "not a multiple of the head size 4", head_dim=4)
    assert read_gguf(path, head_dim=6).adapter.pairs


REFUSED_CHANGES = [
    (lambda a: a.pairs.update({"model.layers.0.other": a.pairs[V]}), "no name for this module"),
    (lambda a: setattr(a.pairs[V], "magnitude", torch.ones(8)), "magnitude"),
    (lambda a: setattr(a.pairs[V], "kind", "conv"), "a pair of kind conv"),
    (lambda a: a.modules.update({"lm_head": {"weight": torch.ones(2)}}), "a full module"),
    (lambda a: a.deltas.update({"x.weight": Delta("dense", {"value": torch.ones(2)}, (2,))}), "a dense change"),
    (lambda a: a.pairs.clear(), "an adapter without pairs"),
]


@pytest.mark.parametrize(("spoil", "words"), REFUSED_CHANGES)
def test_gguf_refuses_changes_llama_cpp_ignores(tmp_path, spoil, words):
    ours = adapter()
    spoil(ours)
    with pytest.raises(AdapterError, match=words):
        write_gguf(ours, tmp_path / "x.gguf", architecture="llama", head_dim=HEAD)
    assert not (tmp_path / "x.gguf").exists()


def test_llama_needs_the_size_of_a_head(tmp_path):
    for head_dim in (None, 3, 5):
        with pytest.raises(AdapterError, match="heads of"):
            write_gguf(adapter(), tmp_path / "x.gguf", architecture="llama", head_dim=head_dim)
    with pytest.raises(AdapterError, match="known: llama"):
        write_gguf(adapter(), tmp_path / "x.gguf", architecture="clip")
