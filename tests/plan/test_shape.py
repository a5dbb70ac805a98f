"""The shape read from a base's config equals the model that transformers or diffusers builds."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import families
from veneer.core.adapter import LoraSpec
from veneer.core.init import create
from veneer.core.targets import ALL_LINEAR, resolve_targets
from veneer.errors import ConfigError
from veneer.models.image.families import PLANNED_FAMILIES, TARGET_WORDS
from veneer.plan.image import ImageLoad, image_counts, is_denoiser
from veneer.plan.shape import PairForm, layer_pairs, module_shape, pair_parameters, text_shape
from veneer.plan.tables import base_config, base_names
from veneer.train.preflight import trainable_parameters

TEXT = [name for name in base_names() if not is_denoiser(base_config(name))]
IMAGE = [name for name in base_names() if is_denoiser(base_config(name))]
PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248, "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800, "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552, "mistralai/Mistral-Large-Instruct-2407": 122_610_069_504,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704, "mistralai/Mixtral-8x22B-v0.1": 140_620_634_112,
    "Qwen/Qwen3-8B": 8_190_735_360, "Qwen/Qwen3-30B-A3B": 30_532_122_624, "Qwen/Qwen3-235B-A22B": 235_093_634_560,
    "google/gemma-3-1b-it": 999_885_952, "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "stabilityai/stable-diffusion-xl-base-1.0": 2_567_463_684, "black-forest-labs/FLUX.1-dev": 11_901_408_320,
    "Qwen/Qwen-Image": 20_430_401_088,
}  # fmt: skip
"""Parameter counts shown on the Hugging Face Hub."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_equal_the_published_counts(name: str) -> None:
    config = base_config(name)
    counted = image_counts(config, ImageLoad(1, 64, 64)) if name in IMAGE else text_shape(config)
    assert counted.parameters == PUBLISHED[name]


@pytest.mark.parametrize("name", TEXT)
def test_every_text_base_of_the_table_has_a_shape(name: str) -> None:
    assert text_shape(base_config(name)).parameters > 1e8


@pytest.mark.parametrize("name", ["sd15", "sdxl", "z-image", "sd3.5-medium", "flux.1-schnell", "flux.2-dev"])
def test_trainable_counts_of_denoisers_equal_those_in_training(name: str) -> None:
    import diffusers

    config = base_config(name)
    with torch.device("meta"):
        model = getattr(diffusers, PLANNED_FAMILIES[config["model_type"]].classname).from_config(config)
    for word, kind in product([*TARGET_WORDS, ALL_LINEAR], ("lora", "loha", "lokr")):
        spec = LoraSpec(rank=4, targets=(TARGET_WORDS.get(word, word),), kind=kind)
        counts = image_counts(config, ImageLoad(1, 64, 64, rank=4, targets=word, form=PairForm.of(spec)))
        assert counts.trainable == trainable_parameters(model, resolve_targets(model, spec), spec)[0], (word, kind)


@pytest.mark.parametrize("name", ["catalogue-sdxl/unet", "catalogue-flux/transformer"])
def test_built_in_image_bases_match_their_files(name: str) -> None:
    from veneer.models.builtin import packaged_folder

    folder = packaged_folder() / name
    size = next(folder.glob("*.safetensors")).stat().st_size
    counts = image_counts(base_config(str(folder)), ImageLoad(1, 64, 64))
    assert 2 * counts.parameters <= size <= 2 * counts.parameters + 300_000  # bfloat16 values plus the file's header


@pytest.mark.parametrize("family", ["llama3", "llama4", "mistral", "mixtral", "qwen3", "qwen3_moe", "gemma3", "phi3"])
def test_shape_counts_equal_base_and_adapter_parameters(family: str) -> None:
    model, spec = {**families.FAMILIES, **families.OTHERS}[family](), LoraSpec(rank=4)
    shape = module_shape(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert pair_parameters(shape, spec) == trainable_parameters(model, resolve_targets(model, spec), spec)[0]
    assert text_shape(model.config.to_dict()) == shape


@pytest.mark.parametrize("changes", [{}, {"attention_k_eq_v": True, "num_global_key_value_heads": 1}])
def test_layers_with_different_heads_are_counted_as_built(changes: dict[str, Any]) -> None:
    model, spec = families.gemma4(**changes), LoraSpec(rank=4)
    shape = module_shape(model)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert pair_parameters(shape, spec) == trainable_parameters(model, resolve_targets(model, spec), spec)[0]
    kv = 1 if changes else 2
    assert [(layer.kv_heads, layer.head_dim) for layer in shape.layers] == [(2, 8), (kv, 16)] * 2
    assert [layer.window for layer in shape.layers] == [16, None] * 2


@pytest.mark.parametrize(
    "spec",
    [
        LoraSpec(rank=4, targets=("q_proj", "v_proj")),
        LoraSpec(rank=4, exclude=("*down_proj",)),
        LoraSpec(rank=4, layers=(1,)),
        LoraSpec(rank=4, rank_pattern={"q_proj": 2}),
        LoraSpec(rank=4, dora=True),
        LoraSpec(rank=4, targets=("re:.*mlp.*",)),
        LoraSpec(rank=3, kind="loha"),
        LoraSpec(rank=2, kind="lokr"),
        LoraSpec(rank=1, kind="lokr", factor=4, decompose_both=True, rank_pattern={"q_proj": 100}),
    ],
    ids=["targets", "exclude", "layers", "pattern", "dora", "regex", "loha", "lokr", "lokr by 4"],
)
def test_trainable_counts_equal_those_in_training(spec: LoraSpec) -> None:
    model = families.llama3()
    made = sum(t.numel() for _, t in create(model, spec, seed=0).tensors())
    assert pair_parameters(module_shape(model), spec) == made


def test_ranks_are_listed_by_layer_and_matrix() -> None:
    shape = text_shape(families.llama3().config.to_dict())
    pairs = layer_pairs(shape, LoraSpec(rank=4, layers=(1,), targets=("q_proj",)), 4)
    assert [{name: costs.rank for name, costs in layer.items()} for layer in pairs] == [{}, {"self_attn.q_proj": 4}]


def test_a_multimodal_config_gives_its_language_model() -> None:
    inner = {k: v for k, v in base_config("google/gemma-3-4b-it").items() if k != "model_type"}
    whole = {"model_type": "gemma3", "text_config": {**inner, "model_type": "gemma3_text"}, "vision_config": {}}
    assert text_shape(whole) == text_shape(base_config("google/gemma-3-4b-it"))


def test_an_unknown_family_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="does not know the model family 'lama'") as caught:
        text_shape({"model_type": "lama"})
    assert "llama" in str(caught.value.fix)


def test_a_config_that_transformers_refuses_is_reported_with_its_base() -> None:
    with pytest.raises(ConfigError, match="transformers cannot build a model") as caught:
        text_shape({"model_type": "llama", "hidden_act": "no such"}, "my/base")
    assert caught.value.where == "my/base"


def test_a_folder_and_a_file_give_the_same_config(tmp_path: Path) -> None:
    config = base_config("smollm2-135m")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert base_config(str(tmp_path)) == base_config(str(tmp_path / "config.json")) == config
