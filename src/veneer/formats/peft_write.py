"""Writing a PEFT folder that PEFT, and veneer, read back with the same effect. See formats/peft.py for the layout.

The configuration is the smallest that PEFT's rules of matching resolve to exactly these modules, ranks and scales. What
is written is interpreted again before a byte reaches the disk, and the folder appears whole or not at all.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from veneer.core.adapter import Adapter, Pair, alpha_of, scale_of
from veneer.errors import AdapterError
from veneer.files.atomic import put_folder
from veneer.files.safetensors import encode_tensors
from veneer.formats import card as cards
from veneer.formats.peft_bias import bias_problems, bias_switch, bias_tensors
from veneer.formats.peft_config import CONFIG_FILE, DUMMY_TARGETS, RANK_MAJOR, TENSOR_FILE, unsloth_marks
from veneer.formats.peft_experts import EXPERT_ORDER
from veneer.formats.peft_read import PREFIX, Base, interpret
from veneer.formats.structure import Structure, describe
from veneer.formats.tensors import check_finite

__all__ = ["Written", "encode", "write"]

LAYOUT = "0.21.2"
"""The PEFT whose layout of expert weights is written; readers need it where a parameter is square."""


@dataclass(frozen=True)
class Written:
    """What was written: the adapter's digest as anyone reading the folder gets it, the sha256 of each file, and notes
    on what the format could not carry."""

    folder: Path
    digest: str
    files: dict[str, str]
    notes: list[str] = field(default_factory=list)


@dataclass
class _Encoded:
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    adapter: Adapter
    """As read back."""
    notes: list[str]


def write(
    adapter: Adapter,
    folder: str | Path,
    *,
    base_name: str = "",
    base: Base = None,
    task_type: str | None = "auto",
    digest: str | None = None,
) -> Written:
    """Write `adapter` to `folder` as PEFT's two files, the card `veneer.json` and a model card `README.md`.

    `base`: the model or its outline; with it target_modules is a short list of suffixes, without it the exact names.
    Adapters on several expert parameters that are not called gate_up_proj and down_proj need it. `base_name` defaults
    to the card's. `task_type` "auto": CAUSAL_LM for a text adapter. A README.md without veneer's mark is left alone.
    `digest`: the adapter's, where its modules are known by longer names than the folder has (a pipeline's component in
    front). The same adapter gives the same bytes. Raises AdapterError for anything that PEFT's format cannot express,
    ResourceError when the disk is full; after any error the folder is as it was before."""
    folder = Path(folder)
    name = base_name or adapter.card.base
    if task_type == "auto":
        task_type = "CAUSAL_LM" if adapter.card.kind == "text" else None
    done = _encode(adapter, base_name=name, base=base, task_type=task_type, where=str(folder))
    config = json.dumps(done.config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    tensors = encode_tensors(done.tensors, {"format": "pt"})
    card = adapter.card
    if not card.rank and adapter.pairs:
        card = replace(card, rank=done.config["r"], alpha=float(done.config["lora_alpha"]))
    if not card.targets and isinstance(done.config["target_modules"], list):
        card = replace(
            card, targets=sorted([*done.config["target_modules"], *done.config.get("target_parameters", [])])
        )
    card = replace(card, base=card.base or name)
    digest = digest or done.adapter.digest()
    hashes = {TENSOR_FILE: _hash(tensors), CONFIG_FILE: cards.file_digest(config)}
    readme = cards.readme_bytes(replace(done.adapter, card=card), digest=digest, base_name=name, name=folder.name)
    contents: dict[str, list[bytes | memoryview]] = {
        TENSOR_FILE: tensors,
        CONFIG_FILE: [config],
        cards.CARD_FILE: [cards.card_bytes(card, digest=digest, files=hashes)],
        cards.README_FILE: [readme],
    }
    if not cards.is_ours(folder / cards.README_FILE):
        del contents[cards.README_FILE]
    put_folder(folder, contents, last=cards.CARD_FILE)
    return Written(folder, digest, hashes, done.notes)


def _hash(chunks: Iterable[bytes | memoryview]) -> str:
    import hashlib

    h = hashlib.sha256()
    for chunk in chunks:
        h.update(chunk)
    return "sha256:" + h.hexdigest()


def encode(
    adapter: Adapter, *, base_name: str = "", base: Base = None, task_type: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT folder, checked by reading them back. Raises as `write` does."""
    done = _encode(adapter, base_name=base_name, base=base, task_type=task_type, where=None)
    return done.config, done.tensors


def _encode(adapter: Adapter, *, base_name: str, base: Base, task_type: str | None, where: str | None) -> _Encoded:
    outline = describe(base) if base is not None else Structure({})
    own = adapter.collapsed().mapped(lambda t: t.detach())
    own = replace(own, pairs={n: _regrouped(p, outline, n) for n, p in own.pairs.items()})
    problems = _problems(own, outline)
    if not problems:
        check_finite(dict(own.tensors()), where=where)
        tensors = _tensors(own, outline)
        config, notes = _config(own, outline, base_name, task_type)
        try:
            read = interpret(config, tensors, base if outline.detailed else None).adapter
            problems = _differences(own, read)
        except AdapterError as error:
            problems = [f"PEFT would not read it back: {error.what}"]
    if problems:
        shown = "\n".join(f"  - {p}" for p in problems)
        raise AdapterError(f"the adapter cannot be written as a PEFT folder:\n{shown}", where=where)
    return _Encoded(config, tensors, read, notes)


def _regrouped(pair: Pair, base: Structure, name: str) -> Pair:
    """A pair whose A each group of a convolution runs on its own channels, as the equal one whose A sees them all:
    PEFT knows only the latter, of `groups` times the rank."""
    groups = base.grouped.get(name, 1)
    shape = base.shapes.get(f"{name}.weight", ())
    if groups == 1 or pair.kind != "conv" or pair.magnitude is not None or pair.A.shape[1] != shape[1]:
        return pair
    A = pair.A.new_zeros(groups * pair.rank, groups * shape[1], *pair.A.shape[2:])
    for g in range(groups):
        A[g * pair.rank : (g + 1) * pair.rank, g * shape[1] : (g + 1) * shape[1]] = pair.A
    return Pair(A, pair.B, pair.scale, "conv")


def _problems(adapter: Adapter, base: Structure) -> list[str]:
    """What PEFT's format cannot say."""
    out = []
    if not (adapter.pairs or adapter.modules or adapter.token_rows or adapter.deltas or adapter.new_tokens):
        out.append("it is empty")
    out += _delta_problems(adapter)
    out += [
        f"{n}: the learned words {', '.join(sorted(w)[:3])} have no token ids; --without-words leaves them out"
        for n, w in adapter.new_tokens.items()
    ]
    with_dora = {n for n, p in adapter.pairs.items() if p.magnitude is not None}
    if with_dora and len(with_dora) != len(adapter.pairs):
        plain = sorted(set(adapter.pairs) - with_dora)
        out.append(
            f"use_dora is one switch for all pairs, and {len(plain)} of {len(adapter.pairs)} have no magnitude "
            f"({', '.join(plain[:3])}); give them one equal to the norm of their weight's rows, or train without DoRA"
        )
    out += [f"{n}: DoRA on expert parameters" for n in sorted(with_dora) if adapter.pairs[n].kind == "experts"]
    owners: dict[str, str] = {}
    for name, pair in adapter.pairs.items():
        out += _pair_problems(name, pair)
        owners[name.rpartition(".")[0] if pair.kind == "experts" else name] = "a pair"
    owners |= dict.fromkeys(adapter.token_rows, "token rows")
    for name in sorted(adapter.modules):
        inside = [o for o in owners if o == name or o.startswith(f"{name}.")]
        out += [f"{o}: {owners[o]} inside {name}, which is a full copy" for o in inside]
        out += [] if adapter.modules[name] else [f"{name}: a full copy without tensors"]
    out += [f"{n}: a pair and token rows at once" for n in sorted(set(adapter.pairs) & set(adapter.token_rows))]
    for name, rows in adapter.token_rows.items():
        if rows.rows.ndim != 2 or len(rows.rows) != len(rows.indices) or len(set(rows.indices)) != len(rows.indices):
            out.append(f"{name}: {len(rows.indices)} token indices, rows of shape {tuple(rows.rows.shape)}")
    for module, parameters in _by_module(adapter).items():
        if len(parameters) > 1 and module not in base.experts and not set(parameters) <= set(EXPERT_ORDER):
            out.append(f"{module}: the order of its parameters {sorted(parameters)} depends on the base; give it")
    return out


def _delta_problems(adapter: Adapter) -> list[str]:
    """Of deltas PEFT has two kinds: trained biases, whole; and lora_bias, a bias beside every pair, of the pair's
    scale."""
    out, biased = [], set()
    for name, delta in sorted(adapter.deltas.items()):
        if delta.form == "replacement":
            out += bias_problems(name, delta)
            continue
        pair = adapter.pairs.get(name.removesuffix(".bias"))
        if delta.form != "dense" or pair is None or delta.scale != pair.scale or delta.magnitude is not None:
            out.append(f"{name}: a {delta.form} delta; make pairs of it, or merge it into the base")
        else:
            biased.add(name.removesuffix(".bias"))
    if biased and (left := sorted(set(adapter.pairs) - biased)):
        out.append(f"lora_bias is one switch for all pairs, and {len(left)} have no bias ({', '.join(left[:3])})")
    return out


def _pair_problems(name: str, pair: Pair) -> list[str]:
    A, B, shapes = pair.A, pair.B, f"A {tuple(pair.A.shape)}, B {tuple(pair.B.shape)}"
    if not name or ".base_layer" in name or ".lora_" in name:
        return [f"{name!r} is no name of a module of a base"]
    if not math.isfinite(pair.scale):
        return [f"{name}: the scale is {pair.scale}"]
    if pair.kind == "experts":
        fits = A.ndim == B.ndim == 3 and A.shape[0] == B.shape[0] and A.shape[1] == B.shape[2]
    elif pair.kind == "conv":
        fits = 2 < A.ndim == B.ndim and A.shape[0] % max(B.shape[1], 1) == 0 and all(n == 1 for n in B.shape[2:])
    else:
        fits = A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1]
    out = [] if fits and 0 not in (*A.shape, *B.shape) else [f"{name}: {shapes} do not fit each other"]
    if pair.magnitude is not None and (pair.magnitude.ndim != 1 or len(pair.magnitude) != B.shape[0]):
        out.append(f"{name}: magnitude {tuple(pair.magnitude.shape)}, expected ({B.shape[0]},)")
    return out


def _by_module(adapter: Adapter) -> dict[str, list[str]]:
    """Module -> its expert parameters that carry a pair."""
    out: dict[str, list[str]] = defaultdict(list)
    for name, pair in adapter.pairs.items():
        if pair.kind == "experts":
            module, _, parameter = name.rpartition(".")
            out[module].append(parameter)
    return out


def _tensors(adapter: Adapter, base: Structure) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    biases = {n.removesuffix(".bias"): d.parts["value"] for n, d in adapter.deltas.items() if d.form == "dense"}
    for name, pair in adapter.pairs.items():
        if pair.kind == "experts":
            continue
        a, b = (
            ("lora_embedding_A", "lora_embedding_B") if pair.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        )
        out[f"{name}.{a}"], out[f"{name}.{b}"] = pair.A, pair.B
        if name in biases:
            out[f"{name}.lora_B.bias"] = biases[name]
        if pair.magnitude is not None:
            shape = (1, -1, *[1] * (pair.A.ndim - 2)) if pair.kind == "conv" else (-1,)
            out[f"{name}.lora_magnitude_vector"] = pair.magnitude.reshape(shape)
    for module, parameters in _by_module(adapter).items():
        order = [p for p in (base.experts.get(module) or EXPERT_ORDER) if p in parameters] or parameters
        for depth, parameter in enumerate(reversed(order)):
            pair = adapter.pairs[f"{module}.{parameter}"]
            site = module + ".base_layer" * depth
            out[f"{site}.lora_A.weight"] = pair.A.flatten(0, 1)
            out[f"{site}.lora_B.weight"] = pair.B.permute(1, 2, 0).flatten(1)
    for name, own in adapter.modules.items():
        out |= {f"{name}.{key}": tensor for key, tensor in own.items()}
    for name, rows in adapter.token_rows.items():
        out[f"{name}.token_adapter.trainable_tokens_delta"] = rows.rows
    out |= bias_tensors(adapter)
    return {PREFIX + key: tensor.contiguous() for key, tensor in out.items()}


def _config(
    adapter: Adapter, base: Structure, base_name: str, task_type: str | None
) -> tuple[dict[str, Any], list[str]]:
    """The smallest configuration that PEFT resolves to this adapter, and notes on what it cannot say."""
    notes: list[str] = []
    pairs = adapter.pairs
    ranks = {n: p.rank for n, p in pairs.items()}
    rslora = adapter.rslora and all(scale_of(_alpha(p, True), p.rank, True) == p.scale for p in pairs.values())
    alphas = {n: _alpha(p, rslora) for n, p in pairs.items()}
    rank, alpha = _commonest(ranks.values(), 8), _commonest(alphas.values(), 8.0)
    plain = {n for n, p in pairs.items() if p.kind != "experts"}
    fused = set(pairs) - plain
    dropout = adapter.dropout
    if fused and dropout:
        notes.append(f"lora_dropout is written as 0 instead of {dropout:g}: PEFT has none on expert parameters")
        dropout = 0.0
    linear = {n for n in plain if pairs[n].kind == "linear"}
    config: dict[str, Any] = {
        "alpha_pattern": {k: _plain(v) for k, v in _patterns(alphas, alpha).items()},
        "base_model_name_or_path": base_name or None,
        "bias": bias_switch(adapter),
        "fan_in_fan_out": bool(linear) and linear <= base.fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(alpha),
        "lora_dropout": dropout,
        "modules_to_save": sorted(adapter.modules) or None,
        "peft_type": "LORA",
        "peft_version": LAYOUT,
        "r": rank,
        "rank_pattern": _patterns(ranks, rank),
        "target_modules": _target_modules(plain, set(base.kinds)) if pairs else DUMMY_TARGETS,
        "task_type": task_type,
        "use_dora": any(p.magnitude is not None for p in pairs.values()),
        "use_rslora": rslora,
    }
    if any(d.form == "dense" for d in adapter.deltas.values()):
        config["lora_bias"] = True
    if fused:
        every = {f"{m}.{p}" for m, ps in base.experts.items() for p in ps}
        config["target_parameters"] = _targets(fused, every, parts=2)
        if unsloth_marks(config):  # a reader would have to ask
            config["lora_B_layout"] = RANK_MAJOR
    if adapter.token_rows:
        config["trainable_token_indices"] = {n: list(r.indices) for n, r in sorted(adapter.token_rows.items())}
    return config, notes


def _alpha(pair: Pair, rslora: bool) -> float:
    """The alpha that gives the pair's scale back exactly, where there is one: whole or short if possible."""
    alpha = alpha_of(pair.scale, pair.rank, rslora)
    near = [float(round(alpha)), round(alpha, 6), alpha]
    for step in (math.inf, -math.inf):
        one = math.nextafter(alpha, step)
        near += [one, math.nextafter(one, step)]
    return next((a for a in near if scale_of(a, pair.rank, rslora) == pair.scale), alpha)


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) and abs(value) < 1 << 53 else value


def _commonest(values: Iterable[Any], default: Any) -> Any:
    counts = Counter(values)
    return min(counts, key=lambda v: (-counts[v], v)) if counts else default


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Keys for the names whose value is not the default, no name matched by two: the last part of the name where all
    names that end in it agree, the whole name from its start otherwise."""
    out: dict[str, Any] = {}
    by_leaf: dict[str, set[Any]] = defaultdict(set)
    for name, value in values.items():
        by_leaf[name.rpartition(".")[2]].add(value)
    for name, value in sorted(values.items()):
        leaf = name.rpartition(".")[2]
        if value != default:
            out[re.escape(leaf) if len(by_leaf[leaf]) == 1 else f"^{re.escape(name)}"] = value
    return out


def _target_modules(names: set[str], known: set[str]) -> list[str] | str:
    """As `_targets`; a regular expression where even a whole name is the end of another module's."""
    found = _targets(names, known)
    if any(k.endswith(f".{t}") for t in found for k in known - names):
        return "|".join(re.escape(name) for name in sorted(names))
    return found


def _targets(names: set[str], known: set[str], parts: int = 1) -> list[str]:
    """The shortest list whose entries, as suffixes, select exactly `names` among `known`; whole names where `known` is
    empty or a suffix would select more. `parts`: how many parts a suffix has."""
    out: set[str] = set()
    for name in names:
        suffix = ".".join(name.split(".")[-parts:])
        others = {k for k in known if k == suffix or k.endswith(f".{suffix}")}
        out.add(suffix if others and others <= names else name)
    return sorted(out)


def _differences(own: Adapter, read: Adapter) -> list[str]:
    """Where the adapter read back is not the one written."""
    out = []
    mine, theirs = dict(own.tensors()), dict(read.tensors())
    for name in sorted(set(mine) | set(theirs)):
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None or a.dtype != b.dtype or not torch.equal(a, b):
            out.append(f"{name} would come back {'changed' if a is not None and b is not None else 'or go missing'}")
    for name in set(own.pairs) & set(read.pairs):
        wanted, got = own.pairs[name].scale, read.pairs[name].scale
        if not math.isclose(wanted, got, rel_tol=1e-12):
            out.append(f"{name}: scale {wanted} would come back as {got}")
    for name in set(own.deltas) & set(read.deltas):
        if not math.isclose(own.deltas[name].scale, read.deltas[name].scale, rel_tol=1e-12):
            out.append(f"{name}: the scale would come back changed")
    if {n: r.indices for n, r in own.token_rows.items()} != {n: r.indices for n, r in read.token_rows.items()}:
        out.append("the token indices would come back changed")
    return out
