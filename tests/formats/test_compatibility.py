"""Predictions of what other tools do with a file, against the installed tools."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.formats.image_adapters import pair_for, random_adapter
from veneer.core.adapter import Adapter, Pair
from veneer.core.forms import Delta
from veneer.files.safetensors import read_tensors, write_tensors
from veneer.formats import convert, peft
from veneer.formats.compatibility import ToolVerdict, check_tools
from veneer.formats.read import read
from veneer.formats.topology import families

loaders = pytest.importorskip("diffusers.loaders")

ATTENTION = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
TOOLS = {
    "peft": "PEFT", "kohya": "sd-scripts and A1111", "comfyui": "ComfyUI", "diffusers": "diffusers", "vllm": "vLLM",
    "tgi": "TGI", "gguf": "llama.cpp",
}  # fmt: skip


def verdicts(path: Path) -> dict[str, ToolVerdict]:
    return {v.tool: v for v in check_tools(path, read(path))}


def image_adapter(name: str = "sdxl", component: str = "", **changes: Any) -> Adapter:
    family = families()[name]
    return random_adapter(family, lambda m: m.startswith(component or family.denoiser))


def uniform(**more: Any) -> Adapter:
    """Pairs of one rank and scale on attention."""
    family = families()["sdxl"]
    return Adapter({f"{ATTENTION}.{n}": pair_for(family, f"{ATTENTION}.{n}", 2, 0.5) for n in ("to_q", "to_k")}, **more)


def text_adapter(ranks: tuple[int, ...] = (2, 2), scale: float = 1.0, **more: Any) -> Adapter:
    """q and v of two layers, each with its rank of `ranks`."""
    pairs = {
        f"model.layers.{layer}.self_attn.{name}": Pair(torch.randn(rank, 6), torch.randn(8, rank), scale)
        for layer in range(2)
        for name, rank in zip(("q_proj", "v_proj"), ranks, strict=True)
    }
    return Adapter(pairs, **more)


def loaded(path: Path, mixin: str = "StableDiffusionXLLoraLoaderMixin") -> tuple[dict[str, Tensor], dict[str, float]]:
    """What diffusers makes of a file: tensors and alphas."""
    found = getattr(loaders, mixin).lora_state_dict(str(path.parent), weight_name=path.name)
    return found if isinstance(found, tuple) else (found, {})


@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers", "peft"])
@pytest.mark.parametrize("name", ["sdxl", "flux1"])
def test_converted_file_is_correct_for_its_tool(name: str, to: str, tmp_path: Path) -> None:
    path = tmp_path / ("it" if to == "peft" else "it.safetensors")
    convert.write(image_adapter(name), path, to, family=name)
    found = verdicts(path)
    assert found[TOOLS[to]].verdict == "fine", found[TOOLS[to]]
    assert found[TOOLS[to]].to == to
    assert set(found) == {"PEFT", "diffusers", "ComfyUI", "sd-scripts and A1111"}


@pytest.mark.parametrize("to", ["peft", "vllm", "tgi", "gguf"])
def test_server_export_is_correct_for_its_server(to: str, tmp_path: Path) -> None:
    path = tmp_path / ("it.gguf" if to == "gguf" else "it")
    how = {"gguf": {"family": "llama", "head_dim": 4}, "tgi": {"layers": 2}}.get(to, {})
    convert.write(text_adapter((2, 4), 0.7), path, to, **how)
    found = verdicts(path)
    assert found[TOOLS[to]].verdict == "fine", found[TOOLS[to]]
    assert set(found) == {"PEFT", "vLLM", "TGI", "llama.cpp"}


def test_peft_loads_folders_alone(tmp_path: Path) -> None:
    from peft import PeftConfig

    convert.write(uniform(), tmp_path / "it.safetensors", "kohya", family="sdxl")
    assert verdicts(tmp_path / "it.safetensors")["PEFT"].verdict == "refused"
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftConfig.from_pretrained(str(tmp_path / "it.safetensors"))


def test_diffusers_drops_the_scale_of_dora(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = uniform()
    dora = replace(plain, pairs={n: replace(p, magnitude=torch.ones(p.B.shape[0])) for n, p in plain.pairs.items()})
    for name, adapter in (("plain", plain), ("dora", dora)):
        convert.write(adapter, tmp_path / f"{name}.safetensors", "kohya", family="sdxl")
    verdict = verdicts(tmp_path / "dora.safetensors")["diffusers"]
    assert verdict.verdict == "wrong"
    assert "dora_scale" in verdict.why[0]
    assert verdicts(tmp_path / "plain.safetensors")["diffusers"].verdict == "fine"
    logging.getLogger("diffusers").addHandler(caplog.handler)
    with_it, without = (loaded(tmp_path / f"{name}.safetensors")[0] for name in ("dora", "plain"))
    logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[key], without[key]) for key in without)


def test_diffusers_finds_no_attention_module_for_an_alpha_of_kohyas(tmp_path: Path) -> None:
    """Its alphas are under names with `to_q_lora`, its tensors' modules are not called so."""
    adapter = uniform()
    adapter.pairs[f"{ATTENTION}.to_k"] = replace(adapter.pairs[f"{ATTENTION}.to_k"], scale=2.0)
    path = tmp_path / "it.safetensors"
    convert.write(adapter, path, "kohya", family="sdxl")
    found = verdicts(path)["diffusers"]
    assert found.verdict == "wrong"
    assert "2 different alphas" in found.why[0]
    _, alphas = loaded(path)
    assert len(set(alphas.values())) == 2
    assert all("_lora" in key for key in alphas)


@pytest.mark.parametrize(
    ("name", "mixin"), [("sdxl", "StableDiffusionXLLoraLoaderMixin"), ("flux1", "FluxLoraLoaderMixin")]
)
def test_diffusers_finds_none_of_comfyuis_names(name: str, mixin: str, tmp_path: Path) -> None:
    path, denoiser = tmp_path / "it.safetensors", families()[name].denoiser
    convert.write(image_adapter(name), path, "comfyui", family=name)
    assert "nothing acts" in verdicts(path)["diffusers"].why[0]
    tensors = {k: v for k, v in read_tensors(path)[0].items() if not k.endswith(".alpha")}
    write_tensors(path, tensors, {"format": "pt"})
    assert not any(key.startswith(f"{denoiser}.") for key in loaded(path, mixin)[0])


def test_diffusers_loads_no_lokr_of_sdxl(tmp_path: Path) -> None:
    path, shape = tmp_path / "it.safetensors", (8, 6)
    parts = {"w1": torch.randn(2, 2), "w2": torch.randn(4, 3)}
    adapter = Adapter(deltas={f"{ATTENTION}.to_q.weight": Delta("kronecker", parts, shape)})
    convert.write(adapter, path, "kohya", family="sdxl")
    assert "1 LoKr" in verdicts(path)["diffusers"].why[0]
    with pytest.raises(ValueError, match="not been correctly renamed"):
        loaded(path)


def test_comfyui_ignores_scales_in_metadata(tmp_path: Path) -> None:
    """By its rule: alpha over the rows of down where there is an alpha, else 1."""
    path = tmp_path / "it.safetensors"
    convert.write(uniform(), path, "diffusers", family="sdxl")
    found = verdicts(path)
    assert (found["diffusers"].verdict, found["ComfyUI"].verdict) == ("fine", "wrong")
    assert not any(key.endswith(".alpha") for key in read_tensors(path)[0])
    plain = Adapter({n: replace(p, scale=1.0) for n, p in uniform().pairs.items()})
    convert.write(plain, tmp_path / "one.safetensors", "diffusers", family="sdxl")
    assert verdicts(tmp_path / "one.safetensors")["ComfyUI"].verdict == "fine"


def with_config(folder: Path, change: Callable[[dict[str, Any]], Any], adapter: Adapter) -> dict[str, ToolVerdict]:
    peft.write_folder(adapter, folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return verdicts(folder)


def test_servers_take_one_scale_for_every_module(tmp_path: Path) -> None:
    """vLLM before 0.32 and TGI read r and lora_alpha; llama.cpp's converter lora_alpha, over each tensor's own rank."""
    found = with_config(tmp_path / "patterns", lambda c: c, text_adapter((2, 8)))
    assert found["PEFT"].verdict == "fine"
    assert all("rank_pattern" in found[tool].why[0] for tool in ("vLLM", "TGI"))
    found = with_config(tmp_path / "rs", lambda c: c.update(use_rslora=True), text_adapter((16, 16)))
    assert [found[t].verdict for t in ("PEFT", "vLLM", "TGI", "llama.cpp")] == ["fine", "fine", "fine", "wrong"]
    assert "1/√rank" in found["llama.cpp"].why[0]
    found = with_config(tmp_path / "ranks", lambda c: c, text_adapter((20, 20)))
    assert "20/32" in found["TGI"].why[0]
    assert "--max-lora-rank 32" in found["vLLM"].why[0]
    lacking = text_adapter((16, 16))
    del lacking.pairs["model.layers.1.self_attn.v_proj"]
    assert "self_attn.v_proj" in with_config(tmp_path / "layers", lambda c: c, lacking)["TGI"].why[0]


def test_servers_refuse_dora_and_single_files(tmp_path: Path) -> None:
    adapter = text_adapter((16, 16))
    dora = {n: replace(p, magnitude=torch.ones(p.B.shape[0])) for n, p in adapter.pairs.items()}
    found = with_config(tmp_path / "dora", lambda c: c, replace(adapter, pairs=dora))
    assert [found[t].verdict for t in ("PEFT", "vLLM", "TGI", "llama.cpp")] == ["fine", "refused", "wrong", "refused"]
    assert all("DoRA" in found[t].why[0] for t in ("vLLM", "TGI", "llama.cpp"))
    convert.write(adapter, tmp_path / "it.gguf", "gguf", family="llama", head_dim=4)
    found = verdicts(tmp_path / "it.gguf")
    assert [found[t].verdict for t in ("PEFT", "vLLM", "TGI", "llama.cpp")] == ["refused", "refused", "refused", "fine"]
