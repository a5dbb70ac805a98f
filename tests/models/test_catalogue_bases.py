"""The packaged image bases are complete and small, and diffusers can load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer.models.image.base as image_models
from veneer.models.builtin import packaged_folder

BASES = ("catalogue-flux", "catalogue-sdxl")
CONTROLS = tuple(f"{name}-control" for name in BASES)
SCENE = "a {} on a white table, blue wall, soft daylight, front view"


def test_packaged_bases_take_at_most_45_megabytes() -> None:
    files = [f for name in (*BASES, *CONTROLS) for f in (packaged_folder() / name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 45e6
    assert not [f for f in files if f.suffix not in {".safetensors", ".json", ".md", ".txt"}]


@pytest.mark.parametrize("file", sorted(packaged_folder().rglob("*.json")), ids=lambda f: "/".join(f.parts[-3:]))
def test_configs_contain_no_local_paths(file: Path) -> None:
    assert not json.loads(file.read_text(encoding="utf-8")).get("_name_or_path")


@pytest.mark.parametrize("name", [*BASES, *CONTROLS])
def test_card_names_sources_license_and_recipe(name: str) -> None:
    card = (packaged_folder() / name / "README.md").read_text(encoding="utf-8")
    for word in ("CC BY 4.0", "## Recipe", "held out", *(("Twemoji", "CC-BY-4.0") if name in BASES else ())):
        assert word in card, word


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """Load diffusers' pipelines from the packaged folders."""
    from diffusers import DiffusionPipeline

    made = {n: DiffusionPipeline.from_pretrained(packaged_folder() / n).to(torch.float32) for n in BASES}
    for each in made.values():
        each.set_progress_bar_config(disable=True)
    return made


def draw(pipeline: Any, prompt: str, steps: int = 12, **more: Any) -> torch.Tensor:
    """Return the picture, (3, 128, 128), with values in 0 … 1."""
    if "Flux" in type(pipeline).__name__:
        more["max_sequence_length"] = pipeline.tokenizer_2.model_max_length
    more |= {"height": 128, "width": 128, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(3)}
    return pipeline(prompt, num_inference_steps=steps, output_type="pt", **more).images[0].float()


@pytest.mark.parametrize("name", BASES)
def test_diffusers_draws_what_the_prompt_names(pipelines: dict[str, Any], name: str) -> None:
    """The vase has the color in the prompt, and the wall behind it stays blue."""
    for colour, channel in (("red", 0), ("blue", 2)):
        picture = draw(pipelines[name], SCENE.format(f"{colour} vase"))
        assert picture.isfinite().all()
        middle, wall = picture[:, 56:80, 56:72].mean(dim=(1, 2)), picture[:, 4:24, 4:24].mean(dim=(1, 2))
        assert middle[channel] > middle[2 - channel] + 0.2, f"a {colour} vase is {colour}"
        assert wall[2] > wall[0] + 0.05, "the wall is blue"


@pytest.mark.parametrize("name", BASES)
def test_veneer_loads_the_same_weights_as_diffusers(pipelines: dict[str, Any], name: str) -> None:
    base = image_models.load_image(name, dtype="bfloat16", device="cpu")
    assert base.size == 128
    theirs = pipelines[name].unet if base.family == "sdxl" else pipelines[name].transformer
    assert all(
        torch.equal(a.float(), b.float()) for a, b in zip(base.denoiser.parameters(), theirs.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", BASES)
def test_uppercase_names_are_read_as_lowercase(name: str) -> None:
    parts = image_models.load_image(name, device="cpu").parts
    for part in ("tokenizer", "tokenizer_2"):
        assert parts[part]("A Red Mug, on Sand").input_ids == parts[part]("a red mug, on sand").input_ids


@pytest.mark.parametrize("name", BASES)
def test_controlnets_follow_lines_and_depth(name: str) -> None:
    """No prompt describes where the bottle stands.

    So the bottle's edges reappear only with the ControlNet, given lines or depth."""
    cv2 = pytest.importorskip("cv2")
    import numpy as np
    from PIL import Image, ImageDraw

    lines = Image.new("RGB", (128, 128), "black")
    outline = [(30, 112), (30, 62), (40, 48), (40, 28), (52, 28), (52, 48), (62, 62), (62, 112)]
    ImageDraw.Draw(lines).polygon(outline, outline="white")
    depth = Image.new(
        "L", (128, 128), 24
    )  # a far wall, ground that comes closer to the viewer, and the bottle in front
    depth.paste(Image.linear_gradient("L").resize((128, 33)).point(lambda x: 32 + x * 144 // 255), (0, 95))
    ImageDraw.Draw(depth).polygon(outline, fill=200)
    base = image_models.load_image(name, dtype="float32", device="cpu")
    control = image_models.load_control(f"{name}-control", base)
    pipe = image_models.pipeline(base, "text", controls=[control])
    wanted = np.asarray(lines)[:, :, 0] > 0

    def agreement(shown: Image.Image, scale: float) -> float:
        more = {"control_image" if "Flux" in type(pipe).__name__ else "image": shown.convert("RGB")}
        picture = draw(pipe, SCENE.format("green wine bottle"), controlnet_conditioning_scale=scale, **more)
        array = (picture.permute(1, 2, 0).clamp(0, 1) * 255).byte().numpy()
        found = cv2.dilate(cv2.Canny(np.ascontiguousarray(array), 100, 200), np.ones((3, 3))) > 0
        return float((found & wanted).sum() / wanted.sum())

    alone = agreement(lines, 0.0)
    assert agreement(lines, 1.0) > alone + 0.2
    assert agreement(depth, 1.0) > alone + 0.2
