"""Look up a tool's module name in the tables of a family.

| text                                                             | table                                             |
| unet.… transformer.… text_encoder(_2, _3).…                      | canonical names                                   |
| (model.)diffusion_model.… and no prefix                          | the denoiser's diffusers names and original names |
| text_encoders.clip_l/clip_g/clip_h/t5xxl.transformer.…           | the text encoders, by ComfyUI's names             |
| lora_unet_… lora_unet__… lora_transformer_… lycoris_…            | both kinds of the denoiser's names, flattened     |
| double_blocks.0.img_attn.qkv.0 (OneTrainer's split)              | part 0 of the fused original                      |
| lora_te_… lora_te1_… lora_te2_… lora_te3_…                       | the text encoders' names, flattened               |
| base_model.model. before any dotted name                         | the same table as without this prefix             |
| ….attn1.processor.to_q_lora, ….self_attn.to_out_lora             | aliases, from diffusers before PEFT               |
| double_blocks.0.processor.qkv_lora1 …                            | aliases, from XLabs                               |
| single_blocks.0.linear1_qkv                                      | an alias for FLUX.1, from ComfyUI (USO)           |

For FLUX.1's T5, kohya uses lora_te3_ and OneTrainer lora_te2_. A `_` is never converted to a `.`, because
flattening is not invertible. This module uses only names.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

from veneer.formats.topology import DENOISERS, Family, ModuleTarget, families, flat, other_models

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
    """Return all families, and similar models that files are never assigned to."""
    return {**families(), **other_models()}


@cache
def _table(name: str) -> Mapping[str, tuple[ModuleTarget, ...]]:
    """Return {module text: targets}, without the prefixes that `lookup` removes."""
    family = _all()[name]
    out: dict[str, tuple[ModuleTarget, ...]] = {}
    denoiser = family.denoiser
    prefixes = {c: tuple(_encoder_prefixes(family, c)) for c in family.components if c != denoiser}
    for module in family.modules:
        component, _, local_name = module.partition(".")
        targets: tuple[ModuleTarget, ...] = (ModuleTarget(module),)
        for text in (local_name, *_legacy_attention_names(local_name)) if component == denoiser else ():
            out[text] = out[f"{denoiser}.{text}"] = targets
            for prefix in _DENOISER_FLAT:
                out[prefix + flat(text)] = targets
        if component != denoiser:
            for text in (local_name, *_legacy_attention_names(local_name)):
                out[f"{component}.{text}"] = targets
                if local_name.startswith("text_model."):  # transformers 5 removed this prefix from the class
                    out[f"{component}.{text.removeprefix('text_model.')}"] = targets
            for prefix in prefixes[component]:
                out[prefix + (flat(local_name) if prefix.endswith("_") else local_name)] = targets
    for original, targets in family.originals.items():
        for prefix in ("", f"{denoiser}."):
            out.setdefault(prefix + original, targets)
        for prefix in _DENOISER_FLAT:
            out.setdefault(prefix + flat(original), targets)
        for i, target in enumerate(targets if len(targets) > 1 else ()):
            for prefix in ("", f"{denoiser}."):
                out.setdefault(f"{prefix}{original}.{i}", (ModuleTarget(target.module),))
            for prefix in _DENOISER_FLAT:
                out.setdefault(f"{prefix}{flat(original)}_{i}", (ModuleTarget(target.module),))
    if name == "flux1":
        out.update(_xlabs(family))
    return out


def _legacy_attention_names(name: str) -> Iterator[str]:
    """Yield the names that diffusers used for an attention projection before PEFT."""
    parent, _, projection = name.removesuffix(".0").rpartition(".")
    if re.fullmatch(r"to_[qkv]|to_out|to_add_out|add_[qkv]_proj", projection):
        yield f"{parent}.processor.{projection}_lora"
        yield f"{parent}.{projection}_lora"
        yield f"{parent}.processor.{name[len(parent) + 1 :]}"
    elif parent.endswith(".self_attn"):
        yield f"{parent}.to_{projection.removesuffix('_proj')}_lora"


def _encoder_prefixes(family: Family, component: str) -> Iterator[str]:
    """Yield the prefixes that kohya, OneTrainer and ComfyUI use for a text encoder."""
    if not component.startswith("text_encoder"):
        return
    if len(family.encoders) > 1:
        yield f"lora_te{family.encoders.index(component) + 1}_"  # OneTrainer numbers FLUX.1's T5 as encoder 2
    yield family.kohya_encoder(component)
    yield f"text_encoders.{family.comfyui_encoder(component)}.transformer."


def _xlabs(family: Family) -> Iterator[tuple[str, tuple[ModuleTarget, ...]]]:
    for pattern, original in _XLABS.items():
        i = 0
        while (targets := family.originals.get(original.replace("#", str(i)))) is not None:
            yield pattern.replace("#", str(i)), targets
            i += 1
    i = 0
    while (targets := family.originals.get(f"single_blocks.{i}.linear1")) is not None:
        # These targets cover the rows of q, k and v, but not the rows of the feed-forward layer.
        qkv = tuple(ModuleTarget(target.module, (n, n + 1, 3)) for n, target in enumerate(targets[:3]))
        yield f"single_blocks.{i}.processor.qkv_lora", qkv
        yield f"single_blocks.{i}.linear1_qkv", qkv
        i += 1


def lookup(family: Family, text: str) -> tuple[ModuleTarget, ...] | None:
    """Return the targets of the module that a file calls `text`, or None if unknown."""
    table = _table(family.name)
    text = text.removeprefix("base_model.model.")
    if (targets := table.get(text)) is not None:
        return targets
    for prefix in _DENOISER_DOTTED:
        if text.startswith(prefix):
            return table.get(text.removeprefix(prefix))
    return None


def component_of(module: str) -> str:
    """Return the component that a canonical name begins with; "" for a text model's module.

    GPT-2, Falcon, MPT, Bloom and others also call their decoder `transformer`. The prefix counts as a
    component only if some family's denoiser has a module of this name, ignoring block numbers."""
    first = module.partition(".")[0]
    if first == "transformer":
        name = _kind(module)
        return first if {name, name.rpartition(".")[0]} & _transformers() else ""
    return first if first in DENOISERS or first.startswith("text_encoder") else ""


@cache
def _transformers() -> frozenset[str]:
    """Return the module names of all families' transformers, without block numbers."""
    return frozenset(_kind(m) for f in _all().values() for m in f.modules if m.startswith("transformer."))


def closest_name(family: Family | None, text: str) -> str | None:
    """Return the known module text that shares the longest prefix with `text`.

    Returns None if the shared prefix is shorter than 8 characters."""
    if family is None:
        return None
    text = text.removeprefix("base_model.model.")
    texts = texts_of(family.name)
    at = bisect_left(texts, text)
    common, best = max((_common(text, t), t) for t in texts[max(at - 1, 0) : at + 1])
    return best if common >= 8 else None


def _common(a: str, b: str) -> int:
    """Return the length of the common prefix of two names."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@cache
def texts_of(name: str) -> list[str]:
    """Return every module text of this family, without the prefixes that `lookup` removes."""
    return sorted(_table(name))


_Shape = tuple[int, int]


@dataclass(frozen=True)
class FamilyChoice:
    """The chosen family, the number of the file's names in its tables, and the reasons.

    `nearest`: if no family is chosen, the candidate families, for messages. `fitting`: the families whose
    widths and depth match. If all fitting families map the names to the same modules, the file can be read
    even though no family is chosen."""

    family: Family | None
    covered: int
    reasons: tuple[str, ...] = ()
    nearest: tuple[str, ...] = ()
    fitting: tuple[str, ...] = ()

    def lookup(self, text: str) -> tuple[ModuleTarget, ...] | None:
        """Return a module's targets in the chosen family.

        If no family is chosen, return the targets that all fitting families agree on."""
        if self.family is not None:
            return lookup(self.family, text)
        targets = {lookup(_all()[name], text) for name in self.fitting}
        return targets.pop() if len(targets) == 1 else None


_CONTEXT = {"sd15": 768, "sd2": 1024, "sdxl": 2048}
_CLIP = {"sd15": 768, "sd2": 1024, "sdxl": 768}
_HIDDEN = {
    **{"flux1": {3072}, "flux2": {3072, 4096, 6144}, "qwen-image": {3072}, "z-image": {3840}},
    **{"sd3": {1536}, "sd3-large": {2432}},
    **{"hunyuan-video": {3072}, "ltx-video": {2048}},
}
_HIDDEN_INPUTS = re.compile(
    r"^transformer\..*(blocks|layers|refiner)\.\d+\.((attn\d?|attention)\.(to_[qkv]|add_[qkv]_proj)|"
    r"ff(_context)?\.net\.0\.proj|feed_forward\.w[13])$"
)
"""Pattern of the modules whose input is a transformer's hidden states."""
_TOY = 512
"""Minimum width of a real model; smaller widths indicate a toy model."""

_OTHER_DEPTHS = {
    "flux1": {"transformer_blocks": {8}},
    "flux2": {"transformer_blocks": {5}, "single_transformer_blocks": {20, 24}},
}
"""Depths of the smaller models of a family: FLUX.1 lite, FLUX.2 klein."""


def choose_family(
    shapes: Mapping[str, _Shape | None], claim: str | None = None, target_family: str | None = None
) -> FamilyChoice:
    """Return the family of a file's modules.

    shapes: module text -> (out, in) of its weight, or None if unknown.
    claim: the family in the metadata.
    target_family: the family of the target base.

    A family is chosen only if it has at least half of the names and no known width or depth contradicts it.
    If several families have the names, the first of these criteria that leaves a single family decides:
    matching shapes and depth, the metadata, the base. Otherwise no family is chosen, and the result lists the
    nearest families. A toy model (its widths are smaller than any real model's) is assigned to the family
    with the largest share of its modules in the file, else to the more common family."""
    matches = {
        name: {text: targets for text in shapes if (targets := lookup(family, text)) is not None}
        for name, family in _all().items()
    }
    most = max(len(f) for f in matches.values())
    if not most:
        return FamilyChoice(
            None, 0, (f"unknown family; shapes: {_shapes_text(shapes)}",) if has_image_names(shapes) else ()
        )
    tied = [name for name, f in matches.items() if len(f) == most]
    kinds = {_kind(text.removeprefix("base_model.model.")) for text in shapes}
    alike = {name: len(kinds & _kinds(name)) for name in _all()}
    selected = [name for name in tied if alike[name] == max(alike.values())] or tied
    alternatives = [name for name in _all() if alike[name] == max(alike.values()) and name not in selected]
    reasons = [f"{most} of {len(shapes)} module names are {_all()[selected[0]].label}'s"]
    toy = all(max(shape) < _TOY for shape in shapes.values() if shape)
    wide = {text: shape for text, shape in shapes.items() if shape and shape[1] >= _TOY}
    possible = [n for n in selected if _fits(n, matches[n], wide, shapes)]
    if not wide and not possible:  # a toy model's proportions can favor a family, but cannot rule one out
        possible = [n for n in selected if _fits(n, matches[n], {}, dict.fromkeys(shapes))]
    if len(selected) + len(alternatives) > 1 or not possible:
        fit = [n for n in possible if _depth(_all()[n], matches[n].values())]
        reasons = [f"{most} of {len(shapes)} module names match each of {', '.join([*selected, *alternatives])}"]
        coverage = {n: _share(_all()[n], matches[n].values()) for n in selected}
        fullest = [n for n in fit if toy and coverage[n] == max(coverage[f] for f in fit) >= 0.5]
        for why, keep in (
            ("by its shapes and depth", fit),
            ("by its metadata", _claimed(fit or possible, claim)),
            ("by its base", [n for n in fit or possible if n == target_family]),
            ("toy model, by its share of the modules", fullest),
            ("toy model, the more common family", (fullest or fit or possible)[:1] if toy else []),
        ):
            if len(keep) == 1 and keep[0] in families():
                selected = keep
                reasons.append(f"{why}: {keep[0]}")
                break
        else:
            candidates = tuple(fit or possible or selected)
            message = f"unknown family; shapes: {_shapes_text(shapes)}; near: " + ", ".join(candidates)
            return FamilyChoice(None, most, (*reasons, message), candidates, tuple(fit or possible))
    family = _all()[selected[0]]
    if claim and claim != family.name and not family.name.startswith(f"{claim}-"):
        reasons.append(f"the metadata says {claim}, but the tensors do not match it")
    return FamilyChoice(family, most, tuple(reasons))


def _claimed(names: Sequence[str], claim: str | None) -> list[str]:
    """Return the families that the claim in the metadata can mean.

    A claim of SD3 can also mean SD3.5 Large."""
    return [n for n in names if n == claim] or [n for n in names if claim == "sd3" and n == "sd3-large"]


@lru_cache(maxsize=1 << 16)
def _kind(text: str) -> str:
    return re.sub(r"\d+", "#", text)


@cache
def _kinds(name: str) -> frozenset[str]:
    """Return a family's module texts without block numbers."""
    # One call of `sub`, because a call for each of 10,000 names is slow.
    texts = set(re.sub(r"\d+", "#", "\n".join(_table(name))).split("\n"))
    denoiser_texts = {t for t in texts if not t.startswith(_DENOISER_FLAT)}
    return frozenset(texts | {prefix + t for prefix in _DENOISER_DOTTED for t in denoiser_texts})


def has_image_names(texts: Iterable[str]) -> bool:
    """Return whether any name has an image model's prefix or a diffusers projection name."""
    parts = r"(unet|transformer(?!\.h\.)|text_encoder(_\d)?|diffusion_model)\..*|lora_(unet|te\d?|transformer)_.*"
    ours = re.compile(rf"{parts}|.*\.(to_[qkv]|add_[qkv]_proj)")
    return any(ours.fullmatch(text) for text in texts)


def _shapes_text(shapes: Mapping[str, _Shape | None], most: int = 4) -> str:
    """Summarize the names for messages: each kind with its count and a weight shape."""
    by: dict[str, list[_Shape | None]] = defaultdict(list)
    for text, shape in shapes.items():
        by[_kind(text)].append(shape)
    counts = [
        f"{len(shapes_of_kind)} {kind} {next((s for s in shapes_of_kind if s), '')}".strip()
        for kind, shapes_of_kind in sorted(by.items())
    ]
    return ", ".join(counts[:most]) + (f" and {len(counts) - most} more kinds" if len(counts) > most else "")


def _share(family: Family, matches: Collection[tuple[ModuleTarget, ...]]) -> float:
    """Return the share of the family's modules that the file has.

    Counts only kinds that occur in the file. A kind is a name without block numbers."""
    have = {target.module for targets in matches for target in targets}
    kinds = {_kind(module) for module in have}
    return len(have) / sum(_kind(module) in kinds for module in family.modules)


def _fits(
    name: str,
    matches: Mapping[str, tuple[ModuleTarget, ...]],
    wide: Mapping[str, _Shape | None],
    shapes: Mapping[str, _Shape | None],
) -> bool:
    """Return whether the family has half of the names and fits the shapes and depth.

    wide: the subset of `shapes` whose widths are compared."""
    if 2 * len(matches) < len(shapes) or _has_extra_block(name, matches, shapes):
        return False
    width_checks = [_width(name, targets[0].module, wide.get(text)) for text, targets in matches.items()]
    widths = [ok for ok in width_checks if ok is not None]
    ratios = [ok for text, shape in shapes.items() if (ok := _ratio(name, text, shape)) is not None]
    is_complete = all(_has_equal_thirds(targets, wide.get(text)) for text, targets in matches.items())
    return is_complete and all(widths) and (not ratios or any(ratios))


def _has_extra_block(name: str, matches: Mapping[str, tuple[ModuleTarget, ...]], shapes: Iterable[str]) -> bool:
    """Return whether the file has the block that would follow the family's last block."""
    family = _all()[name]
    return family.denoiser != "unet" and any(
        lookup(family, f"{text[: at.start()]}{int(at[0]) - 1}{text[at.end() :]}") is not None
        for text in shapes
        if text not in matches
        for at in re.finditer(r"(?<=[._])[1-9]\d{0,5}(?=[._])", text)
    )


def _has_equal_thirds(targets: Sequence[ModuleTarget], shape: _Shape | None) -> bool:
    """Return whether a fused qkv projection has three times as many outputs as inputs.

    This holds for every family in this module. Lumina 2 has fewer key and value heads, so its fused rows are
    not three equal parts."""
    fused = [target.part for target in targets if target.part is not None and target.part[2] == 3]
    return len(fused) < 3 or shape is None or shape[0] == 3 * shape[1]


def _width(name: str, module: str, shape: _Shape | None) -> bool | None:
    """Return whether a weight has the official model's number of inputs; None if unknown."""
    if shape is None:
        return None
    if re.search(r"^unet\..*\.attn2\.to_[kv]$", module):
        return shape[1] == _CONTEXT.get(name)
    if re.search(r"^text_encoder\..*\.self_attn\.._proj$", module) and name in _CLIP:
        return shape[1] == _CLIP[name]
    if _HIDDEN_INPUTS.search(module):
        return name in _HIDDEN and shape[1] in _HIDDEN[name]
    return None


_PROPORTIONS = {
    "flux1": {"linear1": (7, 1), "linear2": (1, 5), "mlp.0": (4, 1), "mlp.2": (1, 4)},
    "flux2": {"linear1": (9, 1), "linear2": (1, 4), "mlp.0": (6, 1), "mlp.2": (1, 3)},
}
"""Output-to-input ratios of the modules that have BFL's names in both FLUX families."""


def _ratio(name: str, text: str, shape: _Shape | None) -> bool | None:
    """Return whether a weight has the family's output-to-input ratio; None if unknown."""
    match = re.search(r"(linear[12]|mlp[._][02])$", text)
    want = _PROPORTIONS.get(name, {}).get(match[1].replace("_", ".")) if match else None
    return None if want is None or shape is None else shape[0] * want[1] == shape[1] * want[0]


def _depth(family: Family, matches: Iterable[tuple[ModuleTarget, ...]]) -> bool:
    """Return whether the number of blocks in the file matches the family's depth.

    Only sequences of blocks that start at 0 without gaps are compared; other subsets fit any family."""
    ours = _family_blocks(family.name)
    for group, have in _blocks(p.module for targets in matches for p in targets).items():
        count = len(ours.get(group, ()))
        depths = {count, *_OTHER_DEPTHS.get(family.name, {}).get(group.partition(".")[2], ())}
        if len(have) > 1 and have == set(range(len(have))) and len(have) not in depths:
            return False
    return True


@cache
def _family_blocks(name: str) -> dict[str, set[int]]:
    return _blocks(_all()[name].modules)


def _blocks(modules: Iterable[str]) -> dict[str, set[int]]:
    """Return {name up to the first number: block numbers}; U-Nets are left out."""
    out: dict[str, set[int]] = defaultdict(set)
    for module in modules:
        if not module.startswith("unet.") and (match := re.match(r"(.+?)\.(\d+)\.", module)):
            out[match[1]].add(int(match[2]))
    return out
