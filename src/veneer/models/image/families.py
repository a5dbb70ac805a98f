"""The image families as diffusers runs them: the denoiser's class, the pipelines, what reads a prompt.

| family     | denoiser class                               | prompt read by                             | predicts   |
| sd15, sd2  | UNet2DConditionModel                         | CLIP                                       | noise or v |
| sdxl       | UNet2DConditionModel with added time ids     | two CLIPs                                  | noise or v |
| sd3        | SD3Transformer2DModel (3, 3.5 medium, large) | two CLIPs, T5 (which may be left out)      | flow       |
| flux1      | FluxTransformer2DModel (dev, schnell)        | T5; CLIP gives one pooled vector           | flow       |
| flux2      | Flux2Transformer2DModel (dev, klein)         | Mistral (dev), Qwen3 (klein), as chat      | flow       |
| qwen-image | QwenImageTransformer2DModel (and Edit, Plus) | Qwen2.5-VL, as chat                        | flow       |
| z-image    | ZImageTransformer2DModel (base, Turbo)       | Qwen3, as chat                             | flow       |

Names are those of `formats.topology`. One row a family: what a base is known by, and what it is. Knows
class names alone; imports neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from veneer.models.config import PLANNED_DENOISERS


@dataclass(frozen=True)
class ImageFamily:
    """One family.

    `pipelines` and `controlled`: kind -> diffusers class, without and with ControlNets; diffusers has no others. `edit`
    is told of reference pictures; a base whose index names such a pipeline has it too (`OWN_PIPELINES`).
    `encoders`: the text encoders that adapters of this family change. `readers`: the tokenizers whose tokens the
    denoiser attends to, and how many of each at most; `schnell`: of that the first, in the family's models that take no
    guidance, which were distilled to few steps. `template`: what is put around a prompt: the pipeline's own, or the
    tokenizer's chat, with thinking or without. `patch`: latents per side that become one token; `patched`: the VAE's
    are patches already; `packed`: the pipeline makes them; `frames`: the VAE is one of films. `apart`: the denoiser
    takes each text and each picture by itself. `distilled`: guidance is an input of the denoiser; `guidance`: the
    pipeline's argument for it; `unguided`: where it does nothing; `true_guidance`: the pipeline has one beside the
    distilled. `time_ids`: the denoiser reads sizes. `editors`: pipelines of the family's models that edit (`EDITING`).
    `shifted`: the pipeline shifts the schedule by the picture's size; `unfit`: schedulers that it cannot run.
    `controlnets`: kind of control picture -> the usual ControlNet on the hub. `settings`: arguments of the pipelines'
    constructors; `encoding`: of their encode_prompt, where `pooled` and `mask` stand in what it returns."""

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
    apart: bool = False
    flow: bool = True
    distilled: bool = False
    guidance: str = "guidance_scale"
    unguided: float = 1.0
    true_guidance: bool = False
    time_ids: bool = False
    editors: tuple[str, ...] = ()
    shifted: bool = False
    unfit: tuple[str, ...] = ()
    controlnets: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    encoding: Mapping[str, Any] = field(default_factory=dict)
    pooled: int | None = None
    mask: int | None = None

    @property
    def refers(self) -> bool:
        """Whether the denoiser tells reference pictures apart by their positions; a base may not have learned to."""
        return bool(self.editors)


def _kinds(stem: str, image: str = "Img2Img", inpaint: str = "Inpaint") -> dict[str, str]:
    """Classes by kind of names like StableDiffusion…Pipeline; those with an empty infix are left out."""
    given = {"text": "", "image": image, "inpaint": inpaint}
    return {kind: f"{stem}{infix}Pipeline" for kind, infix in given.items() if infix or kind == "text"}


_ONE_PROMPT = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1}


def _stable(name: str, label: str, controlnets: Mapping[str, str] | None = None) -> ImageFamily:
    stem = "StableDiffusion"
    return ImageFamily(
        name,
        label,
        "unet",
        "UNet2DConditionModel",
        _kinds(stem),
        _kinds(f"{stem}ControlNet"),
        "ControlNetModel",
        encoders=("text_encoder",),
        flow=False,
        controlnets=controlnets or {},
        settings={"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        encoding=_ONE_PROMPT,
    )


FAMILIES: Mapping[str, ImageFamily] = {
    f.name: f
    for f in [
        _stable(
            "sd15",
            "Stable Diffusion 1.x",
            {"canny": "lllyasviel/control_v11p_sd15_canny", "depth": "lllyasviel/control_v11f1p_sd15_depth"},
        ),
        _stable("sd2", "Stable Diffusion 2.x"),
        ImageFamily(
            "sdxl",
            "SDXL",
            "unet",
            "UNet2DConditionModel",
            _kinds("StableDiffusionXL"),
            _kinds("StableDiffusionXLControlNet"),
            "ControlNetModel",
            encoders=("text_encoder", "text_encoder_2"),
            flow=False,
            controlnets={
                "canny": "diffusers/controlnet-canny-sdxl-1.0",
                "depth": "diffusers/controlnet-depth-sdxl-1.0",
            },
            settings={"add_watermarker": False},
            encoding=_ONE_PROMPT,
            pooled=2,
            time_ids=True,
        ),
        ImageFamily(
            "sd3",
            "Stable Diffusion 3",
            "transformer",
            "SD3Transformer2DModel",
            _kinds("StableDiffusion3"),
            {"text": "StableDiffusion3ControlNetPipeline", "inpaint": "StableDiffusion3ControlNetInpaintingPipeline"},
            "SD3ControlNetModel",
            encoders=("text_encoder", "text_encoder_2", "text_encoder_3"),
            readers={"tokenizer_3": 256, "tokenizer": 77},
            patch=2,
            encoding={**_ONE_PROMPT, "prompt_2": None, "prompt_3": None},
            pooled=2,
            controlnets={"canny": "InstantX/SD3-Controlnet-Canny", "depth": "InstantX/SD3-Controlnet-Depth"},
        ),
        ImageFamily(
            "flux1",
            "FLUX.1",
            "transformer",
            "FluxTransformer2DModel",
            _kinds("Flux"),
            _kinds("FluxControlNet"),
            "FluxControlNetModel",
            encoders=("text_encoder", "text_encoder_2"),
            readers={"tokenizer_2": 512},
            schnell=256,  # black-forest-labs/flux, t5_embedder
            patch=2,
            packed=True,
            encoding={"prompt_2": None},
            pooled=1,
            distilled=True,
            true_guidance=True,
            editors=("FluxKontextPipeline",),
            shifted=True,
            controlnets={
                "canny": "InstantX/FLUX.1-dev-Controlnet-Canny",
                "depth": "Shakker-Labs/FLUX.1-dev-ControlNet-Depth",
            },
        ),
        ImageFamily(
            "flux2",
            "FLUX.2",
            "transformer",
            "Flux2Transformer2DModel",
            {"text": "Flux2Pipeline", "edit": "Flux2Pipeline"},
            readers={"tokenizer": 512},
            template="chat",
            patch=2,
            patched=True,
            distilled=True,
            editors=("Flux2Pipeline", "Flux2KleinPipeline"),
            shifted=True,
        ),
        ImageFamily(
            "qwen-image",
            "Qwen-Image",
            "transformer",
            "QwenImageTransformer2DModel",
            _kinds("QwenImage"),
            {"text": "QwenImageControlNetPipeline", "inpaint": "QwenImageControlNetInpaintPipeline"},
            "QwenImageControlNetModel",
            readers={"tokenizer": 1024},
            template="pipeline",
            patch=2,
            packed=True,
            frames=True,
            guidance="true_cfg_scale",
            mask=1,
            editors=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
            shifted=True,
        ),
        ImageFamily(
            "z-image",
            "Z-Image",
            "transformer",
            "ZImageTransformer2DModel",
            _kinds("ZImage"),
            readers={"tokenizer": 512},
            template="thinking",
            patch=2,
            apart=True,
            unguided=0.0,  # pos + g·(pos − neg), where the others have neg + g·(pos − neg)
            encoding={"do_classifier_free_guidance": False},
            shifted=True,
            unfit=("flow-unipc",),  # the pipeline's sigmas are a list, which UniPC multiplies
        ),
    ]
}


PLANNED_FAMILIES: Mapping[str, ImageFamily] = {
    PLANNED_DENOISERS[f.classname]: f for f in FAMILIES.values() if f.classname in PLANNED_DENOISERS
}
"""What the plan's table calls a denoiser -> its family; of U-Nets SDXL's, the last."""

OWN_PIPELINES: Mapping[str, Mapping[str, str]] = {
    "Flux2KleinPipeline": {
        "text": "Flux2KleinPipeline",
        "edit": "Flux2KleinPipeline",
        "inpaint": "Flux2KleinInpaintPipeline",
    },
    "FluxKontextPipeline": {"edit": "FluxKontextPipeline"},
    "QwenImageEditPipeline": {"edit": "QwenImageEditPipeline"},
    "QwenImageEditPlusPipeline": {"edit": "QwenImageEditPlusPipeline"},
}
"""What a base's index calls its pipeline -> the kinds in which the base differs from its family."""


@dataclass(frozen=True)
class Editing:
    """How a pipeline edits. `references`: the most pictures that its models were trained with, by their cards.

    `read`: where prompts are read together with the references, about how many pixels a reference has there, and
    `encoded`: where its latents are made. Both are the pipeline's, whatever is drawn; 0: it is shown as it is.
    `guided`: its models take guidance as an input. `least`: pixels of a reference's shorter side."""

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
"""The class of every pipeline of kind `edit` -> how it does."""


def denoiser_family(classname: str, config: Mapping[str, Any]) -> ImageFamily | None:
    """The family of a denoiser by its class and config; None for an unknown one.

    SDXL's U-Net is known by its added time ids. SD 2's and SD 1's are the same class: SD 2 has linear projections."""
    if classname == "UNet2DConditionModel":
        if config.get("addition_embed_type") == "text_time":
            return FAMILIES["sdxl"]
        if config.get("addition_embed_type") or config.get("encoder_hid_dim_type"):
            return None  # Kandinsky, DeepFloyd
        return FAMILIES["sd2" if config.get("use_linear_projection") else "sd15"]
    return next((f for f in FAMILIES.values() if f.classname == classname), None)


def topology_name(row: ImageFamily, config: Mapping[str, Any]) -> str:
    """The family as formats.topology calls it, which distinguishes SD3's two sizes: their last blocks differ."""
    return "sd3-large" if row.name == "sd3" and config.get("num_layers", 0) > 24 else row.name


def is_image_family(family: str) -> bool:
    """Whether the family of a base is an image family."""
    return family.removesuffix("-large") in FAMILIES


def family_label(name: str) -> str:
    """The usual name of a family, for messages; an unknown family's own name."""
    row = FAMILIES.get(name.removesuffix("-large"))
    return f"{row.label} (large)" if row and name.endswith("-large") else row.label if row else name


def same_family(adapter: str, base: str) -> bool:
    """Whether an adapter of one family may belong to a base of another name: SD3's two sizes are one row here."""
    return adapter.removesuffix("-large") == base.removesuffix("-large")
