"""The Doctor with a mouse: a file is picked, looked at, written for each other tool, kept. What arrives is read by
diffusers, PEFT and llama.cpp's package, which share nothing with what wrote it."""

from __future__ import annotations

import copy
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.adapters.test_use import adapter_for
from tests.browser.conftest import Window
from tests.formats.image_adapters import random_adapter
from tests.formats.layouts import assert_same, product
from tests.formats.test_read_peer import loaders, peer, renamed
from tests.studio.conftest import StudioServer
from tests.tiny_gguf import interleaved
from veneer.core.adapter import Adapter
from veneer.formats import convert, peft
from veneer.formats.read import read
from veneer.formats.topology import families
from veneer.library.library import open_library
from veneer.models.text.base import load_text

SDXL = "StableDiffusionXLLoraLoaderMixin"
"""diffusers' reader of files for Stable Diffusion XL."""


@pytest.fixture(scope="module")
def drawn() -> Adapter:
    """Of Stable Diffusion XL's modules, of many ranks and scales."""
    return random_adapter(families()["sdxl"], lambda m: m.startswith("unet."))


@pytest.fixture(scope="module")
def style(drawn: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doctor") / "Zelda Style.safetensors"
    convert.write(drawn, path, "kohya", family="sdxl")
    return path


def downloaded(window: Window, tool: str, folder: Path) -> Path:
    """What a click on a tool's button brings, under the name that the browser gives it."""
    with window.page.expect_download() as download:
        window.press(f"Download for {tool}")
    download.value.save_as(folder / download.value.suggested_filename)
    return folder / download.value.suggested_filename


def unpacked(packed: Path) -> Path:
    """The one folder in a zip."""
    with zipfile.ZipFile(packed) as file:
        file.extractall(packed.parent / packed.stem)
    (folder,) = (packed.parent / packed.stem).iterdir()
    return folder


def scale_of(config: Any, name: str) -> float:
    """As PEFT has it: a pattern's, or the whole adapter's."""
    from peft.utils.other import get_pattern_key

    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
    return float(config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, name), config.lora_alpha) / rank)


def changes(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """ΔW by module of a state dict in PEFT's names, beside its config."""
    names = [key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight")]
    assert len(state) == 2 * len(names)
    return {
        name: scale_of(config, name) * product(state[f"{name}.lora_B.weight"], state[f"{name}.lora_A.weight"])
        for name in names
    }


def by_diffusers(file: Path) -> dict[str, Tensor]:
    """What a pipeline of Stable Diffusion XL reads in a file of its own layout."""
    from peft import LoraConfig

    state, _, settings = getattr(loaders, SDXL).lora_state_dict(
        str(file.parent), weight_name=file.name, return_lora_metadata=True
    )
    config = LoraConfig(**{key.removeprefix("unet."): value for key, value in settings.items()})
    return changes(renamed("unet", state), config)


def test_a_file_is_looked_at_written_for_other_tools_and_kept(
    window: Window, server: StudioServer, style: Path, drawn: Adapter, tmp_path: Path
) -> None:
    from peft import LoraConfig, load_peft_weights

    page = window.open("doctor").page
    page.set_input_files("input[type=file]", str(style))
    window.heading("Zelda_Style.safetensors")
    window.until("Stable Diffusion XL")
    assert read(downloaded(window, "ComfyUI", tmp_path)).adapter.digest() == read(style).adapter.digest()
    wanted = {
        module.removeprefix("unet."): pair.scale * product(pair.B, pair.A) for module, pair in drawn.pairs.items()
    }
    assert_same(by_diffusers(downloaded(window, "diffusers", tmp_path)), wanted, 1e-6)
    tensors = load_file(downloaded(window, "sd-scripts and A1111", tmp_path))
    assert all(key.startswith("lora_unet_") for key in tensors)
    by_kohya = peer(SDXL, tensors, unet_config=SimpleNamespace(layers_per_block=2))
    assert_same(by_kohya, {f"unet.{name}.weight": change for name, change in wanted.items()}, 1e-6)
    folder = str(unpacked(downloaded(window, "PEFT", tmp_path)))
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in load_peft_weights(folder).items()}
    assert_same(changes(state, LoraConfig.from_pretrained(folder)), wanted, 1e-6)

    page.get_by_label("Name", exact=True).fill("zelda")
    window.press("Save to library")  # at once: what was typed counts
    window.heading("zelda@1")
    with open_library(server.library) as library:
        assert library.find("zelda").digest == read(style).adapter.digest()
        library.remove("zelda")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_of_texts_is_written_for_servers_and_for_llama_cpp(
    window: Window, server: StudioServer, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    gguf = pytest.importorskip("gguf")
    adapter = adapter_for(load_text(str(server.base)), 3)
    peft.write_folder(adapter, tmp_path / "polite")
    with zipfile.ZipFile(tmp_path / "polite.zip", "w") as packed:
        for each in (tmp_path / "polite").iterdir():
            packed.write(each, f"polite/{each.name}")
    page = window.open("doctor").page
    page.set_input_files("input[type=file]", str(tmp_path / "polite.zip"))
    window.heading("polite.zip")

    wanted = {module: pair.scale * product(pair.B, pair.A) for module, pair in adapter.pairs.items()}
    base = AutoModelForCausalLM.from_pretrained(server.base)
    for tool in ("PEFT", "vLLM", "TGI"):
        model = PeftModel.from_pretrained(copy.deepcopy(base), str(unpacked(downloaded(window, tool, tmp_path))))
        layers = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
        found = {name: layer.get_delta_weight("default").double() for name, layer in layers.items()}
        assert_same(found, wanted, 1e-6)

    file = gguf.GGUFReader(downloaded(window, "llama.cpp", tmp_path))
    assert file.fields["general.type"].contents() == "adapter"
    halves = {tensor.name: torch.tensor(tensor.data).double() for tensor in file.tensors}
    called = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, base.config.num_hidden_layers).get_name
    found = {}
    for module, change in wanted.items():
        a, b = (halves.pop(f"{called(module)}.weight.lora_{half}") for half in "ab")
        found[module] = file.fields["adapter.lora.alpha"].contents() / len(a) * b @ a
        if module.endswith("q_proj"):  # whose rows llama.cpp has in another order
            wanted[module] = torch.from_numpy(interleaved(change.numpy(), base.config.num_attention_heads))
    assert_same(found, wanted, 1e-6)
    assert not halves, "nothing else is in it"


def test_a_pickle_is_refused_with_the_reason(window: Window, tmp_path: Path) -> None:
    (tmp_path / "style.pt").write_bytes(b"\x80\x04.")
    page = window.open("doctor").page
    page.set_input_files("input[type=file]", str(tmp_path / "style.pt"))
    window.until("pickles run whatever code is in them")
    window.ignore("400")
