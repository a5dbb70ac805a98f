"""Image bases in one file of original weights, read with configs that are on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.image_twins import original
from tests.tiny_image_base import SIZE, tiny_image_base
from veneer.core.targets import base_modules
from veneer.errors import BaseError, ConfigError
from veneer.models.image import load_image, pipeline
from veneer.models.image_predict import encode_prompts, latent_shape, predict

pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "image-bases"


@pytest.mark.parametrize(
    ("family", "full", "prefix"),
    [
        ("sdxl", True, "model.diffusion_model."),
        ("sd3", True, "model.diffusion_model."),
        ("flux2", False, ""),
        ("klein", False, "model.diffusion_model."),
        ("qwen-image", False, ""),
    ],
)
def test_one_file_of_every_family_gives_the_same_denoiser(
    family: str, full: bool, prefix: str, bases: Path, tmp_path: Path
) -> None:
    folder = tiny_image_base(bases, family, full=full)
    whole = load_image(str(folder))
    save_file(original(whole, prefix=prefix), tmp_path / "one.safetensors")
    one = load_image(str(tmp_path / "one.safetensors"), config=folder)
    want = whole.denoiser.state_dict()
    assert one.denoiser.state_dict().keys() == want.keys()
    assert [n for n, t in one.denoiser.state_dict().items() if not torch.equal(t, want[n])] == []
    assert (one.family, one.prediction, one.unit) == (whole.family, whole.prediction, whole.unit)
    assert not any("no place" in note for note in one.notes)
    assert type(pipeline(one)) is type(pipeline(whole))


@pytest.mark.slow
def test_one_file_of_flux_1_at_its_real_width(bases: Path, tmp_path: Path) -> None:
    """diffusers' converter of FLUX.1 knows this width alone: one block of each kind, 480 million parameters."""
    import diffusers

    folder = Path(shutil.copytree(tiny_image_base(bases, "flux1"), tmp_path / "flux"))
    shutil.rmtree(folder / "transformer")
    with torch.device("meta"):
        wide = diffusers.FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, joint_attention_dim=16, pooled_projection_dim=16,
            guidance_embeds=True,
        )  # fmt: skip
    wide = wide.to_empty(device="cpu").to(torch.bfloat16)
    for number, parameter in enumerate(wide.parameters()):
        rows = torch.arange(len(parameter)) % 97 + 100 * number
        parameter.data.copy_(rows.view(-1, *[1] * (parameter.ndim - 1)))
    wide.save_pretrained(folder / "transformer")
    whole = load_image(str(folder))
    save_file(original(whole, prefix=""), tmp_path / "one.safetensors")
    one = load_image(str(tmp_path / "one.safetensors"), config=folder)
    want = whole.denoiser.state_dict()
    assert [n for n, t in one.denoiser.state_dict().items() if not torch.equal(t, want[n])] == []


def test_tensors_of_a_file_that_are_missing_or_too_many_are_said(bases: Path, tmp_path: Path) -> None:
    folder = tiny_image_base(bases, "klein")
    state = original(load_image(str(folder)), prefix="")
    save_file({**state, "something.else": torch.zeros(3, 5)}, tmp_path / "more.safetensors")
    assert any(
        "15 of the file's" in note for note in load_image(str(tmp_path / "more.safetensors"), config=folder).notes
    )
    del state["single_blocks.0.linear2.weight"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(BaseError, match=r"as FLUX\.2: some of its weights are not in the file"):
        load_image(str(tmp_path / "less.safetensors"), config=folder)


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
    save_file(
        {"transformer_blocks.0.attn.to_q.weight": torch.zeros(2), "txt_norm.weight": torch.zeros(2)},
        tmp_path / "q.safetensors",
    )
    with pytest.raises(BaseError, match="with the configs of Qwen/Qwen-Image"):
        load_image(str(tmp_path / "q.safetensors"))
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
