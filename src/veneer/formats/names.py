"""What a tool's name of a module means in a family: a look-up in tables made of the topology's names.

| text                                                             | table                                             |
| unet.… transformer.… text_encoder(_2, _3).…                      | canonical names                                   |
| (model.)diffusion_model.… and no prefix                          | the denoiser's own names and its original ones    |
| text_encoders.clip_l/clip_g/clip_h/t5xxl.transformer.…           | the text encoders, as ComfyUI calls them          |
| lora_unet_… lora_unet__… lora_transformer_… lycoris_…            | the denoiser's names of both kinds, flattened     |
| double_blocks.0.img_attn.qkv.0 (OneTrainer's split)              | part 0 of the fused original                      |
| lora_te_… lora_te1_… lora_te2_… lora_te3_…                       | the text encoders' names, flattened               |
| base_model.model. in front of any dotted one                     | the same                                          |
| ….attn1.processor.to_q_lora, ….self_attn.to_out_lora             | aliases, of diffusers before PEFT                 |
| double_blocks.0.processor.qkv_lora1 …                            | aliases, of XLabs                                 |
| single_blocks.0.linear1_qkv                                      | an alias of FLUX.1, of ComfyUI (USO)              |
| sformer_blocks.0.…                                               | an alias of FLUX.2, of files cut by diffusers     |

lora_te3_ is T5 where kohya trains FLUX.1, lora_te2_ where OneTrainer does. No `_` is ever turned into a `.`: flattening
cannot be undone. Knows names; no tensors.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from veneer.formats.topology import DENOISERS, Family, ModulePlace, families, flat, strangers

_DENOISER_FLAT = ("lora_unet_", "lora_unet__", "lora_transformer_", "lycoris_")
_DENOISER_DOTTED = ("model.diffusion_model.", "diffusion_model.")
_XLABS = {
    **{f"double_blocks.#.processor.qkv_lora{n}": f"double_blocks.#.{s}_attn.qkv" for n, s in ((1, "img"), (2, "txt"))},
    **{
        f"double_blocks.#.processor.proj_lora{n}": f"double_blocks.#.{s}_attn.proj" for n, s in ((1, "img"), (2, "txt"))
    },
    "single_blocks.#.processor.proj_lora": "single_blocks.#.linear2",
}


def _all() -> Mapping[str, Family]:
    """The families, and those whose names are like theirs and are never claimed."""
    return {**families(), **strangers()}


@cache
def _table(name: str) -> Mapping[str, tuple[ModulePlace, ...]]:
    """Every text without the prefixes that `lookup` takes off -> where it lands."""
    family = _all()[name]
    out: dict[str, tuple[ModulePlace, ...]] = {}
    denoiser = family.denoiser
    prefixes = {c: tuple(_encoder_prefixes(family, c)) for c in family.components if c != denoiser}
    for module in family.modules:
        component, _, own = module.partition(".")
        places: tuple[ModulePlace, ...] = (ModulePlace(module),)
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
        for i, place in enumerate(places if len(places) > 1 else ()):
            for prefix in ("", f"{denoiser}."):
                out.setdefault(f"{prefix}{original}.{i}", (ModulePlace(place.module),))
            for prefix in _DENOISER_FLAT:
                out.setdefault(f"{prefix}{flat(original)}_{i}", (ModulePlace(place.module),))
    if name == "flux1":
        out.update(_xlabs(family))
    if name == "flux2":
        out.update({_cut(text): places for text, places in out.items() if text.startswith("transformer_blocks.")})
    return out


def _cut(text: str) -> str:
    """The name of a double block as some files of FLUX.2 have it, whose writer took off too long a prefix."""
    return text.replace("transformer_blocks.", "sformer_blocks.", 1)


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
    if not component.startswith("text_encoder"):
        return
    if len(family.encoders) > 1:
        yield f"lora_te{family.encoders.index(component) + 1}_"  # OneTrainer's of FLUX.1's T5 is the second
    yield family.kohya_encoder(component)
    yield f"text_encoders.{family.comfyui_encoder(component)}.transformer."


def _xlabs(family: Family) -> Iterator[tuple[str, tuple[ModulePlace, ...]]]:
    for pattern, original in _XLABS.items():
        i = 0
        while (found := family.originals.get(original.replace("#", str(i)))) is not None:
            yield pattern.replace("#", str(i)), found
            i += 1
    i = 0
    while (found := family.originals.get(f"single_blocks.{i}.linear1")) is not None:
        # These pairs are of q, k and v alone, without the feed-forward's rows.
        qkv = tuple(ModulePlace(place.module, (n, n + 1, 3)) for n, place in enumerate(found[:3]))
        yield f"single_blocks.{i}.processor.qkv_lora", qkv
        yield f"single_blocks.{i}.linear1_qkv", qkv
        i += 1


def lookup(family: Family, text: str) -> tuple[ModulePlace, ...] | None:
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
        name = _kind(module)
        return first if {name, name.rpartition(".")[0]} & _transformers() else ""
    return first if first in DENOISERS or first.startswith(("text_encoder", "text_conditioner")) else ""


@cache
def _transformers() -> frozenset[str]:
    """The modules of every family's transformer, without the numbers of their blocks."""
    return frozenset(_kind(m) for f in _all().values() for m in f.modules if m.startswith("transformer."))


def near(family: Family | None, text: str) -> str | None:
    """The known text that has the longest start in common with it, of 8 letters at least."""
    if family is None:
        return None
    text = text.removeprefix("base_model.model.")
    known = texts_of(family.name)
    at = bisect_left(known, text)
    common, best = max((_common(text, t), t) for t in known[max(at - 1, 0) : at + 1])
    return best if common >= 8 else None


def _common(a: str, b: str) -> int:
    """Letters that both start with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@cache
def texts_of(name: str) -> list[str]:
    """Every text that a file may have for a module of this family, without the prefixes that `lookup` takes off."""
    return sorted(_table(name))


_Shape = tuple[int, int]


@dataclass(frozen=True)
class FamilyChoice:
    """The family that is claimed, how many of the names its tables cover, and why it and no other.

    `near`: where none is claimed, the families that have these names, for messages alone. `fitting`: those of them
    whose widths and depth fit too, but that nothing tells apart; where all of these mean the same modules by the names,
    the names can be read all the same."""

    family: Family | None
    covered: int
    reasons: tuple[str, ...] = ()
    near: tuple[str, ...] = ()
    fitting: tuple[str, ...] = ()

    def lookup(self, text: str) -> tuple[ModulePlace, ...] | None:
        """Where a module lands: in the family; with none, where all that fit agree."""
        if self.family is not None:
            return lookup(self.family, text)
        found = {lookup(_all()[name], text) for name in self.fitting}
        return found.pop() if len(found) == 1 else None


_CONTEXT = {"sd15": 768, "sd2": 1024, "sdxl": 2048}
_CLIP = {"sd15": 768, "sd2": 1024, "sdxl": 768}
_HIDDEN = {
    **{"flux1": {3072}, "flux2": {3072, 4096, 6144}, "qwen-image": {3072}, "z-image": {3840}, "krea2": {6144}},
    **{"sd3": {1536}, "sd3-large": {2432}, "anima": {2048}},
    **{"hunyuan-video": {3072}, "ltx-video": {2048}},
}
_TEXT_FUSION = 2560
"""The width of Krea 2's text_fusion blocks, which the other blocks do not share."""
_CROSS = {"anima": 1024, "ltx-video": 2048}
_HIDDEN_INPUTS = re.compile(
    r"^transformer\..*(blocks|layers|refiner)\.\d+\.((attn\d?|attention)\.(to_[qkv]|add_[qkv]_proj)|"
    r"ff(_context)?\.net\.0\.proj|feed_forward\.w[13])$"
)
"""Modules whose inputs are a transformer's hidden states."""
_TOY = 512
"""Widths that no real model is below."""

_OTHER_DEPTHS = {
    "flux1": {"transformer_blocks": {8}},
    "flux2": {"transformer_blocks": {5}, "single_transformer_blocks": {20, 24}},
}
"""Of smaller models of the same family: FLUX.1 lite, FLUX.2 klein."""


def choose_family(
    shapes: Mapping[str, _Shape | None], claim: str | None = None, wanted: str | None = None
) -> FamilyChoice:
    """`shapes`: module text -> (out, in) of its weight where known. `claim`: what the metadata says. `wanted`: the
    family of the base that the adapter is to act on.

    A family is claimed only if at least half of the names are its own and nothing known of its widths and depth speaks
    against it. Names that several have are of the one family whose shapes and depth alone are the file's; else of the
    one that the metadata claims, or the base is; else no family is claimed, and the result says which are near. A toy,
    whose widths are no model's, is of the family that it fills most, or the more common one."""
    found = {
        name: {text: places for text in shapes if (places := lookup(family, text)) is not None}
        for name, family in _all().items()
    }
    most = max(len(f) for f in found.values())
    if not most:
        return FamilyChoice(
            None, 0, (f"unknown family, of these shapes: {_shown(shapes)}",) if has_image_names(shapes) else ()
        )
    tied = [name for name, f in found.items() if len(f) == most]
    kinds = {_kind(text.removeprefix("base_model.model.")) for text in shapes}
    alike = {name: len(kinds & _kinds(name)) for name in _all()}
    known = [name for name in tied if alike[name] == max(alike.values())] or tied
    others = [name for name in _all() if alike[name] == max(alike.values()) and name not in known]
    reasons = [f"{most} of {len(shapes)} module names are {_all()[known[0]].label}'s"]
    toy = all(max(shape) < _TOY for shape in shapes.values() if shape)
    wide = {text: shape for text, shape in shapes.items() if shape and shape[1] >= _TOY}
    possible = [n for n in known if _fits(n, found[n], wide, shapes)]
    if not wide and not possible:  # a toy's proportions tell families apart, and speak against none
        possible = [n for n in known if _fits(n, found[n], {}, dict.fromkeys(shapes))]
    if len(known) + len(others) > 1 or not possible:
        fit = [n for n in possible if _depth(_all()[n], found[n].values())]
        reasons = [f"{most} of {len(shapes)} module names are known to {', '.join([*known, *others])} alike"]
        shares = {n: _share(_all()[n], found[n].values()) for n in known}
        fullest = [n for n in fit if toy and shares[n] == max(shares[f] for f in fit) >= 0.5]
        for why, keep in (
            ("by its shapes and depth", fit),
            ("by its metadata", _claimed(fit or possible, claim)),
            ("by its base", [n for n in fit or possible if n == wanted]),
            ("a toy, by its share of the like modules", fullest),
            ("a toy, and the more common", (fullest or fit or possible)[:1] if toy else []),
        ):
            if len(keep) == 1 and keep[0] in families():
                known = keep
                reasons.append(f"{why}: {keep[0]}")
                break
        else:
            near = tuple(fit or possible or known)
            said = f"unknown family, of these shapes: {_shown(shapes)}; near: " + ", ".join(near)
            return FamilyChoice(None, most, (*reasons, said), near, tuple(fit or possible))
    family = _all()[known[0]]
    if claim and claim != family.name and not family.name.startswith(f"{claim}-"):
        reasons.append(f"the metadata says {claim}, the tensors do not")
    return FamilyChoice(family, most, tuple(reasons))


def _claimed(names: Sequence[str], claim: str | None) -> list[str]:
    """The family that metadata name; those of SD3.5 Large say SD3 too."""
    return [n for n in names if n == claim] or [n for n in names if claim == "sd3" and n == "sd3-large"]


@lru_cache(maxsize=1 << 16)
def _kind(text: str) -> str:
    return re.sub(r"\d+", "#", text)


@cache
def _kinds(name: str) -> frozenset[str]:
    """The texts of a family without their numbers."""
    texts = {_kind(text) for text in _table(name)}
    own = {t for t in texts if not t.startswith(_DENOISER_FLAT)}
    return frozenset(texts | {prefix + t for prefix in _DENOISER_DOTTED for t in own})


def has_image_names(texts: Iterable[str]) -> bool:
    """Whether names have the prefixes of an image model's parts, or call projections as diffusers does."""
    parts = r"(unet|transformer(?!\.h\.)|text_encoder(_\d)?|diffusion_model)\..*|lora_(unet|te\d?|transformer)_.*"
    ours = re.compile(rf"{parts}|(unet|text_encoder):\d+|.*\.(to_[qkv]|add_[qkv]_proj)")
    return any(ours.fullmatch(text) for text in texts)


def _shown(shapes: Mapping[str, _Shape | None], most: int = 4) -> str:
    """Each kind of name with its weights' shapes, and how many there are."""
    by: dict[str, list[_Shape | None]] = defaultdict(list)
    for text, shape in shapes.items():
        by[_kind(text)].append(shape)
    told = [f"{len(own)} {kind} {next((s for s in own if s), '')}".strip() for kind, own in sorted(by.items())]
    return ", ".join(told[:most]) + (f" and {len(told) - most} kinds more" if len(told) > most else "")


def _share(family: Family, found: Collection[tuple[ModulePlace, ...]]) -> float:
    """Of the family's modules that have the file's names but for their numbers, how many the file has."""
    have = {place.module for places in found for place in places}
    kinds = {_kind(module) for module in have}
    return len(have) / sum(_kind(module) in kinds for module in family.modules)


def _fits(
    name: str,
    found: Mapping[str, tuple[ModulePlace, ...]],
    wide: Mapping[str, _Shape | None],
    shapes: Mapping[str, _Shape | None],
) -> bool:
    """Whether at least half of the names are the family's, and nothing known of its shapes speaks against it, nor more
    blocks than it has. `wide`: those of `shapes` whose widths count."""
    if 2 * len(found) < len(shapes) or _deeper(name, found, shapes):
        return False
    known = [_width(name, places[0].module, wide.get(text)) for text, places in found.items()]
    widths = [ok for ok in known if ok is not None]
    ratios = [ok for text, shape in shapes.items() if (ok := _ratio(name, text, shape)) is not None]
    whole = all(_is_thirds(places, wide.get(text)) for text, places in found.items())
    return whole and all(widths) and (not ratios or any(ratios))


def _deeper(name: str, found: Mapping[str, tuple[ModulePlace, ...]], shapes: Iterable[str]) -> bool:
    """Whether a name is the family's but for the number of its block, which is the one after the family's last."""
    family = _all()[name]
    return family.denoiser != "unet" and any(
        lookup(family, f"{text[: at.start()]}{int(at[0]) - 1}{text[at.end() :]}") is not None
        for text in shapes
        if text not in found
        for at in re.finditer(r"(?<=[._])[1-9]\d{0,5}(?=[._])", text)
    )


def _is_thirds(places: Sequence[ModulePlace], shape: _Shape | None) -> bool:
    """Whether a fused q, k and v has three times as many outputs as inputs, as in every family here; Lumina 2 has
    fewer heads of keys and values, and its rows are no equal thirds."""
    fused = [place.part for place in places if place.part is not None and place.part[2] == 3]
    return len(fused) < 3 or shape is None or shape[0] == 3 * shape[1]


def _width(name: str, module: str, shape: _Shape | None) -> bool | None:
    """Whether a weight's inputs are as many as the official model's; None where they are not known."""
    if shape is None:
        return None
    if re.search(r"^unet\..*\.attn2\.to_[kv]$", module):
        return shape[1] == _CONTEXT.get(name)
    if re.search(r"^text_encoder\..*\.self_attn\.._proj$", module) and name in _CLIP:
        return shape[1] == _CLIP[name]
    if name in _CROSS and re.search(r"^transformer\..*\.attn2\.to_[kv]$", module):
        return shape[1] == _CROSS[name]
    if _HIDDEN_INPUTS.search(module):
        if module.startswith("transformer.text_fusion."):
            return shape[1] == _TEXT_FUSION
        return name in _HIDDEN and shape[1] in _HIDDEN[name]
    return None


_PROPORTIONS = {
    "flux1": {"linear1": (7, 1), "linear2": (1, 5), "mlp.0": (4, 1), "mlp.2": (1, 4)},
    "flux2": {"linear1": (9, 1), "linear2": (1, 4), "mlp.0": (6, 1), "mlp.2": (1, 3)},
}
"""out : in of the modules that have BFL's names in both families."""


def _ratio(name: str, text: str, shape: _Shape | None) -> bool | None:
    """Whether a weight's proportions are the family's; None where they are not known."""
    match = re.search(r"(linear[12]|mlp[._][02])$", text)
    want = _PROPORTIONS.get(name, {}).get(match[1].replace("_", ".")) if match else None
    return None if want is None or shape is None else shape[0] * want[1] == shape[1] * want[0]


def _depth(family: Family, found: Iterable[tuple[ModulePlace, ...]]) -> bool:
    """Whether every run of blocks from the first one on is as long as the family's. Some blocks alone are any's."""
    ours = _family_blocks(family.name)
    for group, have in _blocks(p.module for places in found for p in places).items():
        count = len(ours.get(group, ()))
        depths = {count, *_OTHER_DEPTHS.get(family.name, {}).get(group.partition(".")[2], ())}
        if len(have) > 1 and have == set(range(len(have))) and len(have) not in depths:
            return False
    return True


@cache
def _family_blocks(name: str) -> dict[str, set[int]]:
    return _blocks(_all()[name].modules)


def _blocks(modules: Iterable[str]) -> dict[str, set[int]]:
    """Name up to the first number, of what is no U-Net -> the numbers."""
    out: dict[str, set[int]] = defaultdict(set)
    for module in modules:
        if not module.startswith("unet.") and (match := re.match(r"(.+?)\.(\d+)\.", module)):
            out[match[1]].add(int(match[2]))
    return out
