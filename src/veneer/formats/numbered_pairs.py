"""Read cloneofsimo's files: numbered pairs and learned words.

    unet:0:up  unet:0:down  text_encoder:0:up  <word>

The numbers count the modules as diffusers 0.11 and older registered them: down, up, then middle; in a
transformer block attn1, then the feed-forward's first projection, then attn2 (later versions: the
feed-forward last); in an attention q, k, v, out; in CLIP's attention k, v, q, out. The order comes from the
topology and must fit the shapes: each level has one width, in the U-Net's ratios, and the feed-forward's out
is eight times its in. CLIP's four projections have one shape, so only their count can be checked. s = 1.
Source: the repository cloneofsimo/lora and its files. Uses names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from veneer.errors import AdapterError, bullets
from veneer.formats.metadata import json_value
from veneer.formats.topology import Family, families

TOKEN_EMBEDDING = "text_encoder.text_model.embeddings.token_embedding"
_KEY = re.compile(r"(unet|text_encoder):(\d{1,6}):(up|down)")
_ATTENTION = {"CrossAttention", "Attention"}
_RESNET = ("conv1", "time_emb_proj", "conv2", "conv_shortcut")


def is_list(keys: Mapping[str, Tensor]) -> bool:
    return any(_KEY.fullmatch(key) for key in keys)


def list_words(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the learned words of a list file: word -> its vectors (n, dim)."""
    found = {}
    for key, tensor in tensors.items():
        named = metadata.get(key) == "<embed>" or re.fullmatch(r"<[^<>:]+>", key)
        if named and tensor.ndim in (1, 2) and tensor.is_floating_point():
            found[key] = tensor.reshape(-1, tensor.shape[-1])
    return found


def list_modules(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, where: str) -> dict[str, str]:
    """Return `unet:0` -> canonical module, for every number in the file.

    Raises AdapterError if no order fits the shapes, with the first misfit of the best order."""
    shapes: dict[str, dict[int, tuple[int, int]]] = {"unet": {}, "text_encoder": {}}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match and match[3] == "up" and (down := tensors.get(f"{match[1]}:{match[2]}:down")) is not None:
            if tensor.ndim < 2 or down.ndim < 2:
                raise AdapterError(f"{key} {tuple(tensor.shape)}: a matrix is expected", where=where)
            shapes[match[1]][int(match[2])] = (tensor.shape[0], down.shape[1])
    out = {}
    for component, own in shapes.items():
        if sorted(own) != list(range(len(own))):
            raise AdapterError(f"the numbers of {component} have gaps: {_ranges(sorted(own))}", where=where)
        if own:
            order = _order(component, [own[i] for i in range(len(own))], metadata, where)
            out.update({f"{component}:{i}": name for i, name in enumerate(order)})
    return out


def _ranges(numbers: Sequence[int]) -> str:
    return f"{len(numbers)} of them, from {numbers[0]} to {numbers[-1]}"


def _order(component: str, shapes: Sequence[tuple[int, int]], metadata: Mapping[str, str], where: str) -> list[str]:
    problems = []
    for name in ("sd15", "sd2"):
        for label, order in _orders(families()[name], component, metadata, where):
            if len(order) != len(shapes):
                problems.append(f"{label} has {len(order)} modules, the file {len(shapes)}")
            elif misfit := _misfit(order, shapes):
                problems.append(f"{label}: {misfit}")
            else:
                return order
    raise AdapterError(
        f"no order of {component}'s modules fits the file:\n{bullets(dict.fromkeys(problems), None)}", where=where
    )


def _orders(family: Family, component: str, metadata: Mapping[str, str], where: str) -> list[tuple[str, list[str]]]:
    if component == "text_encoder":
        layers = sum(name.endswith(".self_attn.k_proj") for name in family.modules)
        names = [
            f"text_encoder.text_model.encoder.layers.{i}.self_attn.{p}_proj"
            for i in range(layers)
            for p in ("k", "v", "q", "out")
        ]
        return [(f"{family.label}, attention", names)]
    classes = _classes(metadata, where)
    out = []
    for wanted in (
        [classes] if classes else [_ATTENTION | {"GEGLU"}, _ATTENTION, _ATTENTION | {"GEGLU", "ResnetBlock2D"}]
    ):
        for age, parts in (("0.11", ("attn1", "ff", "attn2")), ("later", ("attn1", "attn2", "ff"))):
            label = f"{family.label}, {' and '.join(sorted(wanted))}, diffusers {age}"
            out.append((label, list(_unet_order(family, wanted, parts))))
    return out


def _classes(metadata: Mapping[str, str], where: str) -> set[str]:
    """Return the classes whose linears (and convolutions) were trained, if stated."""
    named = json_value(metadata, "unet") if "unet" in metadata else []
    if not isinstance(named, list) or not all(isinstance(n, str) for n in named):
        raise AdapterError(
            f"unet = {metadata['unet'][:80]!r}: a list of classes is expected", where=f"{where}, metadata"
        )
    if unknown := sorted(set(named) - _ATTENTION - {"GEGLU", "ResnetBlock2D"}):
        raise AdapterError(f"unet trains {', '.join(unknown)}, whose order is not known", where=f"{where}, metadata")
    return set(named)


def _unet_order(family: Family, wanted: set[str], parts: Sequence[str]) -> list[str]:
    """Return the wanted classes' linears and convolutions in registration order.

    Attentions come before resnets in each block."""
    blocks: dict[str, None] = {}
    for name in family.modules:
        if match := re.match(r"unet\.((?:down|up)_blocks\.\d+|mid_block)\.", name):
            blocks[match[1]] = None
    found: list[str] = []
    for block in sorted(blocks, key=lambda b: ("down", "up_b", "mid_").index(b[:4])):
        own = [n for n in family.modules if n.startswith(f"unet.{block}.")]
        for attention in _stems(own, r"(.*\.attentions\.\d+\.transformer_blocks\.\d+)\.attn1\.to_q"):
            for part in parts:
                if part == "ff":
                    found += [f"{attention}.ff.net.0.proj"] if "GEGLU" in wanted else []
                elif wanted & _ATTENTION:
                    found += [f"{attention}.{part}.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")]
        if "ResnetBlock2D" in wanted:
            for resnet in _stems(own, r"(.*\.resnets\.\d+)\.conv1"):
                found += [name for p in _RESNET if (name := f"{resnet}.{p}") in family.modules]
    return found


def _stems(names: Sequence[str], pattern: str) -> list[str]:
    return [match[1] for name in names if (match := re.fullmatch(pattern, name))]


def _misfit(order: Sequence[str], shapes: Sequence[tuple[int, int]]) -> str | None:
    """Return the first number whose shape does not fit its name, or None."""
    if order[0].startswith("text_encoder"):
        odd = next((i for i, s in enumerate(shapes) if s != (shapes[0][0],) * 2), None)
        return None if odd is None else f"{order[odd]} would be {shapes[odd]}"
    by_name = dict(zip(order, shapes, strict=True))
    unit = next((s[1] for n, s in by_name.items() if n.endswith("attn1.to_q") and "down_blocks.0" in n), None)
    context = next((s[1] for n, s in by_name.items() if n.endswith("attn2.to_k")), None)
    for name, (out, into) in by_name.items():
        width = _level(name) * (unit or 0)
        want = (8 * width, width) if ".ff." in name else (width, width)
        want = (width, into) if ".resnets." in name else want
        want = (width, context or 0) if name.endswith(("attn2.to_k", "attn2.to_v")) else want
        if unit and (out, into) != want:
            return f"{name} would be {(out, into)}, expected {want}"
    return None


def _level(name: str) -> int:
    """Return a block's channels in units of the first level's (SD 1 and 2)."""
    match = re.match(r"unet\.(down|up)_blocks\.(\d)\.", name)
    if match is None:
        return 4
    return (1, 2, 4, 4)[int(match[2]) if match[1] == "down" else 3 - int(match[2])]
