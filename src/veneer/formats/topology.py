"""The image families: every module of each component under diffusers' and transformers' own names, and where the
modules of the original code (LDM, sgm, BFL, …) land among them.

| family     | components                                                | original names                            |
| sd15       | unet, text_encoder (CLIP-L)                               | LDM                                       |
| sd2        | unet, text_encoder (OpenCLIP-H)                           | LDM                                       |
| sdxl       | unet, text_encoder (CLIP-L), text_encoder_2 (OpenCLIP-G)  | sgm                                       |
| sd3        | transformer (3 and 3.5 medium), text_encoder, _2, _3 (T5) | joint_blocks                              |
| sd3-large  | transformer (3.5 large), text_encoder, _2, _3 (T5)        | joint_blocks                              |
| flux1      | transformer (dev, schnell), text_encoder, _2 (T5)         | BFL                                       |
| flux2      | transformer (dev; klein has fewer blocks of the same)     | BFL                                       |
| qwen-image | transformer                                               | the same                                  |
| z-image    | transformer                                               | fused qkv                                 |
| krea2      | transformer                                               | krea-ai/krea-2                            |
| anima      | transformer (Cosmos Predict 2), text_conditioner          | blocks, llm_adapter                       |

Canonical name = component + "." + the name in the class. SD3's two sizes are two families: their last blocks differ,
and so does where the last context modulation lands. Counts are the official ones, widths appear nowhere: a file of any
width reads the same. Sources: diffusers' and transformers' classes and diffusers' checkpoint converters, against which
the tests hold every name. Knows names; no tensors, no files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from types import MappingProxyType

from veneer.formats import topology_dit as dit
from veneer.formats.topology_rows import Part, Row, clip, t5
from veneer.formats.topology_unet import unet

__all__ = ["DENOISERS", "Family", "Place", "families", "flat", "strangers"]

DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Place:
    """Where (a part of) a foreign module lands: rows [begin, end) of `total` in equal units, None for all; with `swap`
    the two halves of the rows change places."""

    module: str
    part: Part | None = None
    swap: bool = False


@dataclass(frozen=True)
class Family:
    """`modules`: canonical name -> linear, conv, embedding or norm. `originals`: the original name of each module of
    the denoiser, without a prefix -> where it lands."""

    name: str
    label: str
    modules: Mapping[str, str]
    originals: Mapping[str, tuple[Place, ...]]

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.partition(".")[0] for name in self.modules))

    @property
    def denoiser(self) -> str:
        return next(c for c in self.components if c in DENOISERS)


def flat(name: str) -> str:
    """Dots to underscores, as kohya's keys have module names. It cannot be undone without a table."""
    return name.replace(".", "_")


@cache
def families() -> Mapping[str, Family]:
    """All of them by name, made once; the more common first."""
    l_g_t5 = [*clip("text_encoder", 12, True), *clip("text_encoder_2", 32, True), *t5("text_encoder_3", 24)]
    made = [
        _family(
            "sd15",
            "Stable Diffusion 1.x",
            unet((1, 1, 1, 0), (1, 2, 4, 4), "conv", False),
            clip("text_encoder", 12, False),
        ),
        _family(
            "sdxl",
            "Stable Diffusion XL",
            unet((0, 2, 10), (1, 2, 4), "linear", True),
            clip("text_encoder", 12, False),
            clip("text_encoder_2", 32, True),
        ),
        _family("flux1", "FLUX.1", dit.flux1(19, 38, True), clip("text_encoder", 12, False), t5("text_encoder_2", 24)),
        _family("flux2", "FLUX.2", dit.flux2(8, 48, True)),
        _family("qwen-image", "Qwen-Image", dit.qwen_image(60)),
        _family("z-image", "Z-Image", dit.z_image(30, 2)),
        _family("krea2", "Krea 2", dit.krea2(28, 2, 2)),
        _family("anima", "Anima", dit.anima(28, 6)),
        _family("sd3", "Stable Diffusion 3 and 3.5 medium", dit.sd3(24, range(13)), l_g_t5),
        _family("sd3-large", "Stable Diffusion 3.5 large", dit.sd3(38, ()), l_g_t5),
        _family(
            "sd2",
            "Stable Diffusion 2.x",
            unet((1, 1, 1, 0), (1, 2, 4, 4), "linear", False),
            clip("text_encoder", 23, False),
        ),
    ]
    return MappingProxyType({family.name: family for family in made})


@cache
def strangers() -> Mapping[str, Family]:
    """Models whose names in diffusers are some family's too, and whose adapters are not read as that family's."""
    made = [
        _family("hunyuan-video", "Hunyuan Video", dit.attention_blocks(20, 40, joint=True)),
        _family("ltx-video", "LTX Video", dit.attention_blocks(28, 0, joint=False)),
    ]
    return MappingProxyType({family.name: family for family in made})


def _family(name: str, label: str, *components: Iterable[Row]) -> Family:
    modules: dict[str, str] = {}
    originals: dict[str, list[Place]] = defaultdict(list)
    for row in chain(*components):
        modules[row.module] = row.kind
        component, _, own = row.module.partition(".")
        if component in DENOISERS or row.original:
            originals[row.original or own].append(Place(row.module, row.part, row.swap))
    return Family(
        name,
        label,
        MappingProxyType(modules),
        MappingProxyType({key: tuple(places) for key, places in originals.items()}),
    )
