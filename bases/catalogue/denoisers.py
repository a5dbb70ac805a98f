"""The two denoisers with their text encoders: small members of the real classes, trained together from nothing.

| base           | denoiser                                                     | text                     | learns |
| catalogue-flux | FluxTransformer2DModel, 3 double and 4 single blocks, 6 × 32 | CLIP (pooled), T5        | flow   |
| catalogue-sdxl | UNet2DConditionModel, 48-80-96, transformer depths -, 1, 2   | two CLIPs (next to last) | noise  |

    flow   x_σ = (1 - σ) x + σ ε,   target ε - x,   σ logit-normal, shifted by _SHIFT
    noise  x_t = √ᾱ_t x + √(1 - ᾱ_t) ε,   target ε,   weight min(SNR, 5) / SNR   (arXiv 2303.09556)

What a picture is of fills a third of it, and is what is hard to draw: there errors count _THING times. Since a caption
says where that is, the weight tells the model nothing that it does not know.

The flow is learned at more noise than it is sampled at: what a caption means is learned there, and is what takes long.

Guidance. One caption in ten is empty, so that catalogue-sdxl can be guided from outside. catalogue-flux takes guidance
g as an input, as FLUX.1-dev does, and learns what it means from itself late in training: for half of a batch the target
is v + (g - 1)(v(x, caption) - v(x, "")) with the model's own two predictions (as in arXiv 2502.12154).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, FluxTransformer2DModel, UNet2DConditionModel
from pool import Batch, Pool
from steps import optimise
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from words import LENGTH

SIDE = 16  # latents a side
_TEXT = {"text_encoder": 0.5, "text_encoder_2": 0.5}  # they know their words already
_SHIFT = 3.0  # samplers take what FLUX's dynamic shift gives for 64 tokens, 1.6
_THING = 3.0


# -- catalogue-flux --------------------------------------------------------------------------------------------------


def new_flux(tokenizers: list[Any]) -> dict[str, nn.Module]:
    clip, t5 = tokenizers
    return {
        "transformer": FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=3, num_single_layers=4, attention_head_dim=32,
            num_attention_heads=6, joint_attention_dim=128, pooled_projection_dim=96, guidance_embeds=True,
            axes_dims_rope=(4, 14, 14),
        ),
        "text_encoder": CLIPTextModel(_clip(clip, 96, 2)),
        "text_encoder_2": T5EncoderModel(
            T5Config(
                vocab_size=len(t5), d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
                feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
            )
        ),
    }  # fmt: skip


def text_flux(parts: dict[str, nn.Module], ids: Batch) -> tuple[Tensor, Tensor]:
    """(tokens (n, LENGTH, 128), pooled (n, 96)), as FluxPipeline computes them: no padding mask."""
    pooled = parts["text_encoder"](ids["clip"]).pooler_output
    return parts["text_encoder_2"](ids["t5"])[0], pooled


def pack(latents: Tensor) -> Tensor:
    """(n, 16, 16, 16) -> (n, 64, 64): each token a 2 × 2 patch, channel first, as FluxPipeline packs."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, c * 4)


def image_ids(side: int = SIDE // 2) -> Tensor:
    ids = torch.zeros(side, side, 3)
    ids[..., 1] = torch.arange(side)[:, None]
    ids[..., 2] = torch.arange(side)[None]
    return ids.view(-1, 3)


def flow_loss(
    parts: dict[str, nn.Module], x: Tensor, things: Tensor, ids: Batch, empty: Batch, guided: bool,
    generator: torch.Generator, control: Callable[..., dict[str, Any]] | None = None,
) -> Tensor:  # fmt: skip
    """`x`: packed latents (n, 64, 64), of `things` (n, 16, 16). `guided`: the second half of the batch learns guidance
    from 1 to 5. `control`: what a ControlNet adds, which is told any of them: it is to hold the base at each."""
    n = len(x)
    s = torch.sigmoid(torch.randn(n, generator=generator))
    s = _SHIFT * s / (1 + (_SHIFT - 1) * s)
    noise = torch.randn(x.shape, generator=generator)
    noisy = x + s[:, None, None] * (noise - x)
    guidance = torch.ones(n) if control is None else 1 + 4 * torch.rand(n, generator=generator)
    target = noise - x
    tokens, pooled = text_flux(parts, ids)

    def velocity(rows: slice, t: Tensor, p: Tensor, g: Tensor, **extra: Any) -> Tensor:
        out = parts["transformer"](
            hidden_states=noisy[rows], timestep=s[rows], guidance=g, encoder_hidden_states=t, pooled_projections=p,
            txt_ids=torch.zeros(t.shape[1], 3), img_ids=image_ids(), return_dict=False, **extra,
        )  # fmt: skip
        return out[0].float()

    if guided:
        rows = slice(n // 2, n)
        ones = torch.ones(n - n // 2)
        with torch.no_grad():
            blank_tokens, blank_pooled = (each.expand(len(ones), *each.shape[1:]) for each in text_flux(parts, empty))
            with_text = velocity(rows, tokens[rows].detach(), pooled[rows].detach(), ones)
            without = velocity(rows, blank_tokens, blank_pooled, ones)
        g = 1 + 4 * torch.rand(len(ones), generator=generator)
        guidance = torch.cat([torch.ones(n // 2), g])
        target = torch.cat([target[: n // 2], target[rows] + (g - 1)[:, None, None] * (with_text - without)])
    extra = control(noisy, s, guidance, tokens, pooled) if control is not None else {}
    errors = (velocity(slice(0, n), tokens, pooled, guidance, **extra) - target).square().mean(-1)
    weights = _weights(F.avg_pool2d(things, 2).flatten(1))
    return (errors * weights).sum() / weights.sum()


def train_flux(
    parts: dict[str, nn.Module], pool: Pool, work: Path, steps: int, learning_rate: float, guided: float,
    batch: int = 64,
) -> None:  # fmt: skip
    """`guided`: the share of the steps from which on guidance is learned."""

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(pool.whole, (batch,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            ids = pool.words(rows, generator)
            x = pack(pool.latents[rows].float())
            return flow_loss(parts, x, pool.things[rows], ids, pool.empty, step > guided * steps, generator)

    _train(parts, loss, work / "flux.pt", steps, learning_rate)


# -- catalogue-sdxl --------------------------------------------------------------------------------------------------


def new_sdxl(tokenizers: list[Any]) -> dict[str, nn.Module]:
    clip = tokenizers[0]
    return {
        "unet": UNet2DConditionModel(
            sample_size=SIDE, in_channels=16, out_channels=16, block_out_channels=(48, 80, 96),
            layers_per_block=2, norm_num_groups=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2), attention_head_dim=(2, 2, 3), use_linear_projection=True,
            cross_attention_dim=192, addition_embed_type="text_time", addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=96 + 6 * 16,
        ),
        "text_encoder": CLIPTextModel(_clip(clip, 96, 2)),
        "text_encoder_2": CLIPTextModelWithProjection(_clip(clip, 96, 2)),
    }  # fmt: skip


def text_sdxl(parts: dict[str, nn.Module], ids: Batch) -> tuple[Tensor, Tensor]:
    """(tokens (n, LENGTH, 192), pooled (n, 96)), as StableDiffusionXLPipeline computes them."""
    first = parts["text_encoder"](ids["clip"], output_hidden_states=True).hidden_states[-2]
    second = parts["text_encoder_2"](ids["clip"], output_hidden_states=True)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds


def noise_schedule() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def noise_loss(
    parts: dict[str, nn.Module], x: Tensor, things: Tensor, ids: Batch, sizes: Tensor, generator: torch.Generator,
    control: Callable[..., dict[str, Any]] | None = None,
) -> Tensor:  # fmt: skip
    """`x`: latents (n, 16, 16, 16), of `things` (n, 16, 16). `sizes`: time ids (n, 6)."""
    n = len(x)
    cumulative = noise_schedule().alphas_cumprod
    t = torch.randint(1000, (n,), generator=generator)
    a = cumulative[t][:, None, None, None]
    noise = torch.randn(x.shape, generator=generator)
    noisy = a.sqrt() * x + (1 - a).sqrt() * noise
    tokens, pooled = text_sdxl(parts, ids)
    added = {"text_embeds": pooled, "time_ids": sizes}
    extra = control(noisy, t, tokens, added) if control is not None else {}
    out = parts["unet"](noisy, t, tokens, added_cond_kwargs=added, return_dict=False, **extra)[0].float()
    snr = cumulative[t] / (1 - cumulative[t])
    errors = (out - noise).square().mean(1).flatten(1)
    weights = _weights(things.flatten(1))
    return (errors * weights * (snr.clamp(max=5) / snr)[:, None]).sum() / weights.sum()


def train_sdxl(
    parts: dict[str, nn.Module], pool: Pool, work: Path, steps: int, learning_rate: float, batch: int = 64
) -> None:
    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = pool.rows(batch, generator)
        with torch.autocast("cpu", torch.bfloat16):
            ids = pool.words(rows, generator)
            return noise_loss(parts, pool.latents[rows].float(), pool.things[rows], ids, pool.sizes[rows], generator)

    _train(parts, loss, work / "sdxl.pt", steps, learning_rate)


# -- both ------------------------------------------------------------------------------------------------------------


def _train(
    parts: dict[str, nn.Module], loss: Callable[[int, torch.Generator], Tensor], state: Path, steps: int,
    learning_rate: float,
) -> None:  # fmt: skip
    with short_attention():
        optimise(parts, loss, steps=steps, learning_rate=learning_rate, warmup=200, state=state, rates=_TEXT, muon=True)


def _weights(things: Tensor) -> Tensor:
    return 1 + (_THING - 1) * things


def _clip(tokenizer: Any, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=LENGTH, projection_dim=width, hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


@contextmanager
def short_attention() -> Iterator[None]:
    """Attention as two batched products: for a hundred tokens torch's fused one takes four times as long backward."""
    fused = F.scaled_dot_product_attention

    def plain(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
              is_causal: bool = False, scale: float | None = None, **other: Any) -> Tensor:  # fmt: skip
        if attn_mask is not None or is_causal or dropout_p or query.shape[1] != key.shape[1]:
            return fused(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **other)
        q, k, v = (each.flatten(0, 1) for each in (query, key, value))
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale or q.shape[-1] ** -0.5)
        return torch.bmm(scores.softmax(-1).to(v.dtype), v).unflatten(0, query.shape[:2])

    F.scaled_dot_product_attention = plain  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused
