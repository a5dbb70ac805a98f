"""Image bases in one file of original weights, read with configs that are on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_image_base import SIZE, tiny_image_base
from veneer.core.targets import base_modules
from veneer.errors import BaseError, ConfigError
from veneer.formats.topology import families
from veneer.models.image import ImageBase, load_image, pipeline
from veneer.models.image_predict import encode_prompts, latent_shape, predict

pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "image-bases"


def original(base: ImageBase, encoder: bool) -> dict[str, torch.Tensor]:
    """SD 1's and SDXL's U-Net under LDM's names, from the table of names; SD 1's CLIP beside it."""
    places = {p.module: name for name, found in families()[base.family].originals.items() for p in found}
    out = {}
    for name, tensor in base.denoiser.state_dict().items():
        module, _, parameter = name.rpartition(".")
        out[f"model.diffusion_model.{places[f'unet.{module}']}.{parameter}"] = tensor.clone()
    if encoder:
        state = base.parts["text_encoder"].state_dict()
        for name, tensor in state.items():
            own = name if name.startswith("text_model.") else f"text_model.{name}"
            out[f"cond_stage_model.transformer.{own}"] = tensor.clone()
    return out


@pytest.mark.parametrize("encoder", [True, False])
def test_one_file_with_the_configs_of_a_directory_is_that_directory(encoder: bool, bases: Path, tmp_path: Path) -> None:
    folder = tiny_image_base(bases, "sd15", full=True)
    whole = load_image(str(folder))
    save_file(original(whole, encoder), tmp_path / "one.safetensors")
    configs = tmp_path / "configs"
    shutil.copytree(folder, configs)
    (configs / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # its config is enough
    if encoder:
        (configs / "text_encoder" / "model.safetensors").unlink()
    one = load_image(str(tmp_path / "one.safetensors"), config=configs)
    assert one.family == "sd15"
    assert any("configs come from" in note for note in one.notes)
    assert not any(p.requires_grad for p in one.model.parameters())
    assert [n for n, _ in base_modules(one.model)] == [n for n, _ in base_modules(whole.model)]
    x = torch.randn(1, *latent_shape(one, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = (predict(b, x, torch.tensor(300), encode_prompts(b, ["a red house"])) for b in (one, whole))
    assert torch.allclose(got, want, atol=1e-5)
    assert pipeline(one).unet is one.denoiser
    again = load_image(str(tmp_path / "one.safetensors"), config=configs)
    assert again.fingerprint == one.fingerprint != whole.fingerprint


def test_what_the_file_does_not_hold_must_be_in_the_directory(bases: Path, tmp_path: Path) -> None:
    folder = tiny_image_base(bases, "sd15", full=True)
    save_file(original(load_image(str(folder)), False), tmp_path / "one.safetensors")
    configs = Path(shutil.copytree(folder, tmp_path / "configs"))
    (configs / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(BaseError, match="the file holds no text_encoder, and the directory of configs has no weights"):
        load_image(str(tmp_path / "one.safetensors"), config=configs)


def test_without_configs_it_says_which_are_wanted_and_asks_no_network(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_image_base(bases, "sd15", full=True)
    state = original(load_image(str(folder)), True)
    save_file(state, tmp_path / "one.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked a network"))
    with pytest.raises(BaseError, match=r"with the configs of .*stable-diffusion[\s\S]*config="):
        load_image(str(tmp_path / "one.safetensors"))
    save_file({"something": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(BaseError, match="config="):
        load_image(str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("what", ["an adapter", "another family", "garbage"])
def test_files_that_are_no_such_base_are_refused(what: str, bases: Path, tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "an adapter": {"lora_unet_x.lora_down.weight": torch.zeros(2, 2)},
        "another family": {"double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2)},
        "garbage": {},
    }[what]
    path = tmp_path / "x.safetensors"
    if tensors:
        save_file(tensors, path)
    else:
        path.write_bytes(b"no tensors at all")
    with pytest.raises(BaseError, match="this is an adapter, not a base" if what == "an adapter" else None):
        load_image(str(path), config=tiny_image_base(bases, "sd15"))


def test_config_is_for_a_single_file(bases: Path) -> None:
    folder = str(tiny_image_base(bases, "sd15"))
    with pytest.raises(ConfigError, match="config is for a single-file base"):
        load_image(folder, config=folder)
