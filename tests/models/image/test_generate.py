"""Pictures with mixes equal those of diffusers' pipelines with merged weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.attached import holding
from tests.image_twins import diffusers_pipeline, fold, levels, picture, random_adapter, state_of
from tests.tiny_image_base import SIZE, tiny_control, tiny_image_base
from veneer.errors import BaseError, ConfigError
from veneer.models.image.base import ImageBase, load_control, load_image
from veneer.models.image.generate import (
    Control,
    GeneratedPicture,
    ImageRow,
    MixPlan,
    PictureSettings,
    fitted_picture,
    generate_images,
)
from veneer.models.loading import errors_only

FAMILIES = ("sd15", "sdxl", "flux1", "sd3")


class Lazy(dict[str, Any]):
    """A dictionary that computes a missing key's value with a function."""

    def __init__(self, make: Callable[[str], Any]) -> None:
        super().__init__()
        self.make = make

    def __missing__(self, key: str) -> Any:
        self[key] = self.make(key)
        return self[key]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return Lazy(lambda family: tiny_image_base(tmp_path_factory.getbasetemp(), family))


@pytest.fixture(scope="module")
def bases(places: dict[str, Path]) -> dict[str, ImageBase]:
    return Lazy(lambda family: load_image(str(places[family])))


def made(base: ImageBase, rows: list[ImageRow], attachment: Any = None, **settings: Any) -> list[GeneratedPicture]:
    return generate_images(base, rows, PictureSettings(**({"steps": 4} | settings)), attachment=attachment)


def noise(size: int = SIZE) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))


def always(mix: Any) -> MixPlan:
    return MixPlan(mix, ((0.0, mix),))


# -- without adapters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "schnell", "klein", "flux2", "qwen-image", "z-image"])
def test_base_without_adapters_equals_diffusers(
    family: str, bases: dict[str, ImageBase], places: dict[str, Path]
) -> None:
    pipe = diffusers_pipeline(places[family])
    size = {"width": SIZE, "height": SIZE}
    if family != "qwen-image":
        guidance = 0.0 if family == "schnell" else 3.0
        (found,) = made(bases[family], [ImageRow("a red house", seed=3)], guidance=guidance, **size)
        assert levels(found.image, picture(pipe, "a red house", 3, guidance_scale=guidance)) == 0
    if family in ("schnell", "flux2", "klein"):
        return
    scales = {"true_cfg_scale": 2.0, "guidance_scale": 3.0} if family == "flux1" else {"guidance_scale": 3.0}
    scales = {"true_cfg_scale": 3.0} if family == "qwen-image" else scales
    true = 2.0 if family == "flux1" else 1.0
    (found,) = made(
        bases[family], [ImageRow("a cat", "blue", seed=4)], guidance=3.0, true_guidance=true, steps=3, **size
    )
    expected = picture(pipe, "a cat", 4, negative_prompt="blue", num_inference_steps=3, **scales)
    assert levels(found.image, expected) == 0


def test_picture_does_not_depend_on_the_batch(bases: dict[str, ImageBase]) -> None:
    rows = [ImageRow("a cat" if i % 2 else "a red house", "blue" if i == 2 else "", seed=i) for i in range(5)]
    alone = made(bases["sdxl"], rows, batch_size=1)
    for size in (2, 5):
        together = made(bases["sdxl"], rows, batch_size=size)
        assert max(levels(a.image, b.image) for a, b in zip(alone, together, strict=True)) <= 1
    assert [p.index for p in made(bases["sdxl"], rows, batch_size=2)] == [0, 1, 0, 1, 0]
    assert levels(alone[0].image, alone[1].image) > 20


def test_image_to_image_equals_diffusers(bases: dict[str, ImageBase], places: dict[str, Path]) -> None:
    given, mask = noise(), Image.new("L", (SIZE, SIZE))
    mask.paste(255, (0, 0, SIZE // 2, SIZE))
    for family, kind in (("sdxl", "StableDiffusionXLImg2ImgPipeline"), ("flux1", "FluxImg2ImgPipeline")):
        rows = [ImageRow("a cat", seed=1), ImageRow("a dog", seed=2)]
        both = made(bases[family], rows, image=given, denoise=0.5, batch_size=1, guidance=3.0)
        pipe = diffusers_pipeline(places[family], kind)
        for row, found in zip(rows, both, strict=True):
            expected = picture(pipe, row.prompt, row.seed, image=given, strength=0.5, guidance_scale=3.0)
            assert levels(found.image, expected) == 0
    (inside,) = made(bases["sdxl"], [ImageRow("a cat", seed=1)], image=given, mask=mask, denoise=0.9)
    half = (SIZE // 2, 0, SIZE, SIZE)
    assert levels(inside.image.crop(half), given.crop(half)) == 0, "black stays, pixel for pixel"
    assert levels(inside.image, given) > 20


def test_controls_stack_and_end(bases: dict[str, ImageBase], places: dict[str, Path], tmp_path: Path) -> None:
    base, given = bases["sdxl"], noise()
    place = tiny_control(tmp_path, "sdxl")
    control = load_control(place, base)
    pipe = diffusers_pipeline(places["sdxl"])
    import diffusers

    with errors_only():
        net = diffusers.ControlNetModel.from_pretrained(place)
        pipe = diffusers.StableDiffusionXLControlNetPipeline(**pipe.components, controlnet=[net, net])
    pipe.set_progress_bar_config(disable=True)
    both = (Control(control, given, 0.7, 0.0, 0.5), Control(control, given, 0.3))
    (found,) = made(base, [ImageRow("a cat", seed=1)], controls=both, guidance=3.0)
    scales = {"controlnet_conditioning_scale": [0.7, 0.3], "control_guidance_end": [0.5, 1.0], "guidance_scale": 3.0}
    assert levels(found.image, picture(pipe, "a cat", 1, image=[given, given], **scales)) == 0
    (plain,) = made(base, [ImageRow("a cat", seed=1)], guidance=3.0)
    assert levels(found.image, plain.image) > 3


@pytest.mark.parametrize("kind", ["text", "image", "inpaint"])
@pytest.mark.parametrize("family", ["sdxl", "flux1"])
def test_all_options_together_equal_diffusers_with_merged_weights(
    family: str, kind: str, bases: dict[str, ImageBase], places: dict[str, Path], tmp_path: Path
) -> None:
    """Combines adapters, ControlNet, picture, mask, negative prompt and guidance."""
    import diffusers

    base, given, edges = bases[family], noise(), noise().rotate(90)
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (0, 0, SIZE // 2, SIZE))
    place = tiny_control(tmp_path, family)
    a, b = random_adapter(base.model, 1), random_adapter(base.model, 2, dora=True)
    own = diffusers_pipeline(places[family])
    fold(own, [(a, 0.8), (b, -0.5)])
    with errors_only():
        net = getattr(diffusers, base.row.control).from_pretrained(place)
        cls = getattr(diffusers, base.row.controlled[kind])
        taken = inspect.signature(cls).parameters
        pipe = cls(**{name: part for name, part in own.components.items() if name in taken}, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    takes = inspect.signature(type(pipe).__call__).parameters
    picked = "control_image" if "control_image" in takes else "image"
    theirs: dict[str, Any] = {picked: edges, "controlnet_conditioning_scale": 0.7, "guidance_scale": 3.0}
    ours: dict[str, Any] = {"controls": (Control(load_control(place, base), edges, 0.7),), "guidance": 3.0}
    negative = "blue" if "true_cfg_scale" in takes or family != "flux1" else ""
    if negative:
        theirs["negative_prompt"] = negative
        if family == "flux1":
            theirs["true_cfg_scale"] = ours["true_guidance"] = 2.0
    if kind != "text":
        theirs |= {"image": given, "strength": 0.75}
        ours |= {"image": given, "denoise": 0.75}
    if kind == "inpaint":
        theirs["mask_image"] = ours["mask"] = mask
    with holding(base.model, a=a, b=b) as attachment:
        plan = always((("a", 0.8), ("b", -0.5)))
        (found,) = made(base, [ImageRow("a cat", negative, seed=1, plan=plan)], attachment, **ours)
    expected = picture(pipe, "a cat", 1, **theirs)
    if kind == "inpaint":
        expected = Image.composite(expected, given, mask)
    assert levels(found.image, expected) <= 1


# -- mixes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "z-image"])
def test_mix_equals_merged_weights(family: str, bases: dict[str, ImageBase], places: dict[str, Path]) -> None:
    base = bases[family]
    before = state_of(base.model)
    a, b = random_adapter(base.model, 1), random_adapter(base.model, 2, dora=True)
    pipe = diffusers_pipeline(places[family])
    (plain,) = made(base, [ImageRow("a cat", seed=1)])
    fold(pipe, [(a, 0.8), (b, -0.5)])
    expected = picture(pipe, "a cat", 1)
    with holding(base.model, a=a, b=b) as attachment:
        (found,) = made(base, [ImageRow("a cat", seed=1, plan=always((("a", 0.8), ("b", -0.5))))], attachment)
        assert attachment.selection.mix == (), "what was selected before is selected after"
    assert levels(found.image, expected) <= 1
    assert levels(found.image, plain.image) > 5
    after = base.model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items()), "no weight of the base was touched"
    (again,) = made(base, [ImageRow("a cat", seed=1)])
    assert levels(again.image, plain.image) == 0


@pytest.mark.parametrize("family", ["sdxl", "flux1"])
def test_text_encoder_strength_acts_on_the_prompt(
    family: str, bases: dict[str, ImageBase], places: dict[str, Path]
) -> None:
    base = bases[family]
    a = random_adapter(base.model, 1)
    pictures = []
    with holding(base.model, a=a) as attachment:
        for text, rest in ((0.0, 0.7), (0.7, 0.0), (0.3, 1.0)):
            pipe = diffusers_pipeline(places[family])
            fold(pipe, [(a, lambda name, t=text, r=rest: t if name.startswith("text_encoder") else r)])
            plan = MixPlan((("a", text),), ((0.0, (("a", rest),)),))
            (found,) = made(base, [ImageRow("a cat", seed=1, plan=plan)], attachment)
            assert levels(found.image, picture(pipe, "a cat", 1)) <= 1
            pictures.append(found.image)
    assert min(levels(p, q) for i, p in enumerate(pictures) for q in pictures[:i]) > 2


@pytest.mark.parametrize("family", ["sdxl", "flux1", "z-image"])
def test_rows_of_one_batch_have_their_own_mixes(family: str, bases: dict[str, ImageBase]) -> None:
    base = bases[family]
    with holding(base.model, a=random_adapter(base.model, 1), b=random_adapter(base.model, 2)) as attachment:
        plans = [
            MixPlan(),
            always((("a", 1.0),)),
            always((("a", 0.4), ("b", 0.6))),
            MixPlan((("b", 1.0),), ((0.0, (("a", 1.0),)), (0.5, ()))),
        ]
        rows = [ImageRow("a cat", seed=7, plan=plan) for plan in plans]
        together = made(base, rows, attachment, batch_size=4)
        alone = made(base, rows, attachment, batch_size=1)
    assert max(levels(p.image, q.image) for p, q in zip(together, alone, strict=True)) <= 1
    assert min(levels(p.image, q.image) for i, p in enumerate(alone) for q in alone[:i]) > 2


@pytest.mark.parametrize("scheduler", [None, "heun"])
def test_mix_can_change_by_step(scheduler: str | None, bases: dict[str, ImageBase], places: dict[str, Path]) -> None:
    """The reference loads other weights into diffusers' U-Net between the steps."""
    base, steps = bases["sdxl"], 5
    a, b = random_adapter(base.model, 1, size=0.8), random_adapter(base.model, 2, size=0.8)
    pipes = {name: diffusers_pipeline(places["sdxl"]) for name in ("a", "b", "none")}
    fold(pipes["a"], [(a, 1.0)])
    fold(pipes["b"], [(b, 0.5)])
    states = {name: state_of(pipe.unet) for name, pipe in pipes.items()}
    pipe = pipes["none"]
    if scheduler:
        from diffusers import HeunDiscreteScheduler

        with errors_only():
            pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=False)
    pipe.unet.load_state_dict(states["a"])

    def swap(own: Any, i: int, t: Any, held: dict[str, Any]) -> dict[str, Any]:
        share = (i + 1) / own.num_timesteps
        own.unet.load_state_dict(states["a" if share < 0.2 else "none" if share < 0.4 else "b"])
        return held

    expected = picture(pipe, "a cat", 1, callback_on_step_end=swap, num_inference_steps=steps)
    plan = MixPlan((), ((0.0, (("a", 1.0),)), (0.2, ()), (0.4, (("b", 0.5),))))
    with holding(base.model, a=a, b=b) as attachment:
        (found,) = made(base, [ImageRow("a cat", seed=1, plan=plan)], attachment, steps=steps, scheduler=scheduler)
        (whole,) = made(base, [ImageRow("a cat", seed=1, plan=MixPlan((), plan.phases[:1]))], attachment, steps=steps)
    assert levels(found.image, expected) <= 1
    assert levels(found.image, whole.image) > 2


def test_switching_mixes_does_not_recompile_the_denoiser(places: dict[str, Path]) -> None:
    from torch._dynamo.utils import counters

    base = load_image(str(places["flux1"]))
    mixes = [(), (("a", 0.8),), (("b", 0.8),), (("a", 0.2), ("b", -0.5)), ()]
    rows = [ImageRow("a cat", seed=1, plan=always(mix)) for mix in mixes]
    with holding(base.model, a=random_adapter(base.model, 1), b=random_adapter(base.model, 2)) as attachment:
        plain = [made(base, [row], attachment, steps=1)[0] for row in rows]
        torch._dynamo.reset()  # otherwise, sizes compiled by earlier tests would affect which sizes are dynamic
        counters.clear()
        base.denoiser.compile(backend="eager")
        counts = []
        for row, expected in zip(rows, plain, strict=True):
            (found,) = made(base, [row], attachment, steps=1)
            assert levels(found.image, expected.image) <= 1
            counts.append(counters["frames"]["total"])
    assert counts[0] > 0
    assert len(set(counts)) == 1, "the first call compiles, a switch does not"


# -- warnings and errors -----------------------------------------------------------------------------------------------


def test_cut_prompts_are_reported(bases: dict[str, ImageBase]) -> None:
    found = made(bases["sdxl"], [ImageRow("a cat"), ImageRow("a cat in the house " * 8 + "blue hat")], steps=1)
    assert found[0].cut == ""
    assert found[1].cut.endswith("blue hat")
    (found_too,) = made(bases["sdxl"], [ImageRow("a cat", "a cat in the house " * 8 + "blue hat")], steps=1)
    assert found_too.negative_cut.endswith("blue hat")


def test_steps_are_counted_over_all_batches(bases: dict[str, ImageBase]) -> None:
    seen: list[tuple[int, int]] = []
    rows = [ImageRow("a cat", seed=i) for i in range(3)]
    generate_images(bases["sd15"], rows, PictureSettings(steps=3, batch_size=2), on_step=lambda *s: seen.append(s))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_input_of_another_size_is_resized_with_a_note() -> None:
    assert fitted_picture(noise(), SIZE, SIZE, "picture") == (noise(), "")
    small, said = fitted_picture(noise(64), SIZE, SIZE, "picture")
    assert small.size == (SIZE, SIZE)
    assert "64×64 to 32×32" in said
    with pytest.raises(ConfigError, match="another aspect ratio"):
        fitted_picture(noise(64), 64, 32, "mask")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"width": 30}, "multiples of 4"),
        ({"steps": 0}, "steps is 0"),
        ({"width": 0}, "width is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"true_guidance": 0.5}, "true_guidance is 0.5"),
        ({"true_guidance": float("nan")}, "true_guidance is nan"),
        ({"image": noise(), "denoise": float("nan")}, "denoise is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"mask": noise()}, "needs the picture"),
        ({"denoise": 0.5}, "denoise below 1 needs a picture"),
        ({"image": noise(), "denoise": 0.0}, "denoise is 0"),
        ({"image": noise(), "denoise": 0.2}, "none of 4 steps"),
        ({"image": noise(64)}, "64×64"),
        ({"true_guidance": 2.0}, "no distilled guidance"),
        ({"scheduler": "eulr"}, "no scheduler"),
    ],
)
def test_impossible_settings_are_refused(bases: dict[str, ImageBase], settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made(bases["sdxl"], [ImageRow("a cat")], **settings)


@pytest.mark.parametrize("seed", [-1, 2**64, 10**30])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match=f"seed {seed}"):
        ImageRow("a cat", seed=seed)


def test_error_of_a_pipeline_is_a_config_error(bases: dict[str, ImageBase]) -> None:
    with pytest.raises(ConfigError, match="refuses these settings"):
        made(bases["sdxl"], [ImageRow("a")], steps=1500, scheduler="ddim")


def test_conflicting_requests_are_refused(bases: dict[str, ImageBase]) -> None:
    with pytest.raises(ConfigError, match="no picture"):
        made(bases["sdxl"], [])
    with pytest.raises(ConfigError, match="there is no attachment"):
        made(bases["sdxl"], [ImageRow("a", plan=always((("a", 1.0),)))])
    with pytest.raises(ConfigError, match="is distilled and takes no guidance"):
        made(bases["schnell"], [ImageRow("a")], guidance=3.0)
    for family, guidance in (("flux1", 3.0), ("sdxl", 1.0)):
        with pytest.raises(ConfigError, match="negative prompt has no effect"):
            made(bases[family], [ImageRow("a", "blue")], guidance=guidance)
    huge, plan = random_adapter(bases["sd15"].model, size=1e20), always((("a", 1.0),))
    with (
        holding(bases["sd15"].model, a=huge) as attachment,
        pytest.raises(BaseError, match="NaN or infinite values under a:1"),
    ):
        made(bases["sd15"], [ImageRow("a", plan=plan)], attachment)
