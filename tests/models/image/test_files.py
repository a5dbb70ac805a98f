"""Image bases load from single checkpoint files in the original format, with local configs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.edits import edit_json
from tests.image_twins import latent_shape, open_clip, original, original_vae
from tests.tiny_image_base import SIZE, tiny_image_base
from veneer.core.targets import base_modules
from veneer.errors import BaseError, ConfigError
from veneer.models.image.base import load_image, pipeline
from veneer.models.image.predict import embed_prompts, predict

pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    ("family", "full", "prefix"),
    [
        pytest.param(
            "sdxl", True, "model.diffusion_model.", marks=pytest.mark.slow
        ),  # a full file of this family is tested below
        ("sd3", True, "model.diffusion_model."),
        ("flux2", False, ""),
        ("klein", False, "model.diffusion_model."),
        ("qwen-image", False, ""),
        ("z-image", False, ""),
        ("z-image", False, "model.diffusion_model."),
    ],
)
def test_single_file_of_every_family_gives_the_same_denoiser(
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
    assert not any("are not used" in note for note in one.notes)
    assert type(pipeline(one)) is type(pipeline(whole))


@pytest.mark.slow
def test_flux_1_file_gives_the_denoiser_of_its_directory(bases: Path, tmp_path: Path) -> None:
    """Uses FLUX.1's real width, because diffusers converts no other width.

    The model has one block of each kind, and 480 million parameters."""
    import diffusers

    folder = Path(shutil.copytree(tiny_image_base(bases, "flux1"), tmp_path / "flux"))
    shutil.rmtree(folder / "transformer")
    with torch.device("meta"):
        sizes = dict.fromkeys(("in_channels", "joint_attention_dim", "pooled_projection_dim"), 16)
        wide = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True, **sizes)
    wide = wide.to_empty(device="cpu").to(torch.bfloat16)
    for number, parameter in enumerate(wide.parameters()):
        rows = torch.arange(len(parameter)) % 97 + 100 * number
        parameter.data.copy_(rows.view(-1, *[1] * (parameter.ndim - 1)))
    wide.save_pretrained(folder / "transformer")
    whole = load_image(str(folder))
    save_file(original(whole, prefix=""), tmp_path / "one.safetensors")
    one, want = load_image(str(tmp_path / "one.safetensors"), config=folder), whole.denoiser.state_dict()
    assert [n for n, t in one.denoiser.state_dict().items() if not torch.equal(t, want[n])] == []
    save_file(original(whole, prefix="") | {"other": torch.zeros(3)}, tmp_path / "one.safetensors")
    with pytest.raises(BaseError, match="1 stored tensor with no matching parameter in the model: other"):
        load_image(str(tmp_path / "one.safetensors"), config=folder)


@pytest.mark.parametrize(
    "family", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow), "sd3", "klein", "qwen-image", "z-image"]
)  # the test of SDXL's file (below) covers SDXL
def test_only_harmless_tensors_may_be_unused(family: str, bases: Path, tmp_path: Path) -> None:
    folder = tiny_image_base(bases, family, full=family in ("sd15", "sdxl", "sd3"))
    whole = load_image(str(folder))
    own = original(whole, family == "sd15", "" if family == "qwen-image" else "model.diffusion_model.")
    prefix = next(iter(own)).partition("diffusion_model.")[0]
    old = "cond_stage_model.transformer.text_model.embeddings.position_ids" if family == "sd15" else "betas"
    more = {f"model_ema.{i:03d}": torch.zeros(2) for i in range(8)} | {old: torch.zeros(1, 77)}
    save_file({**own, **more}, tmp_path / "more.safetensors")
    (said,) = [n for n in load_image(str(tmp_path / "more.safetensors"), config=folder).notes if "are not used" in n]
    names = sorted(more)
    assert said == (f"9 of the file's {len(own) + 9} tensors are not used: {', '.join(names[:6])} and 3 more")
    unknown = f"{prefix}time_embed.9.weight"
    save_file({**own, **more, unknown: torch.zeros(3, 5)}, tmp_path / "more.safetensors")
    with pytest.raises(
        BaseError, match=f"1 stored tensor with no matching parameter in the model: {re.escape(unknown)}"
    ):
        load_image(str(tmp_path / "more.safetensors"), config=folder)


def _in_fp8(state: dict[str, torch.Tensor], scale: str, per_row: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights as 8-bit floats with scales, and the values they represent."""
    stored, plain = dict(state), dict(state)
    for name, weight in state.items():
        if weight.ndim == 2 and name.endswith("weight"):
            most = weight.abs().amax(dim=1, keepdim=True) if per_row else weight.abs().amax()
            factor = most.clamp_min(1e-12) / 448
            stored[name] = (weight / factor).to(torch.float8_e4m3fn)
            stored[name.removesuffix("weight") + scale] = factor
            plain[name] = stored[name].float() * factor
    return stored, plain


@pytest.mark.parametrize(
    ("family", "scale", "per_row"),
    [("sd15", "scale_weight", False), ("klein", "weight_scale", False), ("z-image", "weight_scale", True)],
)
def test_scales_of_eight_bit_floats_are_applied_exactly(
    family: str, scale: str, per_row: bool, bases: Path, tmp_path: Path
) -> None:
    folder = tiny_image_base(bases, family, full=family == "sd15")
    stored, plain = _in_fp8(original(load_image(str(folder)), family == "sd15"), scale, per_row)
    marker = "scaled_fp8" if scale == "scale_weight" else "x.comfy_quant"
    about = torch.zeros(2).to(torch.float8_e4m3fn)
    if scale == "weight_scale":
        marker = next(n for n in stored if n.endswith("." + scale)).removesuffix(scale) + "comfy_quant"
        about = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    save_file({**stored, marker: about}, tmp_path / "scaled.safetensors")
    save_file(plain, tmp_path / "plain.safetensors")
    got, want = (
        load_image(str(tmp_path / f"{name}.safetensors"), config=folder, dtype="float32")
        for name in ("scaled", "plain")
    )
    assert not any("are not used" in note for note in got.notes)
    for name in (got.row.denoiser, *got.row.encoders):
        theirs = want.parts[name].state_dict()
        assert [n for n, t in got.parts[name].state_dict().items() if not torch.equal(t, theirs[n])] == [], name


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_scales_in_a_directory_are_applied_too(quantize: Any, bases: Path, tmp_path: Path) -> None:
    folders = [Path(shutil.copytree(tiny_image_base(bases, "flux1"), tmp_path / name)) for name in ("scaled", "plain")]
    file = "transformer/diffusion_pytorch_model.safetensors"
    states = _in_fp8(load_file(folders[0] / file), "scale_weight", False)
    for folder, state in zip(folders, states, strict=True):
        save_file(state, folder / file, {"format": "pt"})
    got, want = (load_image(str(folder), dtype="float32", quantize=quantize).denoiser for folder in folders)
    for name, parameter in want.named_parameters():
        one, two = (p.dense() if quantize and hasattr(p, "dense") else p for p in (got.get_parameter(name), parameter))
        assert torch.equal(one, two), name


def test_scales_that_cannot_be_applied_are_refused(bases: Path, tmp_path: Path) -> None:
    folder = tiny_image_base(bases, "klein")
    stored, _ = _in_fp8(original(load_image(str(folder)), prefix=""), "weight_scale", False)
    name = next(n for n in stored if n.endswith("weight_scale"))
    weight = name.removesuffix("_scale")
    for more, said in (
        ({name: torch.ones(2, 2)}, r"scales of shape \(2, 2\)"),
        ({name: torch.tensor(float("nan"))}, "a scale is NaN or infinite"),
        ({weight.removesuffix("weight") + "comfy_quant": torch.tensor(list(b"[1"), dtype=torch.uint8)}, "the format"),
        ({weight: stored[weight].view(torch.int8)}, "1 scale of quantized weights would be ignored"),
        ({f"{weight}_2": torch.ones(1), f"{weight}_scale_2": torch.ones(1)}, "1 scale of quantized weights would"),
    ):
        save_file({**stored, **more}, tmp_path / "one.safetensors")
        with pytest.raises(BaseError, match=said):
            load_image(str(tmp_path / "one.safetensors"), config=folder)


def test_v_prediction_file_needs_a_v_prediction_scheduler(bases: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_image_base(bases, "sd15", full=True), tmp_path / "base"))
    state = original(load_image(str(folder)), True)
    save_file({**state, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "one.safetensors")
    with pytest.raises(BaseError, match="the file marks a v-prediction model"):
        load_image(str(tmp_path / "one.safetensors"), config=folder)
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert load_image(str(tmp_path / "one.safetensors"), config=folder).prediction == "v"


def test_sdxl_file_uses_all_tensors_but_clips_logit_scale(bases: Path, tmp_path: Path) -> None:
    """The denoiser, VAE and second text encoder load from the file.

    Some of their tensors are fused or transposed in the file."""
    folder = tiny_image_base(bases, "sdxl", full=True)
    whole = load_image(str(folder))
    state = original(whole) | original_vae(whole.parts["vae"]) | open_clip(whole.parts["text_encoder_2"])
    extra = "conditioner.embedders.1.model.logit_scale"
    save_file({**state, extra: torch.zeros(1)}, tmp_path / "one.safetensors")
    configs = Path(shutil.copytree(folder, tmp_path / "configs"))
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder_2/model"):
        (configs / f"{name}.safetensors").unlink()
    one = load_image(str(tmp_path / "one.safetensors"), config=configs)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        want = whole.parts[name].state_dict()
        assert [n for n, t in one.parts[name].state_dict().items() if not torch.equal(t, want[n])] == [], name
    (said,) = [note for note in one.notes if "are not used" in note]
    assert said == f"1 of the file's {len(state) + 1} tensors are not used: {extra}"


def test_missing_tensors_of_a_file_are_refused(bases: Path, tmp_path: Path) -> None:
    folder = tiny_image_base(bases, "klein")
    state = original(load_image(str(folder)), prefix="")
    del state["single_blocks.0.linear2.weight"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(BaseError, match=r"as FLUX\.2: some of its weights are not in the file"):
        load_image(str(tmp_path / "less.safetensors"), config=folder)


@pytest.mark.parametrize("encoder", [True, False])
def test_single_file_equals_its_directory(encoder: bool, bases: Path, tmp_path: Path) -> None:
    folder = tiny_image_base(bases, "sd15", full=True)
    whole = load_image(str(folder))
    save_file(original(whole, encoder), tmp_path / "one.safetensors")
    configs = tmp_path / "configs"
    shutil.copytree(folder, configs)
    (configs / "unet" / "diffusion_pytorch_model.safetensors").unlink()  # the weights are in the single file
    if encoder:
        (configs / "text_encoder" / "model.safetensors").unlink()
    one = load_image(str(tmp_path / "one.safetensors"), config=configs)
    assert one.family == "sd15"
    assert any("configs come from" in note for note in one.notes)
    assert not any(p.requires_grad for p in one.model.parameters())
    assert [n for n, _ in base_modules(one.model)] == [n for n, _ in base_modules(whole.model)]
    x = torch.randn(1, *latent_shape(one, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = (predict(b, x, torch.tensor(300), embed_prompts(b, ["a red house"])) for b in (one, whole))
    assert torch.allclose(got, want, atol=1e-5)
    assert pipeline(one).unet is one.denoiser
    again = load_image(str(tmp_path / "one.safetensors"), config=configs)
    assert again.fingerprint == one.fingerprint != whole.fingerprint


def test_missing_component_must_be_in_the_directory(bases: Path, tmp_path: Path) -> None:
    folder = tiny_image_base(bases, "sd15", full=True)
    save_file(original(load_image(str(folder)), False), tmp_path / "one.safetensors")
    configs = Path(shutil.copytree(folder, tmp_path / "configs"))
    (configs / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(BaseError, match="neither the file nor the directory of configs has weights for text_encoder"):
        load_image(str(tmp_path / "one.safetensors"), config=configs)


def test_missing_configs_are_named_without_network(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_image_base(bases, "sd15", full=True)
    save_file(original(load_image(str(folder)), True), tmp_path / "one.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked a network"))
    with pytest.raises(BaseError, match=r"requires the configs of .*stable-diffusion[\s\S]*config="):
        load_image(str(tmp_path / "one.safetensors"))
    save_file(
        {"transformer_blocks.0.attn.to_q.weight": torch.zeros(2), "txt_norm.weight": torch.zeros(2)},
        tmp_path / "q.safetensors",
    )
    with pytest.raises(BaseError, match="requires the configs of Qwen/Qwen-Image"):
        load_image(str(tmp_path / "q.safetensors"))
    save_file({"something": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(BaseError, match="config="):
        load_image(str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("what", ["an adapter", "another family", "garbage"])
def test_files_of_another_kind_are_refused(what: str, bases: Path, tmp_path: Path) -> None:
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


def test_config_needs_a_single_file(bases: Path) -> None:
    folder = str(tiny_image_base(bases, "sd15"))
    with pytest.raises(ConfigError, match="config is only for a single-file base"):
        load_image(folder, config=folder)
