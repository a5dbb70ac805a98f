"""`predict` and the encoders match diffusers' pipelines, and adapters get gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.image_twins import latent_shape
from tests.tiny_image_base import LENGTH, SIZE, TINY_FAMILIES, tiny_image_base
from veneer.errors import BaseError
from veneer.models.image.base import ImageBase, load_image, pipeline, release, text_settings
from veneer.models.image.predict import (
    Conditioning,
    alphas_cumprod,
    decode_latents,
    embed_prompts,
    encode_pictures,
    predict,
)

pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*invalid value encountered in cast.*:RuntimeWarning"),
]
STEPS = 3
LONG = " ".join(["a red cat in the house with a blue hat"] * 80)


EACH_DENOISER = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in ("schnell", "klein") else f for f in TINY_FAMILIES]
)
"""All denoisers; schnell and klein, which lack only guidance, are slow tests.

test_generate covers all of them."""


@pytest.fixture
def load(bases: Path) -> Any:
    return lambda family: load_image(str(tiny_image_base(bases, family)))


def sizes_for(base: ImageBase, n: int = 1) -> Tensor | None:
    return torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * n) if base.family == "sdxl" else None


def noise_for(base: ImageBase, n: int = 1) -> Tensor:
    return torch.randn(n, *latent_shape(base, SIZE, SIZE), generator=torch.Generator().manual_seed(0))


def packed(base: ImageBase, x: Tensor) -> Tensor:
    """Return latents in the format of diffusers' pipelines."""
    if base.family == "flux2":
        return x
    if base.family in ("flux1", "qwen-image"):
        n, c, h, w = x.shape
        return x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)
    return x


def by_hand(base: ImageBase, x: Tensor, text: Conditioning, empty: Conditioning | None, scale: float) -> Tensor:
    """Sample with `predict` and the base's scheduler, configured as in the pipelines."""
    scheduler = base.parts["scheduler"]
    if base.prediction != "flow" or base.family == "sd3":
        scheduler.set_timesteps(STEPS)
    else:
        tokens = x.shape[2] * x.shape[3] // (1 if base.family == "flux2" else 4)
        sigmas = np.linspace(1.0, 1 / STEPS, STEPS)
        if base.family == "flux2":
            from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

            mu = compute_empirical_mu(image_seq_len=tokens, num_steps=STEPS)
        else:
            slope = (1.15 - 0.5) / (4096 - 256)
            mu = tokens * slope + 0.5 - slope * 256
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    if base.prediction != "flow":
        x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if base.prediction != "flow" else x
        when = t / 1000 if base.prediction == "flow" else t
        guided = scale if base.denoiser.config.get("guidance_embeds") else None
        out = predict(base, scaled, when, text, sizes=sizes_for(base), guidance=guided)
        if empty is not None:
            other = predict(base, scaled, when, empty, sizes=sizes_for(base), guidance=guided)
            out = (out if base.family == "z-image" else other) + scale * (out - other)
        x = scheduler.step(out, t, x, return_dict=False)[0]
    return x


@EACH_DENOISER
@torch.no_grad()
def test_sampling_with_predict_equals_the_pipeline(family: str, load: Any) -> None:
    base = load(family)
    takes_guidance = bool(base.denoiser.config.get("guidance_embeds"))
    free = family in ("sd15", "sdxl", "sd3", "z-image")
    scale = 4.0
    given: dict[str, Any] = {"prompt": "a red house", "num_inference_steps": STEPS, "height": SIZE, "width": SIZE}
    given |= text_settings(base)
    if free or takes_guidance or family == "klein":
        given["guidance_scale"] = scale if family != "klein" else 1.0
    if free:
        given["negative_prompt"] = "a dog"
    noise = noise_for(base)
    want = pipeline(base)(**given, latents=packed(base, noise).clone(), output_type="pt").images
    text = embed_prompts(base, ["a red house"])
    empty = embed_prompts(base, ["a dog"]) if free else None
    got = decode_latents(base, by_hand(base, noise, text, empty, scale))
    picture = (got / 2 + 0.5).clamp(0, 1)
    assert picture.std() > 0.01
    assert torch.allclose(picture, want, atol=1e-5)


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY_FAMILIES)
@torch.no_grad()
def test_batch_of_prompts_equals_single_prompts(family: str, load: Any) -> None:
    base = load(family)
    prompts = ["a red house", "a dog", "a blue cat with a hat in the house"]
    together = embed_prompts(base, prompts)
    assert len(together) == 3
    assert together.cut == ["", "", ""]
    for i, prompt in enumerate(prompts):
        alone = embed_prompts(base, [prompt])
        n = alone.embeds.shape[1]
        assert torch.allclose(together.embeds[i, :n], alone.embeds[0], atol=1e-5)
        if together.pooled is not None and alone.pooled is not None:
            assert torch.allclose(together.pooled[i], alone.pooled[0], atol=1e-5)
    joined = Conditioning.cat([embed_prompts(base, [p]) for p in prompts])
    x, t = noise_for(base, 3), torch.tensor(0.5 if base.prediction == "flow" else 400)
    sizes = sizes_for(base, 3)
    a, b = (predict(base, x, t, c, sizes=sizes) for c in (together, joined))
    assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("family", TINY_FAMILIES)
@torch.no_grad()
def test_truncated_part_of_a_prompt_changes_nothing(family: str, load: Any) -> None:
    base = load(family)
    found = embed_prompts(base, ["a dog", LONG])
    assert found.cut[0] == ""
    cut = found.cut[1]
    assert cut
    assert LONG.endswith(cut)
    read = LONG[: -len(cut)]
    same = embed_prompts(base, ["a dog", f"{read}{cut[:1]} tree tree tree {LONG}"]).embeds
    assert torch.allclose(found.embeds, same, atol=1e-6)
    assert not torch.allclose(found.embeds, embed_prompts(base, ["a dog", "x" + read]).embeds, atol=1e-3)


def test_a_prompt_that_just_fits_is_not_cut(load: Any) -> None:
    base = load("sdxl")
    fits = " ".join(["cat"] * (LENGTH - 2))  # plus a start and an end token
    assert embed_prompts(base, [fits, fits + " dog", fits + " dog tree"]).cut == ["", "dog", "dog tree"]
    flux = load("flux1")
    fits = " ".join(["cat"] * (LENGTH - 1))
    assert embed_prompts(flux, [fits, fits + " dog"]).cut == ["", "dog"]


def test_conditioning_of_uneven_lengths_is_padded_and_masked() -> None:
    whole = Conditioning.cat([Conditioning(torch.ones(1, n, 2), cut=[str(n)]) for n in (3, 5)])
    assert whole.mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert whole.embeds[0, 3:].abs().sum() == 0
    assert whole.cut == ["3", "5"]
    moved = whole.to(torch.device("cpu"), torch.bfloat16)
    assert moved.embeds.dtype == torch.bfloat16
    assert moved.mask.dtype == torch.int64


# -- pictures ----------------------------------------------------------------------------------------------------------


@EACH_DENOISER
def test_pictures_become_the_latents_that_the_pipelines_decode(family: str, load: Any) -> None:
    base = load(family)
    pixels = torch.rand(2, 3, SIZE, 2 * SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_pictures(base, pixels)
    assert latents.shape == (2, *latent_shape(base, SIZE, 2 * SIZE))
    assert latents.dtype == base.dtype
    vae = base.parts["vae"]
    with torch.no_grad():
        z = vae.encode(pixels[:, :, None] if family == "qwen-image" else pixels).latent_dist.mode()
        straight = vae.decode(z).sample
    straight = straight[:, :, 0] if family == "qwen-image" else straight
    assert torch.allclose(decode_latents(base, latents), straight, atol=1e-4)
    seeds = [encode_pictures(base, pixels, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(seeds[0], seeds[1])
    assert not torch.equal(seeds[0], seeds[2])
    assert torch.allclose(encode_pictures(base, pixels[:1]), latents[:1], atol=1e-5)


def test_pictures_of_a_wrong_size_are_refused(load: Any) -> None:
    base = load("flux1")
    for shape in ((1, 3, 36, 32), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(BaseError, match="multiples of 8"):
            encode_pictures(base, torch.zeros(shape))


def test_a_vae_that_overflows_in_float16_runs_in_float32(bases: Path) -> None:
    base = load_image(str(tiny_image_base(bases, "sdxl")), dtype="float16")
    full = load_image(str(tiny_image_base(bases, "sdxl")), dtype="float32")
    assert base.parts["vae"].config.force_upcast
    pixels = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    half = encode_pictures(base, pixels)
    assert half.dtype == torch.float16
    assert {p.dtype for p in base.parts["vae"].parameters()} == {torch.float16}
    assert torch.allclose(half.float(), encode_pictures(full, pixels), atol=0.01)


@pytest.mark.parametrize("family", ["flux1", "sd3", "klein", "qwen-image", "z-image"])
@torch.no_grad()
def test_16_bit_timestep_equals_the_pipelines(family: str, bases: Path) -> None:
    base = load_image(str(tiny_image_base(bases, family)), dtype="bfloat16")
    told: list[Tensor] = []

    def hear(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told.append((kwargs["timestep"] if "timestep" in kwargs else args[1])[:1])

    hook = base.denoiser.register_forward_pre_hook(hear, with_kwargs=True)
    pipe = pipeline(base)
    size = {"height": SIZE, "width": SIZE}
    pipe(prompt="a red house", num_inference_steps=STEPS, output_type="pt", **size, **text_settings(base))
    by_pipeline = told[:: len(told) // STEPS]
    told.clear()
    text = embed_prompts(base, ["a red house"])
    for t in pipe.scheduler.timesteps:
        predict(base, noise_for(base), t / 1000, text)
    hook.remove()
    assert [t.dtype for t in told] == [t.dtype for t in by_pipeline]
    assert torch.allclose(torch.cat(told), torch.cat(by_pipeline), rtol=1e-6)


# -- schedules and errors ----------------------------------------------------------------------------------------------


def test_noise_schedule_equals_the_schedulers(load: Any) -> None:
    base = load("sd15")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert torch.allclose(alphas_cumprod(base).double(), (1 - betas).cumprod(0), atol=1e-6)
    with pytest.raises(BaseError, match="learns a flow"):
        alphas_cumprod(load("flux1"))


def test_unsupported_arguments_of_a_family_are_refused(load: Any) -> None:
    base = load("sdxl")
    text, x = embed_prompts(base, ["a"]), noise_for(base)
    with pytest.raises(BaseError, match="requires sizes"):
        predict(base, x, torch.tensor(5), text)
    with pytest.raises(BaseError, match="does not take guidance"):
        predict(base, x, torch.tensor(5), text, sizes=sizes_for(base), guidance=3.5)
    flux = load("schnell")
    with pytest.raises(BaseError, match=r"FLUX\.1 takes no sizes"):
        predict(flux, noise_for(flux), torch.tensor(0.5), embed_prompts(flux, ["a"]), sizes=torch.zeros(1, 6))


def test_cached_inputs_suffice_after_release(load: Any) -> None:
    base = load("flux1")
    text = embed_prompts(base, ["a red house"])
    x = encode_pictures(base, torch.zeros(1, 3, SIZE, SIZE))
    want = predict(base, x, torch.tensor(0.5), text)
    release(base, "text_encoder", "text_encoder_2", "vae")
    assert torch.equal(predict(base, x, torch.tensor(0.5), text), want)
    with pytest.raises(BaseError, match="was released"):
        embed_prompts(base, ["a"])
    with pytest.raises(BaseError, match="was released"):
        encode_pictures(base, torch.zeros(1, 3, SIZE, SIZE))
