"""The image families in diffusers: denoiser class, pipelines and prompt encoders.

| family     | denoiser class                               | prompt encoders                            | predicts   |
| sd15, sd2  | UNet2DConditionModel                         | CLIP                                       | noise or v |
| sdxl       | UNet2DConditionModel with added time ids     | two CLIPs                                  | noise or v |
| sd3        | SD3Transformer2DModel (3, 3.5 medium, large) | two CLIPs, T5 (optional)                   | flow       |
| flux1      | FluxTransformer2DModel (dev, schnell)        | T5; CLIP gives one pooled vector           | flow       |
| flux2      | Flux2Transformer2DModel (dev, klein)         | Mistral (dev), Qwen3 (klein), as chat      | flow       |
| qwen-image | QwenImageTransformer2DModel (and Edit, Plus) | Qwen2.5-VL, as chat                        | flow       |
| z-image    | ZImageTransformer2DModel (base, Turbo)       | Qwen3, as chat                             | flow       |

Family names are the same as in `formats.topology`. Each family has one row, which says how to recognize a
base and which properties the family has. The rows contain class names only; this module imports neither torch
nor diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.models.config import PLANNED_DENOISERS


@dataclass(frozen=True)
class ImageFamily:
    """One image family.

    `pipelines` and `controlled`: kind -> diffusers pipeline class, without and with ControlNets. An `edit`
    pipeline takes reference pictures; a base's index can add an `edit` pipeline (`INDEX_PIPELINES`).
    `encoders`: the text encoders that adapters of this family change. `readers`: tokenizer -> token limit,
    for the tokenizers whose tokens the denoiser attends to; `schnell`: the token limit of models distilled to
    few steps without guidance. `template`: where the text around a prompt comes from: the pipeline, or the
    tokenizer's chat template, without or with thinking. `patch`: latents per side of one token; `patched`:
    the VAE's latents are already patches; `packed`: the pipeline creates the patches; `frames`: the VAE is a
    video VAE. `takes_lists`: the denoiser takes a list of texts and a list of pictures. `distilled`: guidance
    is an input of the denoiser; `guidance`: the name of the pipeline's guidance argument; `unguided`: the
    value that turns guidance off; `true_guidance`: the pipeline also has classifier-free guidance.
    `time_ids`: the denoiser takes picture sizes. `editors`: edit pipelines of the family's models
    (`EDITING`). `shifted`: the pipeline shifts the schedule according to the picture size;
    `unsupported_schedulers`: schedulers that the pipeline cannot use. `controlnets`: kind of control picture
    -> the usual ControlNet on the hub. `settings`: arguments for the pipelines' constructors; `encoding`:
    arguments for encode_prompt; `pooled` and `mask`: indices into encode_prompt's result."""

    name: str
    label: str
    denoiser: str
    classname: str
    pipelines: Mapping[str, str]
    controlled: Mapping[str, str] = field(default_factory=dict)
    control: str = ""
    encoders: tuple[str, ...] = ()
    readers: Mapping[str, int] = field(default_factory=lambda: {"tokenizer": 77})
    schnell: int | None = None
    template: Literal["", "pipeline", "chat", "thinking"] = ""
    patch: int = 1
    patched: bool = False
    packed: bool = False
    frames: bool = False
    takes_lists: bool = False
    flow: bool = True
    distilled: bool = False
    guidance: str = "guidance_scale"
    unguided: float = 1.0
    true_guidance: bool = False
    time_ids: bool = False
    editors: tuple[str, ...] = ()
    shifted: bool = False
    unsupported_schedulers: tuple[str, ...] = ()
    controlnets: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    encoding: Mapping[str, Any] = field(default_factory=dict)
    pooled: int | None = None
    mask: int | None = None

    @property
    def takes_references(self) -> bool:
        """Whether the denoiser distinguishes reference pictures by their positions.

        Not every base of such a family is trained with references."""
        return bool(self.editors)


def _kinds(stem: str, image: str = "Img2Img", inpaint: str = "Inpaint") -> dict[str, str]:
    """Return kind -> pipeline class, for names like StableDiffusionImg2ImgPipeline.

    A kind with an empty infix is left out."""
    infixes = {"text": "", "image": image, "inpaint": inpaint}
    return {kind: f"{stem}{infix}Pipeline" for kind, infix in infixes.items() if infix or kind == "text"}


_ONE_PROMPT = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1}


def _stable(name: str, label: str, **more: Any) -> ImageFamily:
    return ImageFamily(
        name, label, "unet", "UNet2DConditionModel", _kinds("StableDiffusion"), _kinds("StableDiffusionControlNet"),
        "ControlNetModel", encoders=("text_encoder",), flow=False, encoding=_ONE_PROMPT,
        settings={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}, **more,
    )  # fmt: skip


_TABLE = [
    _stable("sd15", "Stable Diffusion 1.x", controlnets={
        "canny": "lllyasviel/control_v11p_sd15_canny", "depth": "lllyasviel/control_v11f1p_sd15_depth",
    }),
    _stable("sd2", "Stable Diffusion 2.x"),
    ImageFamily(
        "sdxl", "SDXL", "unet", "UNet2DConditionModel", _kinds("StableDiffusionXL"),
        _kinds("StableDiffusionXLControlNet"), "ControlNetModel",
        encoders=("text_encoder", "text_encoder_2"), flow=False, time_ids=True,
        settings={"add_watermarker": False}, encoding=_ONE_PROMPT, pooled=2,
        controlnets={"canny": "diffusers/controlnet-canny-sdxl-1.0", "depth": "diffusers/controlnet-depth-sdxl-1.0"},
    ),
    ImageFamily(
        "sd3", "Stable Diffusion 3", "transformer", "SD3Transformer2DModel", _kinds("StableDiffusion3"),
        {"text": "StableDiffusion3ControlNetPipeline", "inpaint": "StableDiffusion3ControlNetInpaintingPipeline"},
        "SD3ControlNetModel",
        encoders=("text_encoder", "text_encoder_2", "text_encoder_3"), readers={"tokenizer_3": 256, "tokenizer": 77},
        patch=2, encoding={**_ONE_PROMPT, "prompt_2": None, "prompt_3": None}, pooled=2,
        controlnets={"canny": "InstantX/SD3-Controlnet-Canny", "depth": "InstantX/SD3-Controlnet-Depth"},
    ),
    ImageFamily(
        "flux1", "FLUX.1", "transformer", "FluxTransformer2DModel", _kinds("Flux"), _kinds("FluxControlNet"),
        "FluxControlNetModel",
        encoders=("text_encoder", "text_encoder_2"), readers={"tokenizer_2": 512},
        schnell=256,  # black-forest-labs/flux, t5_embedder
        patch=2, packed=True, encoding={"prompt_2": None}, pooled=1, distilled=True, true_guidance=True, shifted=True,
        editors=("FluxKontextPipeline",), controlnets={
            "canny": "InstantX/FLUX.1-dev-Controlnet-Canny", "depth": "Shakker-Labs/FLUX.1-dev-ControlNet-Depth",
        },
    ),
    ImageFamily(
        "flux2", "FLUX.2", "transformer", "Flux2Transformer2DModel", {"text": "Flux2Pipeline", "edit": "Flux2Pipeline"},
        readers={"tokenizer": 512}, template="chat", patch=2, patched=True, distilled=True, shifted=True,
        editors=("Flux2Pipeline", "Flux2KleinPipeline"),
    ),
    ImageFamily(
        "qwen-image", "Qwen-Image", "transformer", "QwenImageTransformer2DModel", _kinds("QwenImage"),
        {"text": "QwenImageControlNetPipeline", "inpaint": "QwenImageControlNetInpaintPipeline"},
        "QwenImageControlNetModel",
        readers={"tokenizer": 1024}, template="pipeline", patch=2, packed=True, frames=True, guidance="true_cfg_scale",
        mask=1, editors=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"), shifted=True,
    ),
    ImageFamily(
        "z-image", "Z-Image", "transformer", "ZImageTransformer2DModel", _kinds("ZImage"),
        readers={"tokenizer": 512}, template="thinking", patch=2, takes_lists=True, shifted=True,
        unguided=0.0,  # pos + g·(pos − neg); the other families use neg + g·(pos − neg)
        encoding={"do_classifier_free_guidance": False},
        unsupported_schedulers=("flow-unipc",),  # UniPC multiplies the sigmas, but this pipeline passes them as a list.
    ),
]  # fmt: skip
FAMILIES: Mapping[str, ImageFamily] = {family.name: family for family in _TABLE}

PLANNED_FAMILIES: Mapping[str, ImageFamily] = {
    PLANNED_DENOISERS[f.classname]: f for f in FAMILIES.values() if f.classname in PLANNED_DENOISERS
}
"""The denoiser's name in the planner's table -> family. All U-Nets map to SDXL."""

INDEX_PIPELINES: Mapping[str, Mapping[str, str]] = {
    "Flux2KleinPipeline": {
        "text": "Flux2KleinPipeline",
        "edit": "Flux2KleinPipeline",
        "inpaint": "Flux2KleinInpaintPipeline",
    },
    "FluxKontextPipeline": {"edit": "FluxKontextPipeline"},
    "QwenImageEditPipeline": {"edit": "QwenImageEditPipeline"},
    "QwenImageEditPlusPipeline": {"edit": "QwenImageEditPlusPipeline"},
}
"""Pipeline class in a base's index -> pipelines that override the family's."""


@dataclass(frozen=True)
class Editing:
    """How a pipeline edits pictures.

    `references`: maximum number of reference pictures in training, according to the model cards. `read`:
    approximate number of pixels of a reference when it is encoded together with the prompt (0: prompts are
    encoded without references); `encoded`: approximate number of pixels of a reference when the VAE encodes
    it (0: the reference keeps its size). The pipeline fixes both numbers, whatever the output size. `guided`:
    the models take guidance as an input. `least`: minimum length of a reference's shorter side in pixels."""

    references: int
    read: int = 0
    encoded: int = 0
    guided: bool = False
    least: int = 0


EDITING: Mapping[str, Editing] = {
    "FluxKontextPipeline": Editing(1, guided=True),
    "Flux2Pipeline": Editing(10, guided=True, least=64),
    "Flux2KleinPipeline": Editing(4, least=64),
    "QwenImageEditPipeline": Editing(1, read=1024 * 1024, encoded=1024 * 1024),
    "QwenImageEditPlusPipeline": Editing(3, read=384 * 384, encoded=1024 * 1024),
}
"""Pipeline class of kind `edit` -> how it edits."""


def denoiser_family(classname: str, config: Mapping[str, Any]) -> ImageFamily | None:
    """Return the family of a denoiser with this class and config, or None if unknown.

    SDXL's U-Net has added time ids. SD 1 and SD 2 share a class, but only SD 2 has linear projections."""
    if classname == "UNet2DConditionModel":
        if config.get("addition_embed_type") == "text_time":
            return FAMILIES["sdxl"]
        if config.get("addition_embed_type") or config.get("encoder_hid_dim_type"):
            return None  # Kandinsky, DeepFloyd
        return FAMILIES["sd2" if config.get("use_linear_projection") else "sd15"]
    return next((f for f in FAMILIES.values() if f.classname == classname), None)


def topology_name(row: ImageFamily, config: Mapping[str, Any]) -> str:
    """Return the family's name in formats.topology.

    SD3's two sizes have different names, because their last blocks differ."""
    return "sd3-large" if row.name == "sd3" and config.get("num_layers", 0) > 24 else row.name


def is_image_family(family: str) -> bool:
    """Return whether the name belongs to an image family."""
    return family.removesuffix("-large") in FAMILIES


def family_label(name: str) -> str:
    """Return the display name of a family, or the name itself if it is unknown."""
    row = FAMILIES.get(name.removesuffix("-large"))
    return f"{row.label} (large)" if row and name.endswith("-large") else row.label if row else name


def same_family(adapter: str, base: str) -> bool:
    """Return whether an adapter's and a base's families match. SD3's two sizes match."""
    return adapter.removesuffix("-large") == base.removesuffix("-large")


_BLOCK = r"re:.*(transformer_blocks|layers|\w+_refiner)\.\d+\."
_ATTENTION = r"attn\w*|attention"
_FEED_FORWARD = rf"({_ATTENTION}|ff\w*|feed_forward|img_mlp|txt_mlp|proj_mlp|proj_out)(\..*)?"
_CONV = r".*(resnets\.\d+\.conv\d|samplers\.0\.conv|\bconv_in|\bconv_out)"
TARGET_WORDS: dict[str, str] = {
    "attention": rf"{_BLOCK}({_ATTENTION})\..*",
    "attention+ff": _BLOCK + _FEED_FORWARD,
    "attention+ff+conv": f"{_BLOCK}{_FEED_FORWARD}|{_CONV}",
}
"""Shorthand for `adapter.targets` -> the denoiser modules that it selects.

`attention` selects the attention projections in the transformer blocks of a U-Net, FLUX, SD3, Qwen-Image or
Z-Image (including the refiners); `+ff` adds the feed-forward projections of these blocks; `+conv` adds the
3 × 3 convolutions of a U-Net (LoCon, arXiv 2309.14859)."""
