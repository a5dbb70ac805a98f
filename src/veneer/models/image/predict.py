"""Model calls for training an image base: encode, decode and predict.

    noise families   ε_θ(x_t, t, c)  or  v_θ,   t in 0..999,   x_t = √ᾱ_t x + √(1 - ᾱ_t) ε
    flow families    v_θ(x_σ, σ, c),            σ in 0..1,     x_σ = (1 - σ) x + σ ε,   v = ε - x

Each function computes the same values as the family's diffusers pipeline. Prompts are encoded with the
pipeline's `encode_prompt`. The tests compare pictures sampled in a loop over `predict` with the pipeline's
pictures. Latents always have the shape (n, c, h/f, w/f), shifted and scaled for the denoiser. Functions in
this module pack the latents into tokens where the denoiser expects tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from veneer.errors import BaseError
from veneer.models.image.base import ImageBase, pipeline, readers, text_settings
from veneer.models.loading import errors_only
from veneer.ops.device_transfer import sent

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass
class Conditioning:
    """The denoiser's text inputs for n prompts.

    `embeds`: (n, L, d). `pooled`: (n, p), if the family uses a pooled embedding. `mask`: (n, L), 1 for tokens
    and 0 for padding, if the family uses a mask. `cut`: the part of each prompt that was not encoded."""

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    cut: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.embeds)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Conditioning:
        """Return a copy on `device`, cast to `dtype` if given; the mask keeps its dtype."""
        pooled = None if self.pooled is None else sent(self.pooled, device).to(dtype=dtype)
        mask = None if self.mask is None else sent(self.mask, device)
        return replace(self, embeds=sent(self.embeds, device).to(dtype=dtype), pooled=pooled, mask=mask)

    def unpadded(self) -> list[Tensor]:
        """Return one tensor (L_i, d) per prompt: the embeddings without padding."""
        if self.mask is None:
            return list(self.embeds.unbind())
        lengths = self.mask.sum(1).tolist()  # a single device synchronization for all prompts
        return [row[:length] for row, length in zip(self.embeds, lengths, strict=True)]

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate conditionings; pad shorter ones with zeros and mask the padding."""
        length = max(p.embeds.shape[1] for p in parts)
        masks = [p.embeds.new_ones(p.embeds.shape[:2], dtype=torch.long) if p.mask is None else p.mask for p in parts]
        masked = any(p.mask is not None or p.embeds.shape[1] != length for p in parts)
        pooled = [p.pooled for p in parts if p.pooled is not None]
        return Conditioning(
            torch.cat([F.pad(p.embeds, (0, 0, 0, length - p.embeds.shape[1])) for p in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat([F.pad(mask, (0, length - mask.shape[1])) for mask in masks]) if masked else None,
            [text for p in parts for text in p.cut],
        )


# -- prompts ---------------------------------------------------------------------------------------------------------


def embed_prompts(base: ImageBase, prompts: Sequence[str], references: Sequence[Sequence[Image]] = ()) -> Conditioning:
    """Encode n prompts in the same way as the pipeline.

    Gradients flow to the text encoders, for adapters on text encoders. `references`: for each prompt, the
    pictures to edit; ignored unless the base encodes prompts and references together.

    In the result, `cut` contains the part of each prompt beyond the denoiser's token limit. FLUX's pooled
    vector covers only CLIP's 77 tokens, but tokens beyond these 77 do not count as cut. Raises BaseError if a
    text encoder was released."""
    texts = list(prompts)
    if base.reads_references and any(references):
        pairs = zip(texts, references, strict=True)
        return Conditioning.cat([_embed_with_references(base, text, pictures) for text, pictures in pairs])
    pipe = pipeline(base)
    row = base.row
    with errors_only():  # Copy the list, because Z-Image's pipeline writes its template into the list.
        encoded = pipe.encode_prompt(prompt=[*texts], device=base.device, **text_settings(base), **row.encoding)
    cut = [truncated_end(base, text) for text in texts]
    if isinstance(encoded[0], list):  # Z-Image's embeddings have different lengths.
        return replace(Conditioning.cat([Conditioning(embedding[None]) for embedding in encoded[0]]), cut=cut)
    pooled, mask = (None if at is None else encoded[at] for at in (row.pooled, row.mask))
    return Conditioning(encoded[0], pooled, mask, cut)


def _embed_with_references(base: ImageBase, prompt: str, references: Sequence[Image]) -> Conditioning:
    """Encode one prompt together with its reference pictures.

    Pictures are resized in the same way as in the pipeline. The prompt is never cut."""
    base.part("processor")
    pipe = pipeline(base, "edit")
    sizes = [_qwen_size(picture.size, base.editing.read) for picture in references]
    sized = [
        pipe.image_processor.resize(picture.convert("RGB"), height, width)
        for picture, (width, height) in zip(references, sizes, strict=True)
    ]
    with errors_only():
        image = sized if base.references > 1 else sized[0]
        encoded = pipe.encode_prompt(prompt=[prompt], image=image, device=base.device)
    return Conditioning(encoded[0], None, encoded[1], [""])


def _qwen_size(size: tuple[int, int], area: int) -> tuple[int, int]:
    """Return a (width, height) of about `area` pixels for Qwen-Image-Edit."""
    with errors_only():  # Without torchvision, the import logs a warning.
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import calculate_dimensions
    width, height = calculate_dimensions(area, size[0] / size[1])[:2]
    return width, height


def reference_size(base: ImageBase, width: int, height: int) -> tuple[int, int]:
    """Return the (width, height) to which a base resizes a reference picture.

    Only Qwen-Image-Edit changes the size: to about one megapixel."""
    if not base.reads_references:
        return width, height
    return _qwen_size((width, height), base.editing.encoded)


def truncated_end(base: ImageBase, prompt: str) -> str:
    """Return the end of a prompt that no text encoder reads, or ""."""
    return min((_cut_end(base, prompt, tokenizer, limit) for tokenizer, limit in readers(base)), key=len)


def _cut_end(base: ImageBase, prompt: str, tokenizer: Any, limit: int) -> str:
    prefix, suffix, special = _template_of(base)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # FLUX.2 has a processor, which contains the tokenizer.
    if base.row.template == "pipeline":
        limit += pipeline(base).prompt_template_encode_start_idx  # The pipeline drops the template's tokens.
    with errors_only():  # transformers warns about long prompts, which are expected here.
        read = tokenizer(prefix + prompt + suffix, return_offsets_mapping=True, add_special_tokens=special)
    ids, offsets = read["input_ids"], read["offset_mapping"]
    if len(ids) <= limit:
        return ""
    # Without a template, the truncated prompt still ends with the end token. With a template, truncation
    # removes tokens from the end, whatever they are.
    ends = 0 if prefix else 1
    ends_read = [end for start, end in offsets[: limit - ends] if end > start]
    at = max(ends_read, default=0) - len(prefix)
    return prompt[max(at, 0) :].strip()


def _template_of(base: ImageBase) -> tuple[str, str, bool]:
    """Return the template's text before and after a prompt, and `add_special_tokens`."""
    pipe = pipeline(base)
    placeholder = "\x00"
    template = base.row.template
    if template == "pipeline":
        prefix, _, suffix = pipe.prompt_template_encode.partition("{}")
        return prefix, suffix, False
    if not template:
        return "", "", True
    tokenizer = base.parts["tokenizer"]
    if type(pipe).__name__ != "Flux2Pipeline":  # FLUX.2 klein (without thinking) or Z-Image
        turns: list[dict[str, Any]] = [{"role": "user", "content": placeholder}]
        options = {"add_generation_prompt": True, "enable_thinking": template == "thinking"}
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    else:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        turns = format_input(prompts=[placeholder], system_message=pipe.system_message)[0]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    prefix, _, suffix = str(text).partition(placeholder)
    return prefix, suffix, False


# -- pictures --------------------------------------------------------------------------------------------------------


@contextmanager
def _vae_of(base: ImageBase) -> Iterator[Any]:
    """Yield the VAE, converted to float32 if the VAE overflows in float16.

    The pipelines do the same. `force_upcast` in the VAE's config marks a VAE that overflows."""
    vae = base.part("vae")
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.float()
    try:
        yield vae
    finally:
        if upcast:
            vae.half()


@torch.no_grad()
def encode_pictures(base: ImageBase, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Encode pixels to latents (n, c, h/f, w/f) in the base's dtype.

    pixels: (n, 3, h, w) in -1..1; h and w are multiples of `base.unit`. Returns the mean of the posterior, or
    a sample if a generator is given, shifted and scaled for the denoiser."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or any(side % base.unit for side in pixels.shape[2:]):
        shape = tuple(pixels.shape)
        raise BaseError(f"pictures of shape {shape}: expected (n, 3, h, w) with sides in multiples of {base.unit}")
    with _vae_of(base) as vae:
        x = pixels.to(base.device, vae.dtype)
        if base.row.frames:
            x = x[:, :, None]
        posterior = vae.encode(x).latent_dist
        z = posterior.mode() if generator is None else posterior.sample(generator)
        mean, scale, std = _statistics(base, vae, z)
        latents: Tensor = ((F.pixel_unshuffle(z, 2) if base.row.patched else z) - mean) * scale / std
        return (latents[:, :, 0] if base.row.frames else latents).to(base.dtype)


@torch.no_grad()
def decode_latents(base: ImageBase, latents: Tensor) -> Tensor:
    """Decode latents to pixels (n, 3, h, w), nominally in -1..1 but not clamped.

    latents: as returned by `encode_pictures`."""
    with _vae_of(base) as vae:
        x = latents.to(base.device, vae.dtype)
        x = x[:, :, None] if base.row.frames else x
        mean, scale, std = _statistics(base, vae, x)
        z = x * std / scale + mean
        z = F.pixel_shuffle(z, 2) if base.row.patched else z
        out: Tensor = vae.decode(z, return_dict=False)[0]
        return out[:, :, 0] if base.row.frames else out


def _statistics(base: ImageBase, vae: Any, like: Tensor) -> tuple[Tensor | float, float, Tensor | float]:
    """Return (mean, scale, std): the denoiser's latents are (z − mean)·scale / std."""
    shape = (1, -1, *[1] * (like.ndim - 2))

    def channels(values: Any) -> Tensor:
        return torch.as_tensor(values).view(shape).to(like.device, like.dtype)

    config = vae.config
    if base.row.patched:  # FLUX.2 has a batch norm over patches.
        return channels(vae.bn.running_mean), 1.0, channels(torch.sqrt(vae.bn.running_var + config.batch_norm_eps))
    scale = 1.0 if base.row.frames else float(config.scaling_factor)
    if base.row.frames or (config.get("latents_mean") is not None and config.get("latents_std") is not None):
        return channels(config.latents_mean), scale, channels(config.latents_std)
    return float(config.get("shift_factor") or 0.0), scale, 1.0


# -- the denoiser ----------------------------------------------------------------------------------------------------


def alphas_cumprod(base: ImageBase) -> Tensor:
    """Return the noise schedule ᾱ_t of a noise family, (1000,) in float32.

    Raises BaseError for a flow family."""
    if base.prediction == "flow":
        raise BaseError(f"{base.row.label} learns a flow, so it has no noise schedule", where=base.name)
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler.from_config(base.parts["scheduler"].config)
    cumulative: Tensor = scheduler.alphas_cumprod
    return cumulative.to(base.device)


def predict(
    base: ImageBase,
    latents: Tensor,
    timesteps: Tensor,
    text: Conditioning,
    *,
    sizes: Tensor | None = None,
    guidance: float | Tensor | None = None,
    residuals: dict[str, Any] | None = None,
    references: Sequence[Tensor] = (),
) -> Tensor:
    """Return the denoiser's prediction: ε or v, or ε - x for flow families.

    The prediction has the shape of the latents. `timesteps`: (n,) or a scalar; 0..999 for noise families, σ
    in 0..1 for flow families. `sizes`: SDXL's time ids (n, 6): original height and width, the crop's top and
    left, target height and width. `guidance`: for models that take guidance as an input (FLUX.1 dev, FLUX.2
    dev), default 1.0. `residuals`: a ControlNet's outputs, keyed by the denoiser's argument names.
    `references`: clean latents (n, c, h, w) of reference pictures of any size. The tokens of the references
    follow the picture's tokens and have different frame coordinates. Raises BaseError for missing or
    unexpected sizes, for unexpected guidance, and for references if the family does not support them."""
    denoiser, n = base.denoiser, len(latents)
    dtype = base.dtype
    x = latents.to(dtype)
    text = text.to(latents.device, dtype)
    t = timesteps.to(latents.device).expand(n)
    if (sizes is None) == base.row.time_ids:
        message = "SDXL requires sizes: the time ids, (n, 6)" if sizes is None else f"{base.row.label} takes no sizes"
        raise BaseError(message)
    takes_guidance = bool(denoiser.config.get("guidance_embeds"))
    if guidance is not None and not takes_guidance:
        raise BaseError(f"{base.short_name} does not take guidance as an input", fix="leave guidance out")
    if references and not base.row.takes_references:
        fix = "use FLUX.1 Kontext, FLUX.2 or Qwen-Image-Edit"
        raise BaseError(f"{base.row.label} takes no reference pictures", fix=fix)
    reference_latents = [r.to(latents.device, dtype) for r in references]
    arguments: dict[str, Any] = {"return_dict": False, **(residuals or {})}
    if sizes is not None:
        arguments["added_cond_kwargs"] = {"text_embeds": text.pooled, "time_ids": sizes.to(latents.device, dtype)}
    guidance_tensor = None
    if takes_guidance:
        g = torch.as_tensor(1.0 if guidance is None else guidance, dtype=torch.float32)
        guidance_tensor = sent(g, latents.device).expand(n)
    call = _DenoiserCall(denoiser, x, t, text, reference_latents, guidance_tensor, arguments)
    return _CALLS[base.row.classname](call)


@dataclass(frozen=True)
class _DenoiserCall:
    """The arguments of a denoiser call.

    `t`: the `timesteps` of `predict`. `guidance`: None if the denoiser does not take guidance. `more`:
    arguments common to all denoisers."""

    denoiser: Any
    x: Tensor
    t: Tensor
    text: Conditioning
    references: Sequence[Tensor]
    guidance: Tensor | None
    more: dict[str, Any]

    @property
    def sigma(self) -> Tensor:
        """The timestep σ, rounded to the precision that the pipelines use.

        The pipelines pass σ·1000 in the latents' dtype."""
        return (self.t * 1000).to(self.x.dtype) / 1000


def _unet(call: _DenoiserCall) -> Tensor:
    out: Tensor = call.denoiser(call.x, call.t, encoder_hidden_states=call.text.embeds, **call.more)[0]
    return out


def _sd3(call: _DenoiserCall) -> Tensor:
    arguments = {"encoder_hidden_states": call.text.embeds, "pooled_projections": call.text.pooled}
    out: Tensor = call.denoiser(hidden_states=call.x, timestep=call.t * 1000, **arguments, **call.more)[0]
    return out


def _z_image(call: _DenoiserCall) -> Tensor:
    """Call Z-Image and return ε - x.

    Z-Image takes the time as 1 - σ (0 is noise, 1 is a picture), predicts x - ε, and takes the latents and
    the texts as lists."""
    frames = list(call.x[:, :, None].unbind())
    out = call.denoiser(frames, 1 - call.t, call.text.unpadded(), **call.more)[0]
    return -torch.stack(out)[:, :, 0]


def _flux1(call: _DenoiserCall) -> Tensor:
    text, pictures = call.text, (call.x, *call.references)
    ids = [_flux_ids(y, frame) for frame, y in enumerate(pictures)]
    arguments = {"pooled_projections": text.pooled, "img_ids": torch.cat(ids)}
    return _packed(call, **arguments, txt_ids=call.x.new_zeros(text.embeds.shape[1], 3))


def _qwen_image(call: _DenoiserCall) -> Tensor:
    shapes = [(1, y.shape[2] // 2, y.shape[3] // 2) for y in (call.x, *call.references)]
    return _packed(call, img_shapes=[shapes] * len(call.x), encoder_hidden_states_mask=call.text.mask)


def _packed(call: _DenoiserCall, **arguments: Any) -> Tensor:
    """Pack each 2 × 2 patch of latents into a token, and call the denoiser.

    The tokens of the references follow the picture's tokens."""
    h, w = call.x.shape[2] // 2, call.x.shape[3] // 2
    tokens = torch.cat([F.pixel_unshuffle(y, 2).flatten(2).transpose(1, 2) for y in (call.x, *call.references)], dim=1)
    out = call.denoiser(
        hidden_states=tokens,
        timestep=call.sigma,
        encoder_hidden_states=call.text.embeds,
        guidance=call.guidance,
        **arguments,
        **call.more,
    )[0]
    return F.pixel_shuffle(out[:, : h * w].transpose(1, 2).unflatten(2, (h, w)), 2)


def _flux_ids(latents: Tensor, frame: int) -> Tensor:
    """Return FLUX.1's token positions, (tokens, 3): frame, row, column."""
    h, w = latents.shape[2] // 2, latents.shape[3] // 2
    rows, columns = (torch.arange(n, device=latents.device, dtype=latents.dtype) for n in (h, w))
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([latents.new_full((h, w), frame), *grid], dim=-1).view(-1, 3)


_FLUX2_FRAMES = 10
"""Distance between FLUX.2's frame coordinates: reference pictures have 10, 20, …"""


def _flux2(call: _DenoiserCall) -> Tensor:
    """Call FLUX.2, whose latents are already patches.

    Token positions are (frame, row, column, token)."""
    x, text, pictures = call.x, call.text, (call.x, *call.references)
    n, _, h, w = x.shape

    def positions(*counts: int, frame: int = 0) -> Tensor:
        first = torch.full((1,), frame, device=x.device)  # torch.tensor([frame]) would wait for a copy to the device
        return torch.cartesian_prod(first, *(torch.arange(k, device=x.device) for k in counts))

    image = [positions(y.shape[2], y.shape[3], 1, frame=_FLUX2_FRAMES * i) for i, y in enumerate(pictures)]
    words = positions(1, 1, text.embeds.shape[1])
    out = call.denoiser(
        hidden_states=torch.cat([y.flatten(2).transpose(1, 2) for y in pictures], dim=1),
        timestep=call.sigma,
        encoder_hidden_states=text.embeds,
        guidance=call.guidance,
        img_ids=torch.cat(image).expand(n, -1, -1),
        txt_ids=words.expand(n, -1, -1),
        **call.more,
    )[0][:, : h * w]
    return out.transpose(1, 2).unflatten(2, (h, w))  # type: ignore[no-any-return]


_CALLS: Mapping[str, Callable[[_DenoiserCall], Tensor]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux1,
    "Flux2Transformer2DModel": _flux2,
    "QwenImageTransformer2DModel": _qwen_image,
    "ZImageTransformer2DModel": _z_image,
}
"""diffusers class -> the function that calls an instance of this class."""
