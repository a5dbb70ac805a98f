"""Configuration of image runs: selected by `data.pictures` and parsed strictly.

A preset overrides defaults, but not the file's keys.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from veneer.errors import ConfigError
from veneer.train.config.image import PRESETS, TARGET_WORDS, ImageDataSection
from veneer.train.config.load import ImageTrainConfig, TrainConfig, load_config
from veneer.train.config.text import config_keys


def error(tmp_path: Path, text: str, *overrides: str) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    return str(caught.value)


MINIMAL = "base: catalogue-flux\ndata:\n  pictures: drawings\noutput: out\n"


def _read(tmp_path: Path, text: str, *overrides: str) -> tuple[Any, Any]:
    (tmp_path / "run.yaml").write_text(text)
    return load_config(tmp_path / "run.yaml", overrides)


def test_a_folder_of_images_selects_image_training(tmp_path: Path) -> None:
    config, sources = _read(tmp_path, MINIMAL)
    assert isinstance(config, ImageTrainConfig)
    assert config.data.pictures == str(tmp_path / "drawings")
    assert config.output.directory == str(tmp_path / "out")
    assert set(sources) == {name for name, _ in config_keys(ImageTrainConfig)}
    text, _ = _read(tmp_path, "base: b\ndata: {train: x.jsonl}\noutput: out\n")
    assert isinstance(text, TrainConfig)
    by_override, _ = _read(tmp_path, "base: b\noutput: out\n", "data.pictures=here")
    assert by_override.data.pictures == str(Path.cwd() / "here")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("loss: {snr_gama: 5}", "unknown key `loss.snr_gama`; did you mean `loss.snr_gamma`?"),
        ("snr_gamma: 5", "unknown key `snr_gamma`; did you mean `loss.snr_gamma`?"),
        ("adapter: {modules_to_save: [x]}", "unknown key `adapter.modules_to_save`"),
        ("adapter: {kind: lokr}", "cannot be saved in the diffusers layout: set `output.layout` to kohya or peft"),
        ("preset: stile", "`preset` should be 'style', 'subject' or 'product'"),
        ("loss: {shift: much}", "`loss.shift` should be a valid number or 'auto' or 'resolution'"),
        ("loss: {shift: -1.0}", "should be greater than 0"),
        ("samples: {every: 10}", "`samples.every` needs `samples.prompts`"),
        ("adapter: {text_encoders: [text_encoder]}\n", "`output.layout: peft` supports the denoiser only"),
        ("memory: {offload_blocks: 2, activation_checkpointing: off}", "needs `memory.activation_checkpointing`"),
        ("ema: {decay: 1.0}", "`ema.decay` should be less than 1, found 1.0"),
        ("schedule: {epochs: 2, steps: 3}", "both set the length of the run"),
        ("# class_prompt", "`data.class_prompt` needs class pictures"),
    ],
)
def test_invalid_settings_are_named_with_their_location(tmp_path: Path, line: str, says: str) -> None:
    overrides = ["output.layout=peft"] if "`output.layout: peft`" in says else []
    overrides += ["data.class_prompt=a dog"] if line == "# class_prompt" else []
    text = error(tmp_path, MINIMAL + line + "\n", *overrides)
    assert says in text
    assert "image-config.md" in text


def test_class_images_need_a_prompt(tmp_path: Path) -> None:
    assert "needs `data.class_prompt`" in error(tmp_path, MINIMAL + "preset: subject\n")
    config, _ = _read(tmp_path, MINIMAL + "preset: subject\n", "data.class_prompt=a dog")
    assert config.data.class_count == 100


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_overrides_defaults_but_no_given_key(tmp_path: Path, name: str) -> None:
    extra = ["data.class_prompt=a dog"] if name == "subject" else []
    config, sources = _read(tmp_path, MINIMAL + f"preset: {name}\nadapter: {{rank: 7}}\n", *extra, "schedule.steps=9")
    assert (config.adapter.rank, config.schedule.steps) == (7, 9)
    assert "run.yaml:6" in sources["adapter.rank"]
    for key, (value, because) in PRESETS[name].settings.items():
        section, _, leaf = key.partition(".")
        if key not in ("adapter.rank", "schedule.steps"):
            assert getattr(getattr(config, section), leaf) == value
            assert sources[key] == f"from preset {name} ({because})"
        assert because, "each value states its evidence"
    plain, _ = _read(tmp_path, MINIMAL)
    assert plain.ema.decay is None


def test_sample_sheets_are_generated_per_epoch_or_step(tmp_path: Path) -> None:
    for every in ("epoch", 7):
        assert _read(tmp_path, MINIMAL, "samples.prompts=[a]", f"samples.every={every}")[0].samples.every == every


def test_length_of_a_run_is_epochs_or_steps(tmp_path: Path) -> None:
    assert (_read(tmp_path, MINIMAL)[0].steps, _read(tmp_path, MINIMAL)[0].epochs) == (1000, None)
    epochs = _read(tmp_path, MINIMAL, "schedule.epochs=2")[0]
    assert (epochs.steps, epochs.epochs) == (None, 2)


def test_the_recipe_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    config, _ = _read(tmp_path, MINIMAL, f"data.class_folder={tmp_path}/dogs", "data.class_prompt=a dog")
    assert str(tmp_path) not in str(config.recipe())
    assert config.recipe()["data"]["class_folder"] == "dogs"


def test_target_words_reach_every_block_of_every_family() -> None:
    """On the real module names, the target words select all attention projections and all feed-forward layers.

    They select nothing outside the blocks.
    """
    from veneer.core.targets import target_matches
    from veneer.formats.topology import families

    for name, family in families().items():
        linear = [m for m, kind in family.modules.items() if kind == "linear" and m.startswith(family.denoiser)]
        chosen = [m for m in linear if target_matches(TARGET_WORDS["attention+ff"], m)]
        blocks = [m for m in linear if re.search(r"(transformer_blocks|layers|_refiner)\.\d+\.", m)]
        inside = [m for m in blocks if ".norm" not in m and "_mod." not in m]
        if inside:
            assert chosen == [m for m in inside if "adaln" not in m.lower()], name
        attention = [m for m in linear if target_matches(TARGET_WORDS["attention"], m)]
        assert set(attention) <= set(chosen)
        assert all(".attn" in m or ".attention." in m for m in attention)
        convolutions = [m for m, kind in family.modules.items() if kind == "conv" and m.startswith(family.denoiser)]
        every = (*linear, *convolutions)
        with_convolutions = {m for m in every if target_matches(TARGET_WORDS["attention+ff+conv"], m)}
        one_place = {m for m in convolutions if m.endswith(("conv_shortcut", "proj_in", "proj_out", "pos_embed.proj"))}
        assert with_convolutions == set(chosen) | (set(convolutions) - one_place), name


@pytest.mark.parametrize(
    "keys",
    [
        {"background": "mauve"},
        {"resolution": 4},
        {"resolution": ()},
        {"trigger": "a, b"},
        {"trigger": " "},
        {"caption_dropout": 1.5},
        {"class_prompt": "a sks dog", "trigger": "sks"},
        {"pictures": ("a", "b"), "masks": "m"},
        {"flips": True},
    ],
)
def test_settings_are_strict(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImageDataSection.model_validate({"pictures": "a", **keys})
