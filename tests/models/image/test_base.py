"""Image bases of every family load completely, under canonical names.

Pipelines share the modules of their base; invalid bases are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bnb_checkpoint import CONFIG, saved_tensors
from tests.edits import edit_json
from tests.image_twins import latent_shape
from tests.tiny_image_base import SIZE, TINY_FAMILIES, tiny_control, tiny_image_base
from veneer.core.adapter import LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.core.targets import base_modules, kind_of
from veneer.errors import BaseError, ConfigError, ResourceError
from veneer.formats.topology import families, flux2
from veneer.models.image.base import ImageBase, load_control, load_image, pipeline, release, text_length, text_settings
from veneer.models.image.families import FAMILIES, topology_name
from veneer.models.image.predict import embed_prompts, predict
from veneer.models.quantize import quantized_weights
from veneer.models.text.base import load_text
from veneer.ops.quantized import Quantized

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*invalid value encountered in cast.*:RuntimeWarning"),
]
FAMILY = {"schnell": "flux1", "klein": "flux2"}


@pytest.fixture
def load(bases: Path) -> Any:
    return lambda family, full=False: load_image(str(tiny_image_base(bases, family, full)))


def draw(pipe: Any, **more: Any) -> torch.Tensor:
    given = {"prompt": "a red house", "num_inference_steps": 2, "output_type": "pt", "height": SIZE, "width": SIZE}
    seeded = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)  # SD3's ControlNet pipeline uses the global generator for its control picture
        found: torch.Tensor = pipe(**(given | {"generator": seeded} | more)).images
    return found


# -- structure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_loaded_base_draws_the_same_picture_as_diffusers(family: str, bases: Path, load: Any) -> None:
    base = load(family)
    assert base.family == FAMILY.get(family, family)
    assert base.prediction == ("epsilon" if family in ("sd15", "sdxl") else "flow")
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not any(m.training for m in base.model.modules())
    theirs = diffusers.DiffusionPipeline.from_pretrained(base.directory)
    theirs.set_progress_bar_config(disable=True)
    more = text_settings(base)
    assert torch.equal(draw(pipeline(base), **more), draw(theirs, **more))


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f == "schnell" else f for f in TINY_FAMILIES]
)  # schnell equals dev except for guidance, see below
def test_every_target_has_its_canonical_name(family: str, load: Any) -> None:
    """Bases have the official number of blocks at tiny widths."""
    base = load(family, full=True)
    known = families()[base.family]
    if family == "klein":  # 5 and 20 blocks instead of FLUX.2's 8 and 48, and no guidance
        want = {row.module: row.kind for row in flux2(5, 20, False)}
        assert want.items() <= known.modules.items()
    elif family == "schnell":  # dev without guidance
        want = {n: kind for n, kind in known.modules.items() if ".guidance_embedder." not in n}
    else:
        want = dict(known.modules)
    have = dict(base_modules(base.model))
    missing = [
        n for n in want if n not in have and not n.endswith("encoder.embed_tokens")
    ]  # T5's embedding is the module `shared`
    assert missing == []
    kinds = {n: kind_of(have[n]) for n, kind in want.items() if n in have and kind != "norm"}
    assert kinds == {n: want[n] for n in kinds}
    linears = {n for n, m in have.items() if kind_of(m) is not None}
    assert linears - set(want) == set(), "a module that carries pairs and has no canonical name"


def test_the_tree_shares_its_modules_with_every_pipeline(load: Any) -> None:
    base: ImageBase = load("sdxl")
    for kind in ("text", "image", "inpaint"):
        pipe = pipeline(base, kind)  # type: ignore[arg-type]
        assert pipe is pipeline(base, kind)  # type: ignore[arg-type]
        assert pipe.unet is base.model.unet is base.denoiser
        assert pipe.text_encoder is base.model.text_encoder.text_model
        # transformers 5 dropped `text_model` from one of the two classes; a base always has it
        for encoder in (base.model.text_encoder, base.model.text_encoder_2):
            assert encoder.get_submodule("text_model.encoder.layers.0.self_attn.q_proj")
        assert pipe.text_encoder_2 is base.model.text_encoder_2


def test_default_size_comes_from_the_directory(load: Any, bases: Path, tmp_path: Path) -> None:
    assert [(load(f).size, load(f).unit) for f in ("sdxl", "flux1", "sd3")] == [(SIZE, 4), (SIZE, 8), (SIZE, 8)]
    assert load("qwen-image").size == 1024  # the default
    copied = shutil.copytree(tiny_image_base(bases, "sdxl"), tmp_path / "v")
    edit_json(copied / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert load_image(str(copied)).prediction == "v"
    edit_json(copied / "scheduler" / "scheduler_config.json", prediction_type="sample")
    with pytest.raises(BaseError, match="prediction_type 'sample'"):
        load_image(str(copied))


def test_sd3_has_two_sizes_whose_last_blocks_differ() -> None:
    assert [topology_name(FAMILIES["sd3"], {"num_layers": n}) for n in (24, 38)] == ["sd3", "sd3-large"]
    for n, name in ((24, "sd3"), (38, "sd3-large")):
        blocks = {m.split(".")[2] for m in families()[name].modules if m.startswith("transformer.transformer_blocks")}
        assert len(blocks) == n


def test_schnell_reads_half_as_many_tokens_as_dev(load: Any) -> None:
    dev, schnell = load("flux1"), load("schnell")
    for base in (dev, schnell):
        assert text_length(base) == 24  # the tokenizer's limit
        base.parts["tokenizer_2"].model_max_length = 10**30
    assert (text_length(dev), text_length(schnell)) == (512, 256)


def test_setting_in_model_index_reaches_the_pipelines(bases: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(tiny_image_base(bases, "sdxl"), tmp_path / "flag")
    assert pipeline(load_image(str(copied))).config.force_zeros_for_empty_prompt
    edit_json(copied / "model_index.json", force_zeros_for_empty_prompt=False)
    base = load_image(str(copied))
    for kind in ("text", "image", "inpaint"):
        assert not pipeline(base, kind).config.force_zeros_for_empty_prompt  # type: ignore[arg-type]


# -- fingerprints ------------------------------------------------------------------------------------------------------


def test_fingerprint_depends_on_weights_and_shape(bases: Path, tmp_path: Path, load: Any) -> None:
    before = load("flux1").fingerprint
    copied = shutil.copytree(tiny_image_base(bases, "flux1"), tmp_path / "copy")
    assert load_image(str(copied)).fingerprint == before
    edit_json(copied / "vae" / "config.json", sample_size=64, _diffusers_version="0.1")
    edit_json(copied / "scheduler" / "scheduler_config.json", shift=2.0)
    assert load_image(str(copied)).fingerprint == before
    for part in ("transformer", "text_encoder_2", "vae"):
        file = next((copied / part).glob("*.safetensors"))
        tensors = load_file(file)
        name = next(iter(tensors))
        tensors[name] = tensors[name] + 1
        save_file(tensors, file, {"format": "pt"})
        after = load_image(str(copied)).fingerprint
        assert after != before
        before = after
    edit_json(copied / "vae" / "config.json", scaling_factor=0.5)
    assert load_image(str(copied)).fingerprint != before


# -- pipelines and ControlNets -----------------------------------------------------------------------------------------


def test_a_controlnet_of_another_family_is_refused_by_name(bases: Path, load: Any) -> None:
    with pytest.raises(BaseError, match=r"a ControlNet for SDXL, but the base is FLUX\.1"):
        load_control(tiny_control(bases, "sdxl"), load("flux1"))
    with pytest.raises(BaseError, match=r"a ControlNet for FLUX\.1, but the base is Stable Diffusion 1\.x"):
        load_control(str(tiny_control(bases, "flux1")), load("sd15"))
    with pytest.raises(BaseError, match="is not a ControlNet"):
        load_control(tiny_image_base(bases, "sdxl") / "unet", load("sdxl"))
    with pytest.raises(BaseError, match=r"ControlNet './none'") as caught:
        load_control("./none", load("sdxl"))
    assert "the base's own" in (caught.value.fix or "")


def test_a_controlnet_of_another_width_is_refused(bases: Path, load: Any, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_control(bases, "sdxl"), tmp_path / "other")
    edit_json(other / "config.json", cross_attention_dim=64)
    with pytest.raises(BaseError, match="its cross_attention_dim is 64, the base's 32"):
        load_control(other, load("sdxl"))


def test_pipeline_kind_missing_in_diffusers_is_refused(bases: Path, load: Any) -> None:
    with pytest.raises(BaseError, match=r"no image-to-image pipeline for FLUX\.2"):
        pipeline(load("flux2"), "image")
    base = load("sd3")
    with pytest.raises(BaseError, match="no image-to-image pipeline for Stable Diffusion 3 with a ControlNet"):
        pipeline(base, "image", [load_control(tiny_control(bases, "sd3"), base)])


def test_every_family_names_existing_diffusers_classes() -> None:
    for row in FAMILIES.values():
        for name in [row.classname, *row.pipelines.values(), *row.controlled.values(), row.control]:
            assert not name or hasattr(diffusers, name), name
        assert bool(row.control) == bool(row.controlled)
        assert row.name in families()


def test_released_parts_free_memory_and_cannot_be_used(load: Any) -> None:
    base = load("sdxl")
    before = sum(p.numel() for p in base.model.parameters())
    release(base, "text_encoder", "vae")
    assert sum(p.numel() for p in base.model.parameters()) < before
    assert not any(n.startswith("text_encoder.") for n, _ in base.model.named_modules())
    with pytest.raises(BaseError, match=r"text_encoder of .* was released"):
        pipeline(base)
    with pytest.raises(BaseError, match=r"vae of .* was released"):
        base.part("vae")
    assert (base.unit, base.size) == (4, SIZE)
    with pytest.raises(ConfigError, match="'unet' cannot be released"):
        release(base, "unet")


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(bases: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_image_base(bases, "sd15"), tmp_path / "copy")


def test_truncated_files_and_pickles_are_refused(copy: Path) -> None:
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BaseError, match="truncated"):
        load_image(str(copy))
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(BaseError, match="pickles"):
        load_image(str(copy))


def _without_tensor(copy: Path) -> None:
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["conv_in.weight"]
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_without_tensor, r"missing: conv_in\.weight"),
        (lambda copy: shutil.rmtree(copy / "text_encoder"), "the folder of text_encoder is missing"),
        (
            lambda copy: edit_json(copy / "model_index.json", unet=["my_unet", "MyUNet"]),
            "does not run code that comes with a base",
        ),
        (
            lambda copy: edit_json(copy / "model_index.json", scheduler=["diffusers", "NoSuchScheduler"]),
            "has no NoSuchScheduler",
        ),
        (
            lambda copy: edit_json(copy / "model_index.json", unet=["diffusers", "PixArtTransformer2DModel"]),
            "to no family that veneer knows",
        ),
    ],
)
def test_error_of_an_unloadable_base_gives_the_reason(spoil: Any, says: str, copy: Path) -> None:
    spoil(copy)
    with pytest.raises(BaseError, match=says):
        load_image(str(copy))


def test_text_and_image_bases_are_distinguished(copy: Path) -> None:
    from tests.tiny_base import tiny_base_dir

    with pytest.raises(BaseError, match=r"not an image base: it has no model_index\.json"):
        load_image(str(tiny_base_dir(copy.parent)))
    with pytest.raises(BaseError, match="an image base"):
        load_text(str(copy))
    with pytest.raises(BaseError, match="smollm2-135m is a text base"):  # refused before any download
        load_image("smollm2-135m")


def test_lone_fp16_variant_is_used_with_a_note(copy: Path) -> None:
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({n: t.half() for n, t in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
    file.unlink()
    base = load_image(str(copy), dtype="float32")
    assert any("unet: using the fp16 weights" in note for note in base.notes)
    assert base.denoiser.dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "quantize"),
    [
        *((family, "nf4") for family in ("sdxl", "flux1", "sd3", "z-image")),
        *(pytest.param(family, "int8", marks=pytest.mark.slow) for family in ("sdxl", "sd3", "z-image")),
        ("flux1", "int8"),
    ],
)
def test_quantized_base_equals_its_dequantized_weights(family: str, quantize: Any, tmp_path: Path) -> None:
    folder = str(tiny_image_base(tmp_path, family))
    base, twin = (load_image(folder, dtype="float32", quantize=quantize) for _ in range(2))
    names = quantized_weights(base.denoiser)
    assert names
    assert all(isinstance(base.denoiser.get_parameter(n), Quantized) for n in names)
    assert base.fingerprint == load_image(folder).fingerprint
    for part in twin.model.modules():
        for key, weight in list(part._parameters.items()):
            if isinstance(weight, Quantized):
                part._parameters[key] = torch.nn.Parameter(weight.dense().clone(), requires_grad=False)
    x = torch.randn(2, *latent_shape(base, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([300, 800]) if family == "sdxl" else torch.tensor([0.3, 0.8])
    prompts = ["a red house", "a dog"]
    sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * 2) if family == "sdxl" else None
    with torch.no_grad():
        got, want = (predict(b, x, t, embed_prompts(b, prompts), sizes=sizes) for b in (base, twin))
    assert torch.equal(got, want)
    attachment = attach(base.model)
    attachment.add("it", create(base.model, LoraSpec(rank=2, alpha=2, targets=("to_q",)), seed=0), trainable=True)
    attachment.use("it")
    predict(base, x, t, embed_prompts(base, prompts), sizes=sizes).square().mean().backward()
    assert all(p.B.grad is not None and p.B.grad.any() for p in attachment.adapters["it"].pairs.values())


def test_bitsandbytes_component_is_read_on_cpu(copy: Path) -> None:
    """diffusers saves the quantization constants next to the codes; no GPU is needed."""
    base = load_image(str(copy), dtype="bfloat16", quantize="nf4")
    folder = copy / "unet"
    save_file(saved_tensors(base.denoiser.state_dict()), folder / "diffusion_pytorch_model.safetensors")
    edit_json(folder / "config.json", quantization_config=CONFIG)
    again = load_image(str(copy), dtype="bfloat16")
    for name in quantized_weights(base.denoiser):
        one, two = base.denoiser.get_parameter(name), again.denoiser.get_parameter(name)
        assert torch.equal(one.dense(), two.dense())  # type: ignore[attr-defined]


def test_dtype_device_and_quantization_are_checked(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = load_image(str(copy), dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    assert half.dtype_reason == "as requested"
    with pytest.raises(ConfigError, match="is not a dtype"):
        load_image(str(copy), dtype="int3")
    with pytest.raises(ConfigError, match="is not a known quantization"):
        load_image(str(copy), quantize="q4")  # type: ignore[arg-type]

    class Memory:
        available = 1000

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    with pytest.raises(ResourceError, match="memory are free"):
        load_image(str(copy))


def test_memory_check_counts_quantized_text_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser and T5 need 0.6 bytes per weight; CLIP and the VAE need two."""
    folder = str(tiny_image_base(tmp_path, "flux1"))
    parts = {name: part for name, part in load_image(folder).parts.items() if isinstance(part, torch.nn.Module)}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    small = 2 * (sizes["text_encoder"] + sizes["vae"])
    wanted = 0.6 * (sizes["transformer"] + sizes["text_encoder_2"]) + small

    class Memory:
        available = int(1.01 * wanted)

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    assert load_image(folder, dtype="bfloat16", quantize="nf4").quantized == "nf4"
    Memory.available = int(0.99 * wanted)
    with pytest.raises(ResourceError, match="memory are free"):
        load_image(folder, dtype="bfloat16", quantize="nf4")


def test_missing_built_in_base_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("veneer.models.builtin.packaged_folder", lambda: tmp_path)
    with pytest.raises(BaseError, match="catalogue-flux is in the package veneer-bases, which is not installed"):
        load_image("catalogue-flux")
