"""The packaged image bases: complete, small, loaded by diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import veneer.models.image.base as image_models
from veneer.imaging.adapters import ImagePipeline
from veneer.imaging.controls import parse_control
from veneer.imaging.generate import ImageRequest, Options, generate
from veneer.models.builtin import packaged_folder
from veneer.models.loading import errors_only

BASES = ("catalogue-flux", "catalogue-sdxl")
CONTROLS = tuple(f"{name}-control" for name in BASES)
SCENE = "a {} on a white table, blue wall, soft daylight, front view"


def millions(folder: Path) -> float:
    from safetensors import safe_open

    total = 0
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                assert part.get_dtype() == "BF16", f"{file}: {name}"
                total += torch.Size(part.get_shape()).numel()
    return total / 1e6


def test_everything_together_is_at_most_45_megabytes() -> None:
    files = [f for name in (*BASES, *CONTROLS) for f in (packaged_folder() / name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 45e6
    assert not [f for f in files if f.suffix not in {".safetensors", ".json", ".md", ".txt"}]


@pytest.mark.parametrize("file", sorted(packaged_folder().rglob("*.json")), ids=lambda f: "/".join(f.parts[-3:]))
def test_configs_contain_no_local_paths(file: Path) -> None:
    assert not json.loads(file.read_text(encoding="utf-8")).get("_name_or_path")


@pytest.mark.parametrize("name", [*BASES, *CONTROLS])
def test_catalogue_models_have_expected_sizes(name: str) -> None:
    least, most = (8, 11) if name in BASES else (1, 3)
    assert least <= millions(packaged_folder() / name) <= most


@pytest.mark.parametrize("name", [*BASES, *CONTROLS])
def test_the_card_names_the_drawings_their_licence_and_the_recipe(name: str) -> None:
    card = (packaged_folder() / name / "README.md").read_text(encoding="utf-8")
    for word in ("CC BY 4.0", "## Recipe", "held out", *(("Twemoji", "CC-BY-4.0") if name in BASES else ())):
        assert word in card, word


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """diffusers' own loading, from the folder alone."""
    from diffusers import DiffusionPipeline

    made = {n: DiffusionPipeline.from_pretrained(packaged_folder() / n).to(torch.float32) for n in BASES}
    for each in made.values():
        each.set_progress_bar_config(disable=True)
    return made


def draw(pipeline: Any, prompt: str, steps: int = 12, **more: Any) -> torch.Tensor:
    """(3, 128, 128) in 0 … 1."""
    if "Flux" in type(pipeline).__name__:
        more["max_sequence_length"] = pipeline.tokenizer_2.model_max_length
    more |= {"height": 128, "width": 128, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(3)}
    return pipeline(prompt, num_inference_steps=steps, output_type="pt", **more).images[0].float()


@pytest.mark.parametrize("name", BASES)
def test_diffusers_draws_what_the_prompt_names(pipelines: dict[str, Any], name: str) -> None:
    """Of two colours of one thing before one wall: the thing has its colour, the wall keeps its own."""
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
def test_capitals_are_read_as_small_letters(name: str) -> None:
    parts = image_models.load_image(name, device="cpu").parts
    for part in ("tokenizer", "tokenizer_2"):
        assert parts[part]("A Red Mug, on Sand").input_ids == parts[part]("a red mug, on sand").input_ids


@pytest.mark.parametrize("name", BASES)
def test_the_controlnet_holds_to_lines_and_to_distances(name: str) -> None:
    """Of a bottle that stands where no caption can say: its edges are found again only with the ControlNet, that is
    given them, or how near everything is."""
    cv2 = pytest.importorskip("cv2")
    import numpy as np
    from PIL import Image, ImageDraw

    lines = Image.new("RGB", (128, 128), "black")
    outline = [(30, 112), (30, 62), (40, 48), (40, 28), (52, 28), (52, 48), (62, 62), (62, 112)]
    ImageDraw.Draw(lines).polygon(outline, outline="white")
    depth = Image.new("L", (128, 128), 24)  # a far wall, ground that comes nearer, the bottle before both
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


@pytest.mark.parametrize("name", BASES)
def test_a_controlled_picture_is_diffusers_own(name: str, tmp_path: Path) -> None:
    """Call by call, from the files alone: the ControlNet and the denoiser are told the same at every step. FLUX'
    pipeline scales a picture to -1 … 1 and takes a tensor as it is; SDXL's wants both in 0 … 1."""
    import diffusers
    import numpy as np
    from PIL import Image, ImageDraw

    lines = Image.new("RGB", (128, 128), "black")
    ImageDraw.Draw(lines).ellipse((24, 24, 104, 104), outline="white")
    lines.save(tmp_path / "lines.png")
    flux, prompt = name == "catalogue-flux", SCENE.format("red balloon")
    net = diffusers.FluxControlNetModel if flux else diffusers.ControlNetModel
    kind = diffusers.FluxControlNetPipeline if flux else diffusers.StableDiffusionXLControlNetPipeline
    with errors_only():
        control = net.from_pretrained(packaged_folder() / f"{name}-control")
        theirs = kind.from_pretrained(packaged_folder() / name, controlnet=control).to(torch.float32)
    theirs.set_progress_bar_config(disable=True)

    def run(given: Any) -> tuple[torch.Tensor, list[dict[str, Any]]]:
        with told(theirs.controlnet, theirs.transformer if flux else theirs.unet) as heard:
            more = {"control_image" if flux else "image": given, "controlnet_conditioning_scale": 0.8}
            return draw(theirs, prompt, 4, **more), heard

    base = image_models.load_image(name, dtype="float32", device="cpu")
    spec = parse_control(f"edges={tmp_path / 'lines.png'}:0.8")
    with ImagePipeline(base) as mixer, told(mixer.control(f"{name}-control"), base.denoiser) as ours:
        options = Options(steps=4, guidance=3.0, controls=(spec,))
        made = (
            torch.from_numpy(np.array(generate(mixer, [ImageRequest(prompt, seed=3)], options)[0].image)).permute(
                2, 0, 1
            )
            / 255
        )
    pixels = torch.from_numpy(np.array(lines)).permute(2, 0, 1)[None] / 255
    for given in (lines, pixels * 2 - 1 if flux else pixels):
        picture, heard = run(given)
        assert len(heard) == len(ours) == 8
        for i, (one, other) in enumerate(zip(heard, ours, strict=True)):
            assert one.keys() == other.keys()
            for key, value in one.items():
                assert torch.allclose(value, other[key], atol=1e-5), f"call {i}: {key}"
        assert (picture - made).abs().max() <= 1 / 255
    wrong, heard = run(pixels if flux else pixels * 2 - 1)
    assert not torch.allclose(heard[0]["controlnet_cond"], ours[0]["controlnet_cond"], atol=0.1)
    assert (wrong - made).abs().max() > 0.1


@contextmanager
def told(*models: torch.nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Every tensor that the models are called with, in the order of the calls."""
    heard: list[dict[str, Any]] = []

    def hook(model: Any, args: Any, kwargs: Any) -> None:
        named = dict(enumerate(args)) | kwargs
        heard.append({str(key): value.clone() for key, value in flat(named) if isinstance(value, torch.Tensor)})

    def flat(value: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
        for key, item in value.items():
            if isinstance(item, dict | list | tuple):
                within = item if isinstance(item, dict) else dict(enumerate(item))
                yield from ((f"{key}.{inner}", leaf) for inner, leaf in flat(within))
            else:
                yield str(key), item

    hooks = [model.register_forward_pre_hook(hook, with_kwargs=True) for model in models]
    try:
        yield heard
    finally:
        for each in hooks:
            each.remove()
