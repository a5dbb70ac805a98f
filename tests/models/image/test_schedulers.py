"""Every named scheduler samples, is a class of diffusers, and has a name in A1111."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.image_twins import diffusers_pipeline, levels, picture
from tests.tiny_image_base import tiny_image_base
from veneer.errors import ConfigError
from veneer.imaging.infotext import SAMPLERS
from veneer.models.image.base import ImageBase, load_image
from veneer.models.image.generate import ImageRow, PictureSettings, generate_images
from veneer.models.image.schedulers import NAMES, make_scheduler, scheduler_name, scheduler_names
from veneer.models.loading import errors_only


@pytest.fixture(
    scope="module", params=[pytest.param("sd15", marks=pytest.mark.slow), "sdxl", "flux1", "schnell", "sd3", "z-image"]
)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageBase:
    """Return a base of each prediction type; SD 1 has the same schedulers as SDXL."""
    return load_image(str(tiny_image_base(tmp_path_factory.getbasetemp(), request.param)))


def test_every_name_of_a_family_samples(base: ImageBase) -> None:
    seen = set()
    for name in scheduler_names(base):
        (found,) = generate_images(base, [ImageRow("a cat", seed=1)], PictureSettings(steps=4, scheduler=name))
        seen.add(np.asarray(found.image).tobytes())
    assert len(seen) >= 0.7 * len(scheduler_names(base)), "they are not all one"


def test_the_bases_scheduler_has_a_name_and_is_new(base: ImageBase) -> None:
    name = scheduler_name(base)
    assert name in scheduler_names(base)
    assert make_scheduler(base, name).config == make_scheduler(base).config == base.parts["scheduler"].config
    assert make_scheduler(base) is not make_scheduler(base)


def test_scheduler_has_the_settings_of_the_base(tmp_path_factory: pytest.TempPathFactory) -> None:
    import diffusers

    place: Path = tiny_image_base(tmp_path_factory.getbasetemp(), "sdxl")
    base, pipe = load_image(str(place)), diffusers_pipeline(place)
    for name, cls, more in [
        ("euler-a", diffusers.EulerAncestralDiscreteScheduler, {}),
        ("dpm++2m-karras", diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
        ("ddim", diffusers.DDIMScheduler, {}),
    ]:
        own = pipe.scheduler
        with errors_only():
            pipe.scheduler = cls.from_config(own.config, **more)
        (found,) = generate_images(base, [ImageRow("a cat", seed=1)], PictureSettings(steps=4, scheduler=name))
        assert levels(found.image, picture(pipe, "a cat", 1)) == 0
        pipe.scheduler = own


def test_unknown_and_incompatible_schedulers_are_refused(base: ImageBase) -> None:
    wrong = "flow-eulr" if base.prediction == "flow" else "eulr"
    with pytest.raises(ConfigError, match=f"no scheduler '{wrong}'") as caught:
        make_scheduler(base, wrong)
    assert "did you mean" in (caught.value.fix or "")
    if base.prediction == "flow":
        assert type(make_scheduler(base, "euler")).__name__ == "FlowMatchEulerDiscreteScheduler"
        with pytest.raises(ConfigError, match="predicts flow"):
            make_scheduler(base, "ddim")
    else:
        with pytest.raises(ConfigError, match="predicts epsilon"):
            make_scheduler(base, "flow-euler")


def test_every_sampler_has_an_infotext_name() -> None:
    assert set(SAMPLERS) >= set(NAMES)
