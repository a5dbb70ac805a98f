"""What a tool's name of a module means in a family: a look-up in tables made of the topology's names.

| text                                                             | table                                             |
| unet.… transformer.… text_encoder(_2, _3).…                      | canonical names                                   |
| (model.)diffusion_model.… and no prefix                          | the denoiser's own names and its original ones    |
| text_encoders.clip_l/clip_g/clip_h/t5xxl.transformer.…           | the text encoders, as ComfyUI calls them          |
| lora_unet_… lora_transformer_… lycoris_…                         | the denoiser's names of both kinds, flattened     |
| lora_te_… lora_te1_… lora_te2_… lora_te3_…                       | the text encoders' names, flattened               |
| base_model.model. in front of any dotted one                     | the same                                          |
| ….attn1.processor.to_q_lora, ….self_attn.to_out_lora             | aliases, of diffusers before PEFT                 |
| double_blocks.0.processor.qkv_lora1 …                            | aliases, of XLabs                                 |

lora_te3_ is T5 where kohya trains FLUX.1, lora_te2_ where OneTrainer does. No `_` is ever turned into a `.`: flattening
cannot be undone. Knows names; no tensors.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from veneer.formats.topology import DENOISERS, Family, Place, families, flat

__all__ = ["Choice", "choose_family", "component_of", "lookup", "near"]

_DENOISER_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")
_DENOISER_DOTTED = ("model.diffusion_model.", "diffusion_model.")
_XLABS = {
    **{f"double_blocks.#.processor.qkv_lora{n}": f"double_blocks.#.{s}_attn.qkv" for n, s in ((1, "img"), (2, "txt"))},
    **{
        f"double_blocks.#.processor.proj_lora{n}": f"double_blocks.#.{s}_attn.proj" for n, s in ((1, "img"), (2, "txt"))
    },
    "single_blocks.#.processor.proj_lora": "single_blocks.#.linear2",
}


@cache
def _table(name: str) -> Mapping[str, tuple[Place, ...]]:
    """Every text without the prefixes that `lookup` takes off -> where it lands."""
    family = families()[name]
    out: dict[str, tuple[Place, ...]] = {}
    denoiser = family.denoiser
    prefixes = {c: tuple(_encoder_prefixes(family, c)) for c in family.components if c != denoiser}
    for module in family.modules:
        component, _, own = module.partition(".")
        places: tuple[Place, ...] = (Place(module),)
        for text in (own, *_old(own)) if component == denoiser else ():
            out[text] = out[f"{denoiser}.{text}"] = places
            for prefix in _DENOISER_FLAT:
                out[prefix + flat(text)] = places
        if component != denoiser:
            for text in (own, *_old(own)):
                out[f"{component}.{text}"] = places
                if own.startswith("text_model."):  # transformers 5 has dropped it from the class
                    out[f"{component}.{text.removeprefix('text_model.')}"] = places
            for prefix in prefixes[component]:
                out[prefix + (flat(own) if prefix.endswith("_") else own)] = places
    for original, places in family.originals.items():
        for prefix in ("", f"{denoiser}."):
            out.setdefault(prefix + original, places)
        for prefix in _DENOISER_FLAT:
            out.setdefault(prefix + flat(original), places)
    if name == "flux1":
        out.update(_xlabs(family))
    return out


def _old(name: str) -> Iterator[str]:
    """What diffusers called an attention's projection before it had PEFT."""
    parent, _, leaf = name.removesuffix(".0").rpartition(".")
    if re.fullmatch(r"to_[qkv]|to_out|to_add_out|add_[qkv]_proj", leaf):
        yield f"{parent}.processor.{leaf}_lora"
        yield f"{parent}.{leaf}_lora"
        yield f"{parent}.processor.{name[len(parent) + 1 :]}"
    elif parent.endswith(".self_attn"):
        yield f"{parent}.to_{leaf.removesuffix('_proj')}_lora"


def _encoder_prefixes(family: Family, component: str) -> Iterator[str]:
    """The flat prefixes kohya and OneTrainer give a text encoder, and ComfyUI's dotted one."""
    encoders = [c for c in family.components if c != family.denoiser]
    if len(encoders) == 1:
        yield "lora_te_"
    else:
        yield f"lora_te{encoders.index(component) + 1}_"
    if family.name == "flux1" and component == "text_encoder_2":
        yield "lora_te3_"
    is_t5 = f"{component}.shared" in family.modules
    first = "clip_h" if family.name == "sd2" else "clip_l"
    comfy = "t5xxl" if is_t5 else "clip_g" if component == "text_encoder_2" else first
    yield f"text_encoders.{comfy}.transformer."


def _xlabs(family: Family) -> Iterator[tuple[str, tuple[Place, ...]]]:
    for pattern, original in _XLABS.items():
        i = 0
        while (found := family.originals.get(original.replace("#", str(i)))) is not None:
            yield pattern.replace("#", str(i)), found
            i += 1
    i = 0
    while (found := family.originals.get(f"single_blocks.{i}.linear1")) is not None:
        # XLabs' pair is of q, k and v alone, without the feed-forward's rows.
        qkv = tuple(Place(place.module, (n, n + 1, 3)) for n, place in enumerate(found[:3]))
        yield f"single_blocks.{i}.processor.qkv_lora", qkv
        i += 1


def lookup(family: Family, text: str) -> tuple[Place, ...] | None:
    """Where the module that a file calls `text` lands, or None."""
    table = _table(family.name)
    text = text.removeprefix("base_model.model.")
    if (found := table.get(text)) is not None:
        return found
    for prefix in _DENOISER_DOTTED:
        if text.startswith(prefix):
            return table.get(text.removeprefix(prefix))
    return None


def component_of(module: str) -> str:
    """The part of the pipeline that a canonical name (of a module, or of its parameter) begins with; "" for a text
    adapter's bare name.

    GPT-2, Falcon, MPT, Bloom and others call their decoder `transformer` as well: that is a component only where some
    family's denoiser has such a module, whatever its block's number."""
    first = module.partition(".")[0]
    if first == "transformer":
        name = _numberless(module)
        return first if {name, name.rpartition(".")[0]} & _transformers() else ""
    return first if first in DENOISERS or first.startswith("text_encoder") else ""


def _numberless(module: str) -> str:
    return re.sub(r"\d+", "#", module)


@cache
def _transformers() -> frozenset[str]:
    """The modules of every family's transformer, without the numbers of their blocks."""
    return frozenset(_numberless(m) for f in families().values() for m in f.modules if m.startswith("transformer."))


def near(family: Family | None, text: str) -> str | None:
    """The known text that has the longest start in common with it, of 8 letters at least."""
    if family is None:
        return None
    text = text.removeprefix("base_model.model.")
    known = _sorted(family.name)
    at = bisect_left(known, text)
    common, best = max((_common(text, t), t) for t in known[max(at - 1, 0) : at + 1])
    return best if common >= 8 else None


def _common(a: str, b: str) -> int:
    """Letters that both start with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@cache
def _sorted(name: str) -> list[str]:
    return sorted(_table(name))


Shape = tuple[int, int]


@dataclass(frozen=True)
class Choice:
    """The family whose tables cover the most names, how many, and why it and no other that covers as many."""

    family: Family | None
    covered: int
    reasons: tuple[str, ...] = ()


_CONTEXT = {"sd15": 768, "sd2": 1024, "sdxl": 2048}
_HIDDEN = {"flux1": {3072}, "flux2": {3072, 4096, 6144}, "qwen-image": {3072}, "sd3": {1536}, "sd3-large": {2432}}


def choose_family(shapes: Mapping[str, Shape | None], claim: str | None = None, wanted: str | None = None) -> Choice:
    """`shapes`: module text -> (out, in) of its weight where known. `claim`: what the metadata says. `wanted`: the
    family of the base that the adapter is to act on.

    Most names covered; then, of those that cover as many, the families whose proportions are the file's, whose official
    widths are, the one the metadata claims, the one that is wanted, the one whose like modules the file fills most and
    at least half, and the most common. Shapes only decide between names that are alike: an unusual width excludes
    nothing."""
    found = {
        name: {text: places for text in shapes if (places := lookup(family, text)) is not None}
        for name, family in families().items()
    }
    most = max(len(f) for f in found.values())
    if not most:
        return Choice(None, 0)
    tied = [name for name, f in found.items() if len(f) == most]
    reasons = [f"{most} of {len(shapes)} module names are {families()[tied[0]].label}'s"]
    if len(tied) > 1:
        reasons = [f"{most} of {len(shapes)} module names are known to {', '.join(tied)} alike"]
        shares = {n: _share(families()[n], found[n].values()) for n in tied}
        for why, keep in (
            ("by its proportions", [n for n in tied if _proportions(n, shapes)]),
            ("by its widths", [n for n in tied if _widths(n, found[n], shapes)]),
            ("by its metadata", [n for n in tied if n == claim or (claim == "sd3" and n == "sd3-large")]),
            ("by its base", [n for n in tied if n == wanted]),
            ("by its share of the like modules", [n for n in tied if shares[n] == max(shares.values()) >= 0.5]),
        ):
            keep = [n for n in keep if n in tied]
            if keep and len(keep) < len(tied):
                tied = keep
                reasons.append(f"{why}: {', '.join(tied)}")
        if len(tied) > 1:
            reasons.append(f"still a tie of {', '.join(tied)}: {tied[0]} is the more common")
    family = families()[tied[0]]
    if claim and claim != family.name and not family.name.startswith(f"{claim}-"):
        reasons.append(f"the metadata says {claim}, the tensors do not")
    return Choice(family, most, tuple(reasons))


_PROPORTIONS = {
    "flux1": {"linear1": (7, 1), "linear2": (1, 5), "mlp.0": (4, 1), "mlp.2": (1, 4)},
    "flux2": {"linear1": (9, 1), "linear2": (1, 4), "mlp.0": (6, 1), "mlp.2": (1, 3)},
}
"""out : in of the modules that have BFL's names in both families."""


def _proportions(name: str, shapes: Mapping[str, Shape | None]) -> bool:
    for text, shape in shapes.items():
        match = re.search(r"(linear[12]|mlp[._][02])$", text)
        want = _PROPORTIONS.get(name, {}).get(match[1].replace("_", ".")) if match else None
        if want and shape and shape[0] * want[1] == shape[1] * want[0]:
            return True
    return False


def _widths(name: str, found: Mapping[str, tuple[Place, ...]], shapes: Mapping[str, Shape | None]) -> bool:
    """Whether some known width is the official model's."""
    for text, places in found.items():
        module, shape = places[0].module, shapes[text]
        if shape and re.search(r"^unet\..*\.attn2\.to_[kv]$", module) and shape[1] == _CONTEXT.get(name):
            return True
        if shape and re.search(r"^transformer\..*\.attn\.to_[qkv]$", module) and shape[1] in _HIDDEN.get(name, ()):
            return True
    return False


def _share(family: Family, found: Collection[tuple[Place, ...]]) -> float:
    """Of the family's modules that have the file's names but for their numbers, how many the file has."""
    have = {place.module for places in found for place in places}
    kinds = {re.sub(r"\d+", "#", module) for module in have}
    return len(have) / sum(re.sub(r"\d+", "#", module) in kinds for module in family.modules)
