"""diffusers' pipelines that load the written files give the outputs of the attached adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from tests.formats import tiny_image as tiny
from tests.formats.image_adapters import random_adapter as random_image_adapter
from veneer.core.adapter import Adapter, Pair
from veneer.core.forms import Delta
from veneer.errors import AdapterError
from veneer.files.safetensors import read_tensors
from veneer.formats import convert
from veneer.formats.diffusers import LOADABLE
from veneer.formats.topology import families

pytest.importorskip("diffusers")
loaders = pytest.importorskip("diffusers.loaders")
pytest.importorskip("diffusers.loaders.lora_pipeline")

UNET = [
    "conv_in", "time_embedding.linear_1", "add_embedding.linear_2", "down_blocks.1.attentions.0.proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k", "down_blocks.1.downsamplers.0.conv",
    "mid_block.resnets.0.conv1", "mid_block.resnets.0.time_emb_proj",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
    "up_blocks.0.attentions.2.transformer_blocks.9.attn1.to_v", "up_blocks.0.resnets.0.conv_shortcut",
    "up_blocks.1.upsamplers.0.conv", "conv_out",
]  # fmt: skip
CLIP = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1", "encoder.layers.1.self_attn.out_proj"]
CLIP = [f"text_model.{name}" for name in CLIP]
FLUX = [
    "x_embedder", "context_embedder", "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.guidance_embedder.linear_2", "transformer_blocks.0.norm1.linear", "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.attn.add_k_proj", "transformer_blocks.1.attn.to_add_out",
    "transformer_blocks.1.ff_context.net.0.proj", "single_transformer_blocks.0.attn.to_k",
    "single_transformer_blocks.1.proj_mlp", "single_transformer_blocks.1.proj_out", "norm_out.linear", "proj_out",
]  # fmt: skip


class Pipeline:
    """The attributes of a pipeline that diffusers' loaders use."""

    hf_device_map = None

    def __init__(self, **components: nn.Module) -> None:
        self.components = components
        for name, component in components.items():
            setattr(self, name, component)


class XL(Pipeline, loaders.StableDiffusionXLLoraLoaderMixin):
    pass


class Flux(Pipeline, loaders.FluxLoraLoaderMixin):
    pass


OUTPUT: dict[str, Callable[[nn.Module], Tensor]] = {"unet": tiny.unet_output, "transformer": tiny.flux_output}


def outputs(pipeline: Pipeline) -> dict[str, Tensor]:
    return {name: OUTPUT.get(name, tiny.clip_output)(model) for name, model in pipeline.components.items()}


@pytest.fixture(scope="module")
def xl() -> Pipeline:
    return XL(unet=tiny.sdxl_unet(), text_encoder=tiny.clip(False), text_encoder_2=tiny.clip(True))


@pytest.fixture(scope="module")
def flux() -> Pipeline:
    return Flux(transformer=tiny.flux(), text_encoder=tiny.clip(False))


def random_adapter(pipeline: Pipeline, dora: bool) -> Adapter:
    names = {"unet": UNET, "transformer": FLUX, "text_encoder": CLIP, "text_encoder_2": [*CLIP, "text_projection"]}
    pairs: dict[str, Pair] = {}
    for component, model in pipeline.components.items():
        pairs |= tiny.random_pairs(model, component, names[component], dora=dora)
    return Adapter(pairs)


def agrees(pipeline: Pipeline, adapter: Adapter, folder: Path) -> None:
    """Assert that diffusers gives the outputs of the attached adapter, not those of the base."""
    convert.write(adapter, folder / "it.safetensors", "diffusers")
    base = outputs(pipeline)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # raised for keys that diffusers cannot assign
        pipeline.load_lora_weights(str(folder), weight_name="it.safetensors", adapter_name="it")
    theirs = outputs(pipeline)
    pipeline.unload_lora_weights()
    assert all(torch.equal(after, base[component]) for component, after in outputs(pipeline).items())
    attachments = [tiny.attached(m, c, adapter) for c, m in pipeline.components.items()]
    ours = outputs(pipeline)
    for attachment in attachments:
        attachment.detach()
    for component, before in base.items():
        moved = (ours[component] - before).abs().max()
        assert moved > 1e-2, f"{component}: the adapter does nothing"
        off = (theirs[component] - ours[component]).abs().max()
        assert off < 1e-9 * moved, f"{component}: diffusers is {off / moved:.2g} off"


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["xl", "flux"])
def test_diffusers_loads_pairs_of_any_rank_and_scale(name, dora, request, tmp_path):
    pipeline = request.getfixturevalue(name)
    agrees(pipeline, random_adapter(pipeline, dora), tmp_path)


def test_diffusers_loads_changes_of_the_bias(flux, tmp_path):
    adapter = random_adapter(flux, False)
    for name, pair in adapter.pairs.items():
        value = torch.full((pair.B.shape[0],), 0.25, dtype=torch.float64)
        adapter.deltas[f"{name}.bias"] = Delta("dense", {"value": value}, tuple(value.shape), pair.scale)
    agrees(flux, adapter, tmp_path)


def test_diffusers_loads_new_norms_of_flux(flux, tmp_path):
    adapter = random_adapter(flux, False)
    for name in ("transformer_blocks.0.attn.norm_q", "single_transformer_blocks.1.attn.norm_k"):
        adapter.modules[f"transformer.{name}"] = {"weight": torch.linspace(0.5, 2, 16, dtype=torch.float64)}
    agrees(flux, adapter, tmp_path)


def test_diffusers_fails_on_a_text_encoder_without_attention(xl, tmp_path):
    """Shows why veneer refuses to write such an adapter."""
    pairs = tiny.random_pairs(xl.text_encoder, "text_encoder", ["text_model.encoder.layers.1.mlp.fc1"])
    with pytest.raises(AdapterError, match=r"without pairs in its attention.*\n.*layers\.1\.mlp\.fc1"):
        convert.encode(Adapter(pairs), "diffusers", family="sdxl")
    key = "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_"
    pair = next(iter(pairs.values()))
    with pytest.raises(ValueError, match="infer"):
        xl.load_lora_weights({f"{key}A.weight": pair.A, f"{key}B.weight": pair.B})


def test_diffusers_reads_written_kohya_files_of_sdxl(xl, tmp_path):
    """All modules of the file have the same alpha.

    With different alphas, diffusers cannot assign them to attention modules, because it looks for `to_q_lora`
    among module names. It then uses the most common alpha."""
    names = {"unet": UNET, "text_encoder": CLIP, "text_encoder_2": CLIP}
    pairs: dict[str, Pair] = {}
    for component, model in xl.components.items():
        pairs |= tiny.random_pairs(model, component, names[component], ranks=(2,), scales=(0.5,))
    convert.write(Adapter(pairs), tmp_path / "it.safetensors", "kohya", family="sdxl")
    xl.load_lora_weights(str(tmp_path), weight_name="it.safetensors", adapter_name="it")
    theirs = outputs(xl)
    xl.unload_lora_weights()
    attachments = [tiny.attached(m, c, Adapter(pairs)) for c, m in xl.components.items()]
    ours = outputs(xl)
    for attachment in attachments:
        attachment.detach()
    for component, want in ours.items():
        torch.testing.assert_close(theirs[component], want, rtol=1e-7, atol=1e-7)


def test_diffusers_splits_written_kohya_files_of_flux():
    """diffusers' converter supports only the official widths.

    Covers q, k and v that share one A, and a linear1 joined from four pairs."""
    wide = 3072
    block, single = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"
    g = torch.Generator().manual_seed(0)
    shared = torch.randn(2, wide, generator=g)
    pairs = {
        f"{block}.attn.{name}": Pair(shared, torch.randn(wide, 2, generator=g), 0.5)
        for name in ("to_q", "to_k", "to_v")
    }
    for i, name in enumerate(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")):
        rows = 4 * wide if name == "proj_mlp" else wide
        A, B = torch.randn(1, wide, generator=g), torch.randn(rows, 1, generator=g)
        pairs[f"{single}.{name}"] = Pair(A, B, (1.0, 2.0, 0.5, 4.0)[i])
    pairs[f"{block}.ff.net.2"] = Pair(torch.randn(3, 4 * wide, generator=g), torch.randn(wide, 3, generator=g), 1 / 3)
    encoded = convert.encode(Adapter(pairs), "kohya", family="flux1")
    theirs = loaders.FluxLoraLoaderMixin.lora_state_dict(dict(encoded.tensors))
    assert {k.rpartition(".lora_")[0] for k in theirs} == set(pairs)
    for name, pair in pairs.items():
        A, B = (theirs[f"{name}.lora_{half}.weight"].double() for half in "AB")
        x = torch.randn(pair.A.shape[1], generator=g, dtype=torch.float64)
        want = pair.scale * (pair.B.double() @ (pair.A.double() @ x))
        assert (B @ (A @ x) - want).norm() < 1e-6 * want.norm(), name


LOADER_MIXINS = [
    ("sd15", "StableDiffusionLoraLoaderMixin"), ("sd2", "StableDiffusionLoraLoaderMixin"),
    ("sdxl", "StableDiffusionXLLoraLoaderMixin"), ("flux1", "FluxLoraLoaderMixin"),
    ("flux2", "Flux2LoraLoaderMixin"), ("qwen-image", "QwenImageLoraLoaderMixin"),
    ("z-image", "ZImageLoraLoaderMixin"), ("sd3", "SD3LoraLoaderMixin"), ("sd3-large", "SD3LoraLoaderMixin"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "mixin"), LOADER_MIXINS)
def test_written_names_identify_their_family(family, mixin, tmp_path):
    """diffusers' converters change none of the keys that veneer writes, and read the settings."""
    loader = getattr(loaders.lora_pipeline, mixin)
    assert loader._lora_loadable_modules == list(LOADABLE.get(family, ("transformer",)))
    own = families()[family]
    adapter = random_image_adapter(own, lambda m: m.partition(".")[0] in loader._lora_loadable_modules)
    convert.write(adapter, tmp_path / "it.safetensors", "diffusers", family=family)
    found = loader.lora_state_dict(str(tmp_path), weight_name="it.safetensors", return_lora_metadata=True)
    state, settings = found[0], found[-1]
    assert state.keys() == read_tensors(tmp_path / "it.safetensors")[0].keys()
    for component in {m.partition(".")[0] for m in adapter.pairs}:
        given = {k.partition(".")[2]: v for k, v in settings.items() if k.startswith(f"{component}.")}
        assert LoraConfig(**given).r >= 1
