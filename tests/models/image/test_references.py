"""Editing bases: inputs for reference pictures, and generated results."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.attached import attached, holding
from tests.image_twins import diffusers_pipeline, fold, latent_shape, levels, random_adapter
from tests.tiny_image_base import EDITING, LENGTH, qwen_edit_pipeline, small_references, tiny_image_base
from veneer.core.adapter import Adapter, Pair
from veneer.errors import BaseError, ConfigError
from veneer.models.image.base import ImageBase, load_image
from veneer.models.image.generate import ImageRow, MixPlan, PictureSettings, generate_images
from veneer.models.image.predict import embed_prompts, encode_pictures, predict, reference_size

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")]
SIZE = 64  # the minimum reference size of FLUX.2's pipeline
PIPELINES = {"kontext": "FluxKontextPipeline", "flux2": "Flux2Pipeline", "klein": "Flux2KleinPipeline"}
GUIDANCE = {"klein": 1.0, "qwen-edit": 2.0, "qwen-edit-plus": 2.0}


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        small_references(patch)
        yield


def pipeline_of(places: Path, family: str) -> Any:
    place = tiny_image_base(places, family)
    return diffusers_pipeline(place, PIPELINES[family]) if family in PIPELINES else qwen_edit_pipeline(place)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "image-bases"


@pytest.fixture(scope="module")
def bases(places: Path) -> dict[str, ImageBase]:
    return {family: load_image(str(tiny_image_base(places, family))) for family in EDITING}


def noise(width: int = SIZE, height: int = SIZE, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def theirs(pipe: Any, references: list[Image.Image], seed: int, **more: Any) -> Image.Image:
    """Return the picture of diffusers' pipeline.

    Settings keep Kontext's pipeline from enlarging a tiny picture to a megapixel."""
    whole = {"max_area": SIZE * SIZE, "_auto_resize": False} if "Kontext" in type(pipe).__name__ else {}
    given = {"num_inference_steps": 3, "height": SIZE, "width": SIZE, "max_sequence_length": LENGTH} | whole | more
    if type(pipe).__name__ != "FluxKontextPipeline":
        given["max_sequence_length"] = 512
    if "Qwen" in type(pipe).__name__:  # Qwen's pipeline supports only true classifier-free guidance
        given |= {"true_cfg_scale": given.pop("guidance_scale"), "negative_prompt": ""}
    generator = torch.Generator().manual_seed(seed)
    image = references if len(references) > 1 else references[0]
    made: Image.Image = pipe(prompt="a red house", image=image, generator=generator, **given).images[0]
    return made


@pytest.mark.parametrize("family", EDITING)
def test_edit_with_an_adapter_equals_merged_diffusers(family: str, bases: dict[str, ImageBase], places: Path) -> None:
    base = bases[family]
    guidance = {"guidance_scale": GUIDANCE.get(family, 3.5)}
    pipe = pipeline_of(places, family)
    adapter = random_adapter(base.model, seed=1)
    several = [noise(seed=1), noise(96, 64, seed=2)][: base.references]
    settings = PictureSettings(SIZE, SIZE, 3, guidance["guidance_scale"], references=tuple(several))
    with holding(base.model, it=adapter) as attachment:
        plan = MixPlan((("it", 0.8),), ((0.0, (("it", 0.8),)),))
        rows = [ImageRow("a red house", seed=5, plan=plan), ImageRow("a red house", seed=5)]
        under, alone = (made.image for made in generate_images(base, rows, settings, attachment=attachment))
    assert levels(alone, theirs(pipe, several, 5, **guidance)) <= 1
    fold(pipe, [(adapter, 0.8)])
    assert levels(under, theirs(pipe, several, 5, **guidance)) <= 1
    plain = generate_images(base, [ImageRow("a red house", seed=5)], PictureSettings(SIZE, SIZE, 3))[0].image
    assert levels(alone, plain) > 1  # the references have an effect


@pytest.mark.parametrize("family", EDITING)
def test_rows_of_a_batch_edit_separate_pictures(family: str, bases: dict[str, ImageBase]) -> None:
    base, settings = bases[family], PictureSettings(SIZE, SIZE, 2)
    rows = [ImageRow("a cat", seed=i, references=(noise(seed=i),)) for i in range(3)]
    together = [made.image for made in generate_images(base, rows, settings)]
    for row, image in zip(rows, together, strict=True):
        assert levels(generate_images(base, [row], settings)[0].image, image) <= 1
    assert levels(together[0], together[1]) > 1


@pytest.mark.parametrize("family", EDITING)
def test_predictions_and_gradients_equal_pefts(family: str, places: Path) -> None:
    """A and B of every block get PEFT's gradients, including the gradients that come from references."""
    peft = pytest.importorskip("peft")
    place = str(tiny_image_base(places, family))
    ours, twin = load_image(place), load_image(place)
    g = torch.Generator().manual_seed(0)
    x, target = (torch.randn(2, *latent_shape(ours, 32, 32), generator=g) for _ in range(2))
    sizes = [(32, 32), (32, 64)][: ours.references]
    shown = [torch.randn(2, *latent_shape(ours, *size), generator=g) for size in sizes]
    read = [(noise(seed=1),), (noise(96, 64, seed=2),)]
    text, t = embed_prompts(ours, ["a red house", "a dog"], read), torch.tensor([0.3, 0.8])
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    twin.denoiser.add_adapter(config)
    theirs_by_name = {n: p for n, p in twin.denoiser.named_parameters() if "lora_" in n}
    start = f"{ours.row.denoiser}."
    modules = sorted({n.rpartition(".lora_")[0] for n in theirs_by_name})
    pairs = {
        start + m: Pair(*(theirs_by_name[f"{m}.lora_{k}.default.weight"].detach().clone() for k in "AB"), 2.0)
        for m in modules
    }
    with attached(ours.model, Adapter(pairs), name="it", trainable=True) as attachment:
        got = predict(ours, x, t, text, references=shown)
        (got - target).square().mean().backward()
        want = predict(twin, x, t, text, references=shown)
        (want - target).square().mean().backward()
        assert torch.allclose(got, want, atol=1e-5)
        trained = attachment.adapters["it"].pairs
        learned = 0
        for m in modules:
            for k in "AB":
                mine, other = getattr(trained[start + m], k).grad, theirs_by_name[f"{m}.lora_{k}.default.weight"].grad
                if other is None:  # the last block's text output is not used
                    assert mine is None or not mine.any()
                    continue
                learned += 1
                assert torch.allclose(mine, other, atol=1e-6 + 1e-4 * float(other.abs().max())), f"{m}.{k}"
        assert learned >= 2 * len(modules) - 12
        assert (predict(ours, x, t, text) - got).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["qwen-edit", "qwen-edit-plus"])
def test_prompts_with_references_are_encoded_as_in_diffusers(
    family: str, bases: dict[str, ImageBase], places: Path
) -> None:
    base, pipe = bases[family], pipeline_of(places, family)
    with torch.no_grad():
        shown = noise(96, 64, seed=2)
        ours = embed_prompts(base, ["a red house", "a dog in the house"], [[shown], [noise()]])
        width, height = reference_size(base, *shown.size)
        seen = shown.resize((width, height), Image.Resampling.LANCZOS)
        if family == "qwen-edit-plus":
            seen = shown.resize((32, 32), Image.Resampling.LANCZOS)  # 384² / 256 pixels, rounded to multiples of 32
        theirs, mask = pipe.encode_prompt(prompt=["a red house"], image=[seen] if base.references > 1 else seen)
        plain = embed_prompts(base, ["a red house"])
    assert mask is None
    found = ours.unpadded()[0]
    assert torch.allclose(found, theirs[0], atol=1e-5)
    assert found.shape != plain.embeds[0].shape
    assert ours.cut == ["", ""]
    assert not torch.equal(found, embed_prompts(base, ["a red house"], [[noise()]]).embeds[0])


def test_invalid_references_are_refused(bases: dict[str, ImageBase], places: Path) -> None:
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    dev = load_image(str(tiny_image_base(places, "flux1")))
    sdxl = load_image(str(tiny_image_base(places, "sdxl")))
    row, one = ImageRow("a cat"), (noise(),)
    for base, settings, says in [
        (dev, PictureSettings(SIZE, SIZE, references=one), "does not edit, and takes no reference"),
        (
            bases["kontext"],
            PictureSettings(SIZE, SIZE, references=one * 2),
            "takes at most 1 reference picture, but 2 are set",
        ),
        (bases["kontext"], PictureSettings(SIZE, SIZE, references=one, image=noise()), "cannot be combined"),
        (
            bases["klein"],
            PictureSettings(SIZE, SIZE, references=(noise(60, 64),)),
            "60×64, but tiny-klein requires sides in multiples",
        ),
        (
            bases["klein"],
            PictureSettings(32, 32, references=(noise(32, 32),)),
            "requires sides in multiples of 8, at least 64",
        ),
        (bases["qwen-edit"], PictureSettings(SIZE, SIZE, references=(noise(9, 1),)), "one side can be at most 8 times"),
    ]:
        with pytest.raises(ConfigError, match=says):
            generate_images(base, [row], settings)
    least = inspect.signature(Flux2ImageProcessor.check_image_input).parameters["min_side_length"].default
    assert {bases[family].editing.least for family in ("flux2", "klein")} == {least}
    mixed = [ImageRow("a cat", references=one), row]
    with pytest.raises(ConfigError, match="references, and others do not"):
        generate_images(bases["kontext"], mixed, PictureSettings(SIZE, SIZE))
    latents = encode_pictures(sdxl, torch.zeros(1, 3, 32, 32))
    text = embed_prompts(sdxl, ["a cat"])
    with pytest.raises(BaseError, match="SDXL takes no reference pictures"):
        predict(sdxl, latents, torch.tensor(5), text, sizes=torch.zeros(1, 6), references=[latents])
