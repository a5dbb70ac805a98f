"""Errors about a config.json name the invalid value."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.cli.run import run
from tests.edits import edit_json
from tests.families import FAMILIES
from tests.tiny_base import tiny_base_dir
from veneer.errors import BaseError, ConfigError, VeneerError
from veneer.models.config import check_config
from veneer.models.text.base import load_text, read_base_config
from veneer.plan.image import ImageLoad, is_denoiser
from veneer.plan.memory import Load
from veneer.plan.plan import TrainingJob, image_plan, text_plan
from veneer.plan.render import plan_text
from veneer.plan.serving import Traffic
from veneer.plan.shape import text_shape
from veneer.plan.tables import base_config, base_names, device_named

GPU = device_named("h100-80gb")
TEXTS = {str(base_config(name).get("model_type")): base_config(name) for name in base_names()}
BASES = [config for kind, config in sorted(TEXTS.items())]
KEYS = sorted(
    {key for config in BASES for key in [*config, *config.get("text_config", {})]}
    | {"head_dim", "hidden_act", "rope_scaling", "rope_parameters", "layer_types", "mlp_only_layers", "moe_layers"}
    | {"num_key_value_heads", "text_config", "vae", "encoders", "_class_name"}
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 130),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["big", "", "4096", 1e308, float("nan"), 1 << 80, [], {}, [1], [-1], ["x"], {"factor": "x"}, [[]]]),
)


def planned(config: dict[str, Any]) -> str:
    """Return what `veneer plan` reports for these fields of config.json."""
    check_config(config, "a/config.json")
    job = TrainingJob(100, 50.0, 1.0, 4)
    if is_denoiser(config):
        return plan_text(image_plan("base", config, ImageLoad(height=64, width=64), GPU, job))
    shape = text_shape(config)
    return plan_text(text_plan("base", shape, Load((50,)), GPU, job, traffic=Traffic(50, 10, 4, 3)))


@given(base=st.sampled_from(BASES), changes=st.dictionaries(st.sampled_from(KEYS), SCALARS, min_size=1, max_size=3))
@example(base=TEXTS["llama"], changes={"hidden_size": "big"})
@example(base=TEXTS["llama"], changes={"num_hidden_layers": 0})
@example(base=TEXTS["llama"], changes={"num_hidden_layers": 1 << 40})
@example(base=TEXTS["sdxl"], changes={"attention_head_dim": 8})
def test_fuzzed_config_gives_a_plan_or_an_error(base: dict[str, Any], changes: dict[str, Any]) -> None:
    inner = "text_config" in base and "text_config" not in changes
    config = {**base, "text_config": {**base["text_config"], **changes}} if inner else {**base, **changes}
    with suppress(VeneerError):
        assert "memory of one device" in planned(config)


@pytest.mark.parametrize("name", base_names())
def test_every_known_base_passes(name: str) -> None:
    assert "memory of one device" in planned(base_config(name))


@pytest.mark.parametrize("family", FAMILIES)
def test_configs_written_by_transformers_pass(family: str) -> None:
    config = FAMILIES[family]().config.to_dict()
    check_config(config, "here")


WRONG = [
    ({"hidden_size": "big"}, 'hidden_size is "big", not an integer from 1 to'),
    ({"hidden_size": -1}, "hidden_size is -1, not an integer from 1 to"),
    ({"hidden_size": True}, "hidden_size is true, not an integer"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0, not an integer from 1 to 10,000"),
    ({"num_attention_heads": -4}, "num_attention_heads is -4"),
    ({"num_attention_heads": 7, "num_key_value_heads": 7}, "num_attention_heads is 7, not a number that divides"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3, not a number that divides num_attention_heads ="),
    ({"rope_parameters": "linear"}, 'rope_parameters is "linear", not an object'),
    ({"rope_parameters": {"rope_type": "linear", "factor": -2}}, "rope_parameters.factor is -2, not a number above"),
    ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings is "yes", not true or false'),
    ({"rms_norm_eps": "small"}, 'rms_norm_eps is "small", not a number above 0'),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_a_wrong_value_is_named_with_its_file_and_key(
    changes: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_base_dir(tmp_path)
    edit_json(base / "config.json", **{"head_dim": None, **changes})
    job = ("--rows", "5", "--tokens-per-row", "9", "--gpu", "h100-80gb")
    ran = run(capsys, "plan", "--base", str(base), *job, code=2)
    served = run(capsys, "serve", "--base", str(base), code=2)
    for each in (ran, served):
        assert said in each.err
        assert f"where: {base / 'config.json'}: {next(iter(changes))}" in each.err
    assert "listening" not in served.err
    with pytest.raises(ConfigError) as error:
        load_text(str(base))
    assert said in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", "[" * 100_000])
def test_non_object_config_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_base_dir(tmp_path)
    (base / "config.json").write_text(text, encoding="utf-8")
    ran = run(capsys, "plan", "--base", str(base), "--rows", "5", "--tokens-per-row", "9", code=2)
    assert str(base / "config.json") in ran.err
    with pytest.raises(BaseError, match="the config of this base"):
        read_base_config(base)


def test_unknown_unet_config_has_its_own_error(tmp_path: Path) -> None:
    other = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "addition_embed_type": "image"}
    with pytest.raises(ConfigError, match=r"only SD1\.5's and SDXL's U-Nets"):
        planned(other)
    with pytest.raises(ConfigError, match="does not know the model 'PixArtTransformer2DModel'"):
        planned({"_class_name": "PixArtTransformer2DModel"})


def test_a_config_without_a_family_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no model family"):
        planned({})
