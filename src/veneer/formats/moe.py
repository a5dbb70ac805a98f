"""Convert mixture-of-experts layouts to PEFT's names and to fused expert weights.

| layout of a module X = ….experts                                          | written by                              |
| X.N.gate_proj.lora_A (r, in), X.N.gate_proj.lora_B (out, r)               | transformers 4, Megatron, Tinker        |
| X.gate_proj.lora_A (E or 1, r, in), X.gate_proj.lora_B (E or 1, out, r)   | Megatron Bridge, Tinker                 |
| X.gate_proj.lora_A (1, r, in) with X.N.gate_proj.lora_B (out, r)          | Megatron Bridge ("shared outer")        |

In Mixtral, gate_proj, up_proj and down_proj are called w1, w3 and w2. On a base with fused experts,

    gate_up_proj[e] = [gate_e; up_e]      A = [A_gate; A_up], B = diag(B_gate, B_up); one A if A_gate = A_up

gpt-oss interleaves the rows as gate_0, up_0, gate_1, up_1, …; its module has `is_concatenated = False`. If
all scales of an adapter are equal, no value is rounded. Often a base's model class fuses the experts, but the
base's files store them separately; to merge into such files, `as_stored` splits fused pairs again. This
module works on names, pairs and a base's structure, and does not access files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from veneer.core.adapter import Pair
from veneer.errors import AdapterError, counted
from veneer.formats.structure import Structure

if TYPE_CHECKING:
    from torch import Tensor

_PROJECTION = "gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3"
_ONE = re.compile(rf"(?P<module>.+\.experts)\.(?P<index>\d{{1,6}})\.(?P<projection>{_PROJECTION})")
_PACKED = re.compile(rf"(?P<module>.+\.experts)\.(?P<projection>{_PROJECTION})\.lora_(?P<half>[AB])\.weight")
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def unpacked(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """Split packed expert tensors into one 2-d view per expert.

    Returns (tensors, notes, problems). Tensors of other layouts do not change."""
    out, problems = dict(tensors), []
    try:
        _unpack(out)
    except AdapterError as error:
        problems.append(f"experts packed in three dimensions: {error.what}")
    count = len(set(tensors) - set(out))
    layout = "experts packed in three dimensions"
    notes = [f"{count} tensors store {layout}; they are read as one pair per expert"] if count else []
    return out, notes, problems


def _unpack(tensors: dict[str, Tensor]) -> None:
    halves: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if (match := _PACKED.fullmatch(key)) and tensor.ndim == 3:
            halves[match["module"], match["projection"]][match["half"]] = tensor
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for key in tensors if halves else ():
        if match := _ONE.match(key):
            numbers[match["module"], match["projection"]].add(int(match["index"]))
    for (module, projection), tensors_by_half in halves.items():
        shapes = ", ".join(f"{half} {tuple(t.shape)}" for half, t in sorted(tensors_by_half.items()))
        indices = numbers.get((module, projection), set())
        count = max([len(t) for t in tensors_by_half.values()] + [i + 1 for i in indices])
        alone = count == 1 and not indices
        if (
            alone
            or any(len(t) not in (1, count) for t in tensors_by_half.values())
            or (len(tensors_by_half) == 2 and indices)
        ):
            raise AdapterError(f"{module}.{projection}: the number of experts is unknown: {shapes}")
        for half, tensor in tensors_by_half.items():
            for e in range(count):
                tensors[f"{module}.{e}.{projection}.lora_{half}.weight"] = tensor[0 if len(tensor) == 1 else e]
            del tensors[f"{module}.{projection}.lora_{half}.weight"]


def fuse(pairs: Mapping[str, Pair], base: Structure) -> tuple[dict[str, Pair], list[str], list[str]]:
    """Convert pairs of single experts to pairs of the base's fused parameters.

    Returns (pairs, notes, problems). If the base has a module per expert, pairs do not change. Without a
    base, pairs are fused if the file's own names are those of fused projections (gate_up_proj)."""
    experts: dict[str, dict[str, dict[int, Pair]]] = defaultdict(lambda: defaultdict(dict))
    names: dict[str, list[str]] = defaultdict(list)
    for name, pair in pairs.items():
        if (match := _ONE.fullmatch(name)) and pair.kind == "linear" and name not in base.kinds:
            experts[match["module"]][_MIXTRAL.get(match["projection"], match["projection"])][int(match["index"])] = pair
            names[match["module"]].append(name)
    out, problems, count = dict(pairs), [], 0
    for module, projections in experts.items():
        parameters = base.experts.get(module, ())
        if not base.detailed and "gate_up_proj" in projections:
            parameters = ("gate_up_proj", "down_proj")
        if not parameters:
            continue
        try:
            fused = _module(module, projections, parameters, base)
        except AdapterError as error:
            problems.append(f"{module}: {error.what}")
            continue
        count += len(names[module])
        for name in names[module]:
            del out[name]
        out |= {f"{module}.{parameter}": pair for parameter, pair in fused.items()}
    unfused = sum(bool(_ONE.fullmatch(name)) for name in out) if not base.kinds else 0
    notes = [f"{counted(count, 'pair')} of single experts converted to fused expert weights"] if count else []
    if unfused:
        notes.append(f"{counted(unfused, 'pair')} of single experts: they are fused if the base fuses its experts")
    return out, notes, problems


def _module(
    module: str, projections: Mapping[str, Mapping[int, Pair]], parameters: Sequence[str], base: Structure
) -> dict[str, Pair]:
    """Return the fused pairs of one module, by parameter."""
    if dora := [
        projection for projection, pairs in projections.items() if any(p.magnitude is not None for p in pairs.values())
    ]:
        raise AdapterError(f"DoRA on single experts ({', '.join(dora)}): fused expert weights do not support DoRA")
    out: dict[str, Pair] = {}
    sources = {projection: [projection] for projection in projections if projection in parameters}
    if "gate_up_proj" in parameters and (halves := [h for h in ("gate_proj", "up_proj") if h in projections]):
        if "gate_up_proj" in projections:
            raise AdapterError(f"pairs for gate_up_proj and for {' and '.join(halves)} at once")
        sources["gate_up_proj"] = ["gate_proj", "up_proj"]
    if homeless := sorted(set(projections) - {projection for names in sources.values() for projection in names}):
        raise AdapterError(f"the base has {', '.join(parameters)}, but no parameter for {', '.join(homeless)}")
    for parameter, parts in sources.items():
        stored = base.shapes.get(f"{module}.{parameter}")
        indices = {i for projection in parts for i in projections.get(projection, {})}
        experts = stored[0] if stored else max(indices) + 1
        if max(indices) >= experts or (stored is None and len(indices) < experts):
            raise AdapterError(f"pairs of experts {min(indices)} to {max(indices)}, but there are {experts} experts")
        experts_parts = [[projections.get(projection, {}).get(e) for projection in parts] for e in range(experts)]
        pair = _stacked(experts_parts, interleaved=module in base.interleaved and len(parts) > 1)
        if stored is not None and _is_reversed(module, parameters, base):
            pair = Pair(pair.B.transpose(1, 2).contiguous(), pair.A.transpose(1, 2).contiguous(), pair.scale, "experts")
        out[parameter] = pair
    return out


_TRANSPOSED = {"gpt_oss", "openai_privacy_filter", "aria", "aria_text"}
"""Model types that store experts as (experts, in, out); their modules set `is_transposed`."""


def as_stored(
    pairs: Mapping[str, Pair], find: Callable[[str], str | None], model_types: Collection[str]
) -> dict[str, Pair]:
    """Return equivalent pairs in the layout of a base's files.

    find: parameter name -> the stored name, or None.
    model_types: the model types of the base and of its text model.

    If the files store experts separately, the pair of a fused expert parameter is split into linear pairs,
    one per expert and projection: gate_up_proj[e] = [gate_e; up_e]. A router in Mixtral's layout gets the
    name used in the files. Other pairs do not change. Raises AdapterError if the files have more experts than
    a pair."""
    out: dict[str, Pair] = {}
    for name, pair in pairs.items():
        old = name.replace(".mlp.", ".block_sparse_moe.")
        if pair.kind != "experts":
            renamed = old if find(f"{name}.weight") is None and find(f"{old}.weight") is not None else name
            out[renamed] = pair
        elif find(name) is not None:
            flip = not _TRANSPOSED.isdisjoint(model_types)
            out[name] = replace(pair, A=pair.B.transpose(1, 2), B=pair.A.transpose(1, 2)) if flip else pair
        else:
            out |= _split_experts(name, pair, find) or _split_experts(old, pair, find) or {name: pair}
    return out


def _split_experts(name: str, pair: Pair, find: Callable[[str], str | None]) -> dict[str, Pair]:
    """Split a fused pair into linear pairs, one per expert and projection of the files.

    Returns {} if the files do not store experts separately."""
    module, _, parameter = name.rpartition(".")
    projections = {"gate_up_proj": ("gate_proj", "up_proj")}.get(parameter, (parameter,))
    for names in (
        projections,
        [new for projection in projections for new, kind in _MIXTRAL.items() if kind == projection],
    ):
        first = find(f"{module}.0.{names[0]}.weight") if names else None
        if first is None or pair.B.shape[1] % len(names):
            continue
        start = first.removesuffix(f"0.{names[0]}.weight")
        if find(f"{start}{len(pair.A)}.{names[0]}.weight") is not None:
            raise AdapterError(f"{name}: a pair of {len(pair.A)} experts, but the base has more")
        halves = pair.B.chunk(len(names), dim=1)
        return {
            f"{start}{e}.{projection}": Pair(pair.A[e], half[e], pair.scale)
            for e in range(len(pair.A))
            for projection, half in zip(names, halves, strict=True)
        }
    return {}


def _stacked(experts_parts: Sequence[Sequence[Pair | None]], *, interleaved: bool) -> Pair:
    """Return one fused pair, joined from the pairs of single experts.

    experts_parts: for each expert, one pair per part of the rows, or None for an unchanged part."""
    import torch

    have = [p for pairs in experts_parts for p in pairs if p is not None]
    scale = max((p.scale for p in have), key=abs)
    folded = any(p.scale != scale for p in have)
    dtype = have[0].B.dtype
    for t in [t for p in have for t in (p.A, p.B)]:
        dtype = torch.promote_types(dtype, t.dtype)
    if folded and dtype != torch.float64:
        dtype = torch.float32
    sizes = {(p.B.shape[0], p.A.shape[1]) for p in have}
    if len(sizes) > 1:
        raise AdapterError(f"pairs of different shapes (out, in): {', '.join(map(str, sorted(sizes)))}")
    (rows, into), parts = sizes.pop(), len(experts_parts[0])
    shared = parts > 1 and all(_have_same_A(pairs) for pairs in experts_parts)
    ranks = [[p.rank if p is not None else 0 for p in pairs] for pairs in experts_parts]
    rank = max(row[0] if shared else sum(row) for row in ranks)
    A = torch.zeros(len(experts_parts), rank, into, dtype=dtype)
    B = torch.zeros(len(experts_parts), parts * rows, rank, dtype=dtype)
    for e, pairs in enumerate(experts_parts):
        at = 0
        for part, pair in enumerate(pairs):
            if pair is None:
                continue
            to = slice(part, None, parts) if interleaved else slice(part * rows, (part + 1) * rows)
            A[e, at : at + pair.rank] = pair.A
            B[e, to, at : at + pair.rank] = pair.B if pair.scale == scale else pair.B.double() * (pair.scale / scale)
            at += 0 if shared else pair.rank
    return Pair(A, B, scale, "experts")


def _have_same_A(pairs: Sequence[Pair | None]) -> bool:
    """Return whether every part has a pair and all these pairs have the same A."""
    As = [p.A for p in pairs if p is not None]
    return len(As) == len(pairs) and all(A.shape == As[0].shape and A.equal(As[0]) for A in As[1:])


def _is_reversed(module: str, parameters: Sequence[str], base: Structure) -> bool:
    """Return whether the base stores (experts, in, out) without `is_transposed`.

    Llama 4 does. Detected by the widths of gate_up_proj and down_proj: (2·inner, hidden) and (hidden, inner),
    or the reverse."""
    if module in base.transposed or not {"gate_up_proj", "down_proj"} <= set(parameters):
        return False
    _, a, b = base.shapes[f"{module}.gate_up_proj"]
    _, c, d = base.shapes[f"{module}.down_proj"]
    return a == d and b == 2 * c
