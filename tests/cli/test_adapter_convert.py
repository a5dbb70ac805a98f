"""`veneer adapter convert`: printed output, `--json`, and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.cli.run import run
from tests.formats.image_adapters import numbers, random_adapter, same_changes
from tests.tiny_base import tiny_base_dir
from veneer.core.adapter import Adapter, Pair
from veneer.files.safetensors import read_tensors, write_tensors
from veneer.formats import peft
from veneer.formats.convert import write
from veneer.formats.read import read
from veneer.formats.topology import families

SDXL = families()["sdxl"]


def kohya(folder: Path) -> Path:
    adapter = random_adapter(SDXL, lambda m: m.startswith("unet.mid_block"))
    write(adapter, folder / "style.safetensors", "kohya", family="sdxl")
    return folder / "style.safetensors"


def test_convert_prints_what_was_written(tmp_path, capsys):
    source, out = kohya(tmp_path), tmp_path / "style-comfy.safetensors"
    ran = run(capsys, "adapter", "convert", str(source), "--to", "comfyui", "-o", str(out))
    assert f"read {source}: kohya; wrote {out}: comfyui of sdxl" in ran.out
    assert "ranks    1 (" in ran.out
    assert "AutoV2" in ran.out
    same_changes(read(out).adapter, read(source).adapter)


def test_convert_does_not_overwrite_its_input(tmp_path, capsys):
    source = kohya(tmp_path)
    before = source.read_bytes()
    for out in (str(source), str(source.parent / "." / source.name)):
        ran = run(capsys, "adapter", "convert", str(source), "--to", "comfyui", "-o", out, code=2)
        assert "the output is the input adapter" in ran.err
    assert source.read_bytes() == before


def test_json_has_the_hashes(tmp_path, capsys):
    source, out = kohya(tmp_path), tmp_path / "style-diffusers.safetensors"
    arguments = ("--to", "diffusers", "-o", str(out), "--dtype", "bfloat16", "--json")
    found = json.loads(run(capsys, "adapter", "convert", str(source), *arguments).out)
    assert (found["to"], found["family"], found["from"]["format"]) == ("diffusers", "sdxl", "kohya")
    assert found["digest"] == read(out).adapter.digest()
    assert found["files"] == {out.name: f"sha256:{found['hashes']['sha256']}"}
    assert "rounded to bfloat16" in found["notes"][0]
    assert {t.dtype for t in read_tensors(out)[0].values()} == {torch.bfloat16}


def test_an_inexpressible_conversion_exits_with_2_and_writes_nothing(tmp_path, capsys):
    source, out = kohya(tmp_path), tmp_path / "style"
    ran = run(capsys, "adapter", "convert", str(source), "--to", "vllm", "-o", str(out), code=2)
    assert "unet.mid_block" in ran.err
    assert "--to peft, kohya, diffusers or comfyui" in ran.err
    assert not out.exists()
    run(capsys, "adapter", "convert", str(source), "--to", "onnx", "-o", str(out), code=2)


def test_partial_files_need_an_option(tmp_path, capsys):
    source, out = kohya(tmp_path), tmp_path / "more.safetensors"
    tensors, metadata = read_tensors(source)
    write_tensors(source, {**tensors, "lora_unet_nowhere.lora_up.weight": torch.ones(2, 1)}, metadata)
    arguments = ("adapter", "convert", str(source), "--to", "comfyui", "-o", str(out))
    assert "lora_unet_nowhere" in run(capsys, *arguments, code=2).err
    ran = run(capsys, *arguments, "--allow-partial")
    assert "left out: 1 tensors" in ran.err
    assert "lora_unet_nowhere.lora_up.weight" in ran.err


def test_gguf_conversion_of_q_needs_the_base(tmp_path, capsys):
    base = tiny_base_dir(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    heads = config["num_attention_heads"]
    width = config["hidden_size"]
    pair = Pair(numbers((2, width), "A"), numbers((width, 2), "B"), 0.3)
    peft.write_folder(Adapter({"model.layers.0.self_attn.q_proj": pair}), tmp_path / "it")
    out = tmp_path / "it.gguf"
    arguments = ("adapter", "convert", str(tmp_path / "it"), "--to", "gguf", "-o", str(out))
    assert "--base" in run(capsys, *arguments, code=2).err
    assert json.loads(run(capsys, *arguments, "--base", str(base), "--json").out)["family"] == "llama"
    assert heads > 1  # with a single head, the order of q's rows could not be wrong
    same_changes(read(out).adapter, read(tmp_path / "it").adapter)
