"""Image bases on disk in diffusers' layout: real classes and module names, tiny widths, small tokenizers.

`tiny_image_base(folder, family)` writes a base, unless it exists, and returns the base's folder; `full=True`
gives the family's official number of blocks and layers, otherwise there are as few as possible.
`tiny_control(folder, family)` writes a ControlNet of minimal size. A picture has 32 × 32 pixels, one latent
element covers 4 × 4 pixels, and a prompt has 24 tokens. Weights are random but deterministic.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import pre_tokenizers

TINY_FAMILIES = ("sd15", "sdxl", "flux1", "schnell", "sd3", "klein", "flux2", "qwen-image", "z-image")
EDITING = ("kontext", "klein", "flux2", "qwen-edit", "qwen-edit-plus")
SIZE, LENGTH = 32, 24
WORDS = ["a", "red", "house", "cat", "dog", "tree", "in", "the", "style", "of", "flat", "with", "hat", "blue", "sks"]
LATENT = 4
SMALL_ENCODER = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 16}
TINY_VAE = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": LATENT,
    "norm_num_groups": 4,
    "sample_size": SIZE,
}


def tiny_image_base(folder: Path, family: str, full: bool = False) -> Path:
    """Write a base to `folder / "tiny-<family>"`, unless it exists. Return the base's folder.

    `family`: one of TINY_FAMILIES; sd3-large, which is always full; schnell (flux1 without guidance); klein
    (flux2 without guidance); or one of EDITING: kontext (flux1), qwen-edit and qwen-edit-plus (qwen-image).
    The EDITING bases edit pictures and resize them to a megapixel unless `small_references` is used.
    """
    place = Path(folder) / f"tiny-{family}{'-full' if full else ''}"
    if not (place / "model_index.json").exists():
        with _seeded(0):
            _BUILD[family](full).save_pretrained(place)
    return place


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Use a fixed seed and silence warnings inside the block; restore the random state afterwards."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        yield


def tiny_control(folder: Path, family: str) -> Path:
    """Write a ControlNet for `tiny_image_base(folder, family)`, unless it exists. Return its folder.

    `family`: sd15, sdxl, flux1 or sd3. The ControlNet's zero-initialized outputs get nonzero values.
    """
    place = Path(folder) / f"tiny-{family}-canny"
    if not (place / "config.json").exists():
        with _seeded(1), torch.no_grad():
            control = _CONTROL[family]()
            for parameter in control.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.05)
            control.save_pretrained(place)
    return place


# -- tokenizers ------------------------------------------------------------------------------------------------------


def clip_tokenizer() -> Any:
    """Return a byte-level tokenizer with additional tokens for a few whole words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*letters, *(f"{a}</w>" for a in letters)])}
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            parts = ["".join(merge), *parts[2:]]
            if parts[0] not in vocab:
                vocab[parts[0]] = len(vocab)
                merges.append(merge)
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def t5_tokenizer() -> Any:
    letters = [chr(c) for c in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -2.0) for word in WORDS if len(word) > 1] + [(letter, -5.0) for letter in letters]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_CHAT_MARKS = ["<|im_start|>", "<|im_end|>"]
_VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def chat_tokenizer(vision: bool = False) -> Any:
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = transformers.Qwen2Tokenizer(vocab=vocab, merges=[])
    made.add_special_tokens({"additional_special_tokens": [*_CHAT_MARKS, *(_VISION if vision else [])]})
    made.chat_template = _CHAT
    return made


# -- parts -----------------------------------------------------------------------------------------------------------


def clip(tokenizer: Any, width: int, projection: bool, layers: int) -> Any:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": layers, "max_position_embeddings": LENGTH, "vocab_size": len(tokenizer)}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = transformers.CLIPTextConfig(**sizes, **tokens)
    return (transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel)(config)


def t5(tokenizer: Any, width: int, layers: int) -> Any:
    sizes = {"d_model": width, "d_ff": 2 * width, "d_kv": 8, "num_layers": layers, "num_heads": 2}
    more = {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "use_cache": False}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(tokenizer), **sizes, **more))


def vae(**changes: Any) -> Any:
    return diffusers.AutoencoderKL(**(TINY_VAE | {"scaling_factor": 0.4} | changes))


def unet(context: int, full: bool, extra: bool) -> Any:
    """Return a U-Net with SD 1's blocks, or with SDXL's blocks if `extra`."""
    cross, plain = "CrossAttn", ""
    widths, kinds = (8, 16), [plain, cross] if extra else [cross, plain]
    if full:
        widths, kinds = (
            ((8, 16, 32), [plain, cross, cross]) if extra else ((8, 16, 32, 32), [cross, cross, cross, plain])
        )
    given: dict[str, Any] = {
        "down_block_types": tuple(f"{k}DownBlock2D" for k in kinds),
        "up_block_types": tuple(f"{k}UpBlock2D" for k in reversed(kinds)),
    }
    if extra:
        given |= {
            "transformer_layers_per_block": [1, 2, 10] if full else [1, 1],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 16 + 6 * 4,
        }
    sizes = {"sample_size": SIZE // 4, "layers_per_block": 2, "norm_num_groups": 8, "attention_head_dim": 2}
    return diffusers.UNet2DConditionModel(cross_attention_dim=context, block_out_channels=widths, **sizes, **given)


HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}
FLUX_HEADS = HEADS | {"joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)}


def flux1(full: bool, guidance: bool) -> Any:
    layers = {"num_layers": 19, "num_single_layers": 38} if full else {"num_layers": 1, "num_single_layers": 1}
    sizes = {"patch_size": 1, "in_channels": 4 * LATENT, "pooled_projection_dim": 16}
    return diffusers.FluxTransformer2DModel(guidance_embeds=guidance, **layers, **sizes, **FLUX_HEADS)


def _noise(kind: Any, **more: Any) -> Any:
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **more)


def _flow(dynamic: bool) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic, shift=1.0 if dynamic else 3.0)


# -- families --------------------------------------------------------------------------------------------------------


def _sd15(full: bool) -> Any:
    tokens = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(tokens, 16, False, 12 if full else 2),
        tokenizer=tokens,
        unet=unet(16, full, False),
        scheduler=_noise(diffusers.DDIMScheduler, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(full: bool) -> Any:
    tokens = clip_tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(tokens, 16, False, 12 if full else 2),
        text_encoder_2=clip(tokens, 16, True, 32 if full else 2),
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=unet(32, full, True),
        scheduler=_noise(diffusers.EulerDiscreteScheduler),
        add_watermarker=False,
    )


def _flux1(guidance: bool, kind: Any = diffusers.FluxPipeline) -> Callable[[bool], Any]:
    def make(full: bool) -> Any:
        tokens, pieces = clip_tokenizer(), t5_tokenizer()
        return kind(
            scheduler=_flow(guidance),
            vae=vae(shift_factor=0.1),
            text_encoder=clip(tokens, 16, False, 12 if full else 2),
            tokenizer=tokens,
            text_encoder_2=t5(pieces, 16, 24 if full else 2),
            tokenizer_2=pieces,
            transformer=flux1(full, guidance),
        )

    return make


def _sd3_transformer(full: bool, large: bool = False) -> Any:
    return diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=16,  # the only number of channels that the inpainting pipeline accepts
        out_channels=16,
        num_layers=38 if large else 24 if full else 2,
        **HEADS,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=16,
        dual_attention_layers=() if large else tuple(range(13)) if full else (0,),
        qk_norm="rms_norm",
    )


def _sd3(full: bool, large: bool = False) -> Any:
    tokens, pieces = clip_tokenizer(), t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=_sd3_transformer(full, large),
        scheduler=_flow(False),
        vae=vae(shift_factor=0.1, latent_channels=16),
        text_encoder=clip(tokens, 16, True, 12 if full else 2),
        tokenizer=tokens,
        text_encoder_2=clip(tokens, 16, True, 32 if full else 2),
        tokenizer_2=tokens,
        text_encoder_3=t5(pieces, 32, 24 if full else 2),
        tokenizer_3=pieces,
    )


def _flux2(guidance: bool) -> Callable[[bool], Any]:
    """Return a function that builds FLUX.2: dev with guidance, klein without.

    dev reads Mistral's layers 10, 20 and 30; klein reads Qwen3's layers 9, 18 and 27. dev gets a tokenizer
    instead of its processor, because the processor needs torchvision for images.
    """

    def make(full: bool) -> Any:
        tokens = chat_tokenizer()
        text = SMALL_ENCODER | {"vocab_size": len(tokens), "hidden_size": 8, "head_dim": 4}
        text["num_hidden_layers"] = 30 if guidance else 27
        encoder: Any
        if guidance:
            vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
            vision |= {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 8}
            config = transformers.Mistral3Config(
                text_config=transformers.MistralConfig(**text), vision_config=vision, image_token_index=0
            )
            encoder = transformers.Mistral3ForConditionalGeneration(config)
        else:
            encoder = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text))
        counts = ((8, 48) if guidance else (5, 20)) if full else (1, 1)
        transformer = diffusers.Flux2Transformer2DModel(
            in_channels=4 * LATENT,
            num_layers=counts[0],
            num_single_layers=counts[1],
            **HEADS,
            joint_attention_dim=24,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=guidance,
        )
        pipeline = diffusers.Flux2Pipeline if guidance else diffusers.Flux2KleinPipeline
        own_vae = diffusers.AutoencoderKLFlux2(**TINY_VAE)
        own_vae.bn.running_mean.normal_()
        own_vae.bn.running_var.uniform_(0.5, 2.0)
        return pipeline(
            scheduler=_flow(True), vae=own_vae, text_encoder=encoder, tokenizer=tokens, transformer=transformer
        )

    return make


def _qwen_image(full: bool, vision: bool = False) -> Any:
    tokens = chat_tokenizer(vision)
    names = {"image_token_id": 2, "video_token_id": 3, "vision_start_token_id": 0, "vision_end_token_id": 1}
    config = transformers.Qwen2_5_VLConfig(
        **({name: tokens.convert_tokens_to_ids(_VISION[i]) for name, i in names.items()} if vision else {}),
        text_config=SMALL_ENCODER
        | {
            "vocab_size": len(tokens),
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=60 if full else 2, **FLUX_HEADS
    )
    own_vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    )
    return diffusers.QwenImagePipeline(
        scheduler=_flow(True),
        vae=own_vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokens,
        transformer=transformer,
    )


class _QwenEdit:
    """A pipeline that can be saved without torchvision, which its processor needs.

    The processor's files are written by hand, as transformers would write them.
    """

    def __init__(self, full: bool, name: str) -> None:
        self.pipe, self.name = _qwen_image(full, vision=True), name

    def save_pretrained(self, place: Path) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.pipe.save_pretrained(place)
        Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112}).save_pretrained(
            place / "processor"
        )
        self.pipe.tokenizer.save_pretrained(place / "processor")
        index = json.loads((place / "model_index.json").read_text())
        index |= {"_class_name": self.name, "processor": ["transformers", "Qwen2VLProcessor"]}
        (place / "model_index.json").write_text(json.dumps(index))


def qwen_edit_pipeline(place: Path) -> Any:
    """Return diffusers' pipeline for a folder.

    The processor has transformers' class but is built without the constructor, which needs torchvision.
    """
    from transformers import AutoTokenizer, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = object.__new__(Qwen2VLProcessor)
    processor.image_processor = Qwen2VLImageProcessorPil.from_pretrained(place / "processor")
    processor.tokenizer = AutoTokenizer.from_pretrained(place / "processor")
    processor.image_token, processor.video_token = _VISION[2:]
    processor.image_token_id, processor.video_token_id = processor.tokenizer.convert_tokens_to_ids(_VISION[2:])
    parts = diffusers.QwenImagePipeline.from_pretrained(place).components
    kind = getattr(diffusers, json.loads((place / "model_index.json").read_text())["_class_name"])
    pipe = kind(**parts, processor=processor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small_references(patch: Any) -> None:
    """Make Qwen-Image-Edit's pipelines resize references to 64 × 64 pixels instead of a megapixel.

    `patch`: pytest's monkeypatch fixture.
    """
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        own = module.calculate_dimensions
        patch.setattr(module, "calculate_dimensions", lambda area, ratio, own=own: own(area / 256, ratio))


def _z_image(full: bool) -> Any:
    tokens = chat_tokenizer()
    sizes = {"vocab_size": len(tokens), "hidden_size": 16, "num_hidden_layers": 3, "head_dim": 8}
    text = transformers.Qwen3Config(**SMALL_ENCODER, **sizes)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=LATENT,
        dim=24,
        n_layers=30 if full else 2,
        n_refiner_layers=2 if full else 1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 4, 4],
    )
    with torch.no_grad():
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            token.normal_()
    return diffusers.ZImagePipeline(
        scheduler=_flow(False),
        vae=vae(shift_factor=0.1),
        text_encoder=transformers.Qwen3Model(text),
        tokenizer=tokens,
        transformer=transformer,
    )


_BUILD: dict[str, Callable[[bool], Any]] = {
    "sd15": _sd15,
    "sdxl": _sdxl,
    "flux1": _flux1(True),
    "schnell": _flux1(False),
    "kontext": _flux1(True, diffusers.FluxKontextPipeline),
    "sd3": _sd3,
    "sd3-large": lambda full: _sd3(full, large=True),
    "klein": _flux2(False),
    "flux2": _flux2(True),
    "qwen-image": _qwen_image,
    "qwen-edit": lambda full: _QwenEdit(full, "QwenImageEditPipeline"),
    "qwen-edit-plus": lambda full: _QwenEdit(full, "QwenImageEditPlusPipeline"),
    "z-image": _z_image,
}


def _unet_control(net: Any) -> Any:
    return diffusers.ControlNetModel.from_unet(net, conditioning_embedding_out_channels=(8, 8, 16))


_CONTROL: dict[str, Callable[[], Any]] = {
    "sd15": lambda: _unet_control(unet(16, False, False)),
    "sdxl": lambda: _unet_control(unet(32, False, True)),
    "flux1": lambda: diffusers.FluxControlNetModel.from_transformer(
        flux1(False, True), num_layers=1, num_single_layers=1, **HEADS
    ),
    "sd3": lambda: diffusers.SD3ControlNetModel.from_transformer(
        _sd3_transformer(False), num_layers=1, num_extra_conditioning_channels=0
    ),
}
