"""A training step of each family equals diffusers' own training script.

The reference uses PEFT's adapter on diffusers' transformer. The scripts (examples/dreambooth,
train_dreambooth_lora_flux2.py, …_flux2_klein.py, …_qwen_image.py, …_sd3.py without precondition_outputs,
…_z_image.py) are rewritten here from the pipeline functions that they call. The bases have every kind of
block of the real models, at tiny widths.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.image_twins import diffusers_pipeline
from tests.tiny_image_base import LENGTH, tiny_image_base
from tests.train.tiny_pictures import drawings, image_values
from veneer.core.adapter import Adapter, LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.core.targets import resolve_targets
from veneer.errors import TargetError
from veneer.models.image.base import ImageBase, load_image
from veneer.models.image.fast import fast_denoiser
from veneer.models.loading import errors_only
from veneer.train.config.image import TARGET_WORDS
from veneer.train.config.load import config_from
from veneer.train.image.augmentation import plan_rows
from veneer.train.image.batches import ImageBatch, plan_image_steps, planned_rows
from veneer.train.image.encode import Encoders, ImageLoss
from veneer.train.image.loss import sample_noise
from veneer.train.image.pictures import read_pictures
from veneer.train.image.preflight import adapter_components

SIDE = 32


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder for bases. It has two pictures that need no resizing; their captions differ in length."""
    folder = tmp_path_factory.mktemp("steps")
    for path in sorted(drawings(folder / "squares", 2).glob("*.png")):
        with Image.open(path) as image:
            image.resize((SIDE, SIDE)).save(path)
    (folder / "squares" / "1.txt").write_text("a blue cat with a hat in the red house")
    return folder


def config_of(shared: Path, family: str, **sections: Any) -> Any:
    data = {"pictures": str(shared / "squares"), "split": 0, "trigger": None}
    return config_from(image_values(shared, shared / "out", family, **{"data": data, **sections}))[0]


def loss_and_first_batch(base: ImageBase, config: Any) -> tuple[ImageLoss, ImageBatch]:
    """Return the loss function of a run and the run's first batch."""
    pictures, _ = read_pictures(config.data)
    encoders = Encoders(base, config, None)
    rows = plan_rows(pictures, config.data, size=SIDE, unit=base.unit).rows
    steps = plan_image_steps(rows, config, encoders.batch)
    first = [row for row in planned_rows(steps) if row.key[1] == 1]
    return ImageLoss(base, config, encoders), encoders.batch(first)


def moved(adapter: Adapter) -> Adapter:
    """Return the adapter with random changes, so that B is not zero, as if trained."""
    g = torch.Generator().manual_seed(1)
    return adapter.mapped(lambda t: t + 0.05 * torch.randn(t.shape, generator=g))


def peft_twin(transformer: Any, adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    """Add the same adapter with PEFT, as the scripts do. Return module -> PEFT's (A, B)."""
    from peft import LoraConfig

    pairs = adapter.pairs
    rank = next(iter(pairs.values())).rank
    transformer.requires_grad_(False)
    with errors_only():
        transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(pairs)))
    found = {}
    for name, pair in pairs.items():
        layer = transformer.get_submodule(name)
        layer.scaling["default"] = pair.scale
        found[name] = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            for theirs, ours in zip(found[name], (pair.A, pair.B), strict=True):
                theirs.copy_(ours)
    return found


def pixels_of(batch: ImageBatch) -> Tensor:
    """Return the pixels as torchvision's ToTensor and Normalize([0.5], [0.5]) would, computed by hand."""
    arrays = [np.asarray(Image.open(row.picture.path).convert("RGB"), dtype=np.float32) for row in batch.rows]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255 * 2 - 1


def mean_of_means(predicted: Tensor, target: Tensor) -> Tensor:
    return ((predicted.float() - target.float()) ** 2).reshape(target.shape[0], -1).mean(1).mean()


def flux2_script(pipe: Any, pixels: Tensor, prompts: list[str], noise: Tensor, sigma: Tensor, g: float) -> Tensor:
    """Return the loss of the dev and klein scripts.

    Latents are patches normalized with the VAE's batch norm; positions have four axes.
    """
    with torch.no_grad():
        x = pipe._patchify_latents(pipe.vae.encode(pixels).latent_dist.mode())
        bn = pipe.vae.bn
        std = torch.sqrt(bn.running_var.view(1, -1, 1, 1) + pipe.vae.config.batch_norm_eps)
        x = (x - bn.running_mean.view(1, -1, 1, 1)) / std
        text, text_ids = pipe.encode_prompt(prompt=prompts, max_sequence_length=512)
    ids = pipe._prepare_latent_ids(x)
    noisy = (1.0 - sigma.view(-1, 1, 1, 1)) * x + sigma.view(-1, 1, 1, 1) * noise
    guided = torch.full([1], g).expand(len(x)) if pipe.transformer.config.guidance_embeds else None
    out = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy),
        timestep=sigma * 1000 / 1000,
        guidance=guided,
        encoder_hidden_states=text,
        txt_ids=text_ids,
        img_ids=ids,
        return_dict=False,
    )[0]
    out = pipe._unpack_latents_with_ids(out, ids)
    return mean_of_means(out, noise - x)


def qwen_script(pipe: Any, pixels: Tensor, prompts: list[str], noise: Tensor, sigma: Tensor, g: float) -> Tensor:
    """Return the loss of the Qwen-Image script.

    Latents are those of a one-frame video, normalized per channel with mean and deviation; texts are masked.
    """
    own = pipe.vae.config
    mean = torch.tensor(own.latents_mean).view(1, own.z_dim, 1, 1, 1)
    std = 1.0 / torch.tensor(own.latents_std).view(1, own.z_dim, 1, 1, 1)
    with torch.no_grad():
        x = (pipe.vae.encode(pixels[:, :, None]).latent_dist.mode() - mean) * std
        text, mask = pipe.encode_prompt(prompt=prompts, max_sequence_length=1024)
    assert mask is not None  # masked, because the captions differ in length
    noise, s = noise[:, :, None], sigma.view(-1, 1, 1, 1, 1)
    noisy = ((1.0 - s) * x + s * noise).permute(0, 2, 1, 3, 4)
    n, c, h, w = x.shape[0], x.shape[1], x.shape[3], x.shape[4]
    out = pipe.transformer(
        hidden_states=pipe._pack_latents(noisy, n, c, h, w),
        encoder_hidden_states=text,
        encoder_hidden_states_mask=mask,
        timestep=sigma * 1000 / 1000,
        img_shapes=[(1, h // 2, w // 2)] * n,
        return_dict=False,
    )[0]
    out = pipe._unpack_latents(out, pixels.shape[2], pixels.shape[3], pipe.vae_scale_factor)
    return mean_of_means(out, noise - x)


def sd3_script(pipe: Any, pixels: Tensor, prompts: list[str], noise: Tensor, sigma: Tensor, g: float) -> Tensor:
    """Return the loss of the SD 3.5 script, for medium and large.

    Text comes from two CLIPs and T5, timesteps go up to 1000, and the model itself makes the patches.
    """
    own, s = pipe.vae.config, sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        x = (pipe.vae.encode(pixels).latent_dist.mode() - own.shift_factor) * own.scaling_factor
        text, _, pooled, _ = pipe.encode_prompt(
            prompt=prompts,
            prompt_2=prompts,
            prompt_3=prompts,
            do_classifier_free_guidance=False,
            max_sequence_length=LENGTH,
        )
    out = pipe.transformer(
        hidden_states=(1.0 - s) * x + s * noise,
        timestep=sigma * 1000,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return mean_of_means(out, noise - x)


def z_image_script(pipe: Any, pixels: Tensor, prompts: list[str], noise: Tensor, sigma: Tensor, g: float) -> Tensor:
    """Return the loss of the Z-Image script.

    Time runs from noise to picture, the output is negated, and pictures and texts are passed as lists.
    """
    own, s = pipe.vae.config, sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        x = (pipe.vae.encode(pixels).latent_dist.mode() - own.shift_factor) * own.scaling_factor
        text, _ = pipe.encode_prompt(prompt=list(prompts), do_classifier_free_guidance=False)
    assert len(text[0]) != len(text[1])  # the captions differ in length
    noisy = ((1.0 - s) * x + s * noise).unsqueeze(2)
    out = pipe.transformer(list(noisy.unbind(dim=0)), (1000 - sigma * 1000) / 1000, text, return_dict=False)[0]
    return mean_of_means(-torch.stack(out, dim=0).squeeze(2), noise - x)


SCRIPTS: dict[str, Callable[..., Tensor]] = {
    "flux2": flux2_script,
    "klein": flux2_script,
    "qwen-image": qwen_script,
    "sd3": sd3_script,
    "sd3-large": sd3_script,
    "z-image": z_image_script,
}


UNREAD: dict[str, tuple[str, ...]] = {
    "sd3": ("attn.add_q_proj",),
    "sd3-large": ("attn.add_q_proj",),
    "qwen-image": ("attn.add_q_proj", "attn.to_add_out", "txt_mlp"),
}
"""Modules of the last block that process text. They get no gradient, because their output is not used."""


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in ("sd3-large", "klein") else f for f in SCRIPTS]
)
def test_loss_and_gradients_equal_diffusers_script_with_peft(family: str, shared: Path) -> None:
    """The adapter trains every linear module of a small denoiser with the fast paths.

    models/image/test_base_real checks that all modules of real bases learn.
    """
    base = load_image(str(tiny_image_base(shared, family)))
    config = config_of(shared, family, adapter={"targets": "all-linear", "rank": 2, "dropout": 0.0})
    loss, batch = loss_and_first_batch(base, config)
    adapter = moved(create(*adapter_components(base, config)["transformer"], seed=0))
    pipe = diffusers_pipeline(base.directory)
    twin = peft_twin(pipe.transformer, adapter)
    noise, sigma = sample_noise(
        batch.latents.shape[1:], [row.key for row in batch.rows], "flow", loss.times, loss.noise
    )
    prompts = [row.caption for row in batch.rows]
    wanted = SCRIPTS[family](pipe, pixels_of(batch), prompts, noise, sigma, config.loss.guidance)
    wanted.backward()
    named = Adapter({f"transformer.{n}": p for n, p in adapter.pairs.items()}, card=adapter.card)
    with attach(base.model) as attachment:
        attachment.add("a", named, trainable=True)
        attachment.use("a")
        with fast_denoiser(base.denoiser):
            got = loss(batch) / len(batch.rows)
            got.backward()
        assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
        own = attachment.parameters("a")
        assert len(own) == 2 * len(twin)
        last = f"transformer_blocks.{len(getattr(base.denoiser, 'transformer_blocks', [])) - 1}."
        unread = tuple(last + name for name in UNREAD.get(family, ()))
        for name, theirs in twin.items():
            for which, tensor in zip("AB", theirs, strict=True):
                grads = (own[f"transformer.{name}.{which}"].grad, tensor.grad)
                a, b = (torch.zeros_like(tensor) if grad is None else grad for grad in grads)
                assert bool(b.any()) != name.startswith(unread), name
                assert (a - b).norm() < 1e-3 * b.norm() + 1e-7, (name, which, float((a - b).norm() / b.norm()))


@pytest.mark.parametrize(("family", "modulation"), [("flux2", "*_modulation*.linear"), ("qwen-image", ".img_mod.1")])
def test_target_words_select_attention_and_feed_forward(family: str, modulation: str, shared: Path) -> None:
    """`all-linear` selects every nn.Linear, as in ai-toolkit."""
    transformer: Any = load_image(str(tiny_image_base(shared, family, full=True))).denoiser

    def chosen(*targets: str) -> set[str]:
        return {t.name for t in resolve_targets(transformer, LoraSpec(rank=2, targets=targets))}

    linear = {n for n, m in transformer.named_modules() if type(m) is torch.nn.Linear}
    assert chosen("all-linear") == linear
    assert chosen(modulation)
    blocks = {n for n in linear if "transformer_blocks." in n}
    assert chosen(TARGET_WORDS["attention+ff"]) == {n for n in blocks if "mod" not in n}
    assert chosen(TARGET_WORDS["attention"]) == {n for n in blocks if ".attn." in n}
    with pytest.raises(TargetError, match="matches nothing in this model"):
        chosen("to_quuv")
