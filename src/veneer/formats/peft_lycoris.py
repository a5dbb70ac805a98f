"""Convert PEFT folders with `peft_type` LOHA or LOKR to deltas, and back.

    base_model.model.MODULE.PARAMETER                             full copies from modules_to_save
    base_model.model.MODULE.hada_w1_a … hada_w2_b, hada_t1, hada_t2
    base_model.model.MODULE.lokr_w1 or _w1_a, _w1_b; lokr_w2 or …, lokr_t2    scale alpha/r, even for full w1, w2

Before PEFT loads the file, it creates empty tensors from the configuration. There, r, `decompose_both` and
`decompose_factor` determine which factors of a LoKr are full (core.forms.trained_shapes), so written files
must follow this rule. This module works on a configuration and tensors; formats.peft reads and writes the
files.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from veneer.core.adapter import Adapter, scale_of
from veneer.core.forms import Delta, trained_shapes
from veneer.errors import AdapterError
from veneer.formats import peft_config as cfg
from veneer.formats.module_tensors import ModuleChanges as _Leaf
from veneer.formats.module_tensors import read_module, write_module

if TYPE_CHECKING:
    from torch import Tensor

_FORMS = {"hadamard": "LOHA", "kronecker": "LOKR"}
_COMMON = {
    "r", "alpha", "rank_pattern", "alpha_pattern", "peft_type", "target_modules", "base_model_name_or_path",
    "task_type", "modules_to_save",
}  # fmt: skip
_NO_EFFECT = {
    "auto_mapping", "exclude_modules", "inference_mode", "init_weights", "layers_pattern", "layers_to_transform",
    "peft_version", "revision", "use_effective_conv2d", "rank_dropout", "module_dropout", "rank_dropout_scale",
    "decompose_both", "decompose_factor",
}  # fmt: skip
_PREFIX = "base_model.model."


def is_lycoris(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration has `peft_type` LOHA or LOKR."""
    return config.get("peft_type") in _FORMS.values()


def read_lycoris(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Adapter, cfg.PeftConfig, dict[str, Tensor], list[str]]:
    """Return (adapter, configuration, tensors of full copies, problems).

    The configuration is converted to a LoRA configuration. Tensors of full copies have keys without PEFT's
    prefix. Each problem is one line."""
    where, known = f"in a {config['peft_type']} folder", _COMMON | _NO_EFFECT
    other = [(key, value) for key, value in sorted(config.items()) if key not in known and value]
    problems = [f"{key} = {str(value)[:60]!r} is not understood {where}" for key, value in other]
    # The LoRA parser parses and checks the fields that LOHA and LOKR have in common with LORA.
    shared = {"lora_alpha" if key == "alpha" else key: value for key, value in config.items() if key in _COMMON}
    parsed, wrong = cfg.parse_config(shared | {"peft_type": "LORA"})
    problems += [problem.removeprefix("lora_") for problem in wrong]
    if wrong:
        return Adapter(), parsed, {}, problems
    remaining: dict[str, Tensor] = {}
    by_module: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, _, suffix = key.removeprefix(_PREFIX).rpartition(".")
        if not key.startswith(_PREFIX):
            problems.append(f"{key}: not a tensor of a {config['peft_type']} folder")
        elif re.fullmatch(r"(hada|lokr)_\w+", suffix):
            by_module[module][suffix] = tensor
        else:
            remaining[key.removeprefix(_PREFIX)] = tensor
    deltas: dict[str, Delta] = {}
    for module, tensors_of_module in by_module.items():
        try:
            delta = read_module(tensors_of_module, where=module).deltas["weight"]
            scale = scale_of(cfg.alpha_of_module(parsed, module), cfg.rank_of_module(parsed, module)[0])
        except (AdapterError, cfg.PatternError) as error:
            problems.append(f"{module}: {error.what if isinstance(error, AdapterError) else error}")
            continue
        deltas[f"{module}.weight"] = replace(delta, scale=scale)
    if not deltas and not problems:
        problems.append("the folder contains no LoHa or LoKr tensors")
    return Adapter(deltas=deltas, card=cfg.card_from_config(parsed)), parsed, remaining, problems


def can_be_lycoris(adapter: Adapter) -> bool:
    """Return whether all changes of weights are LoHa, or all are LoKr.

    Full copies of modules are allowed."""
    forms = {d.form for d in adapter.deltas.values()}
    unsupported = adapter.pairs or adapter.token_rows
    return not unsupported and len(forms) == 1 and forms <= set(_FORMS)


def write_lycoris(
    adapter: Adapter, *, base_name: str, task_type: str | None, targets: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of a LOHA or LOKR folder.

    targets: PEFT's target_modules.

    Raises AdapterError listing each delta that PEFT cannot create from any configuration."""
    kind = _FORMS[next(iter(adapter.deltas.values())).form]
    problems = [p for name, delta in adapter.deltas.items() for p in _problems(name, delta)]
    problems += [f"{name}: a delta inside {m}, which is a full copy" for name, m in _inside(adapter)]
    both = any("a1" in d.parts for d in adapter.deltas.values()) and kind == "LOKR"
    factor = _factor_of(adapter, both) if kind == "LOKR" and not problems else None
    if kind == "LOKR" and not problems and factor is None:
        problems.append("no decompose_factor gives the sizes of all factors of this LoKr; write kohya's layout")
    if problems:
        raise AdapterError("\n".join(problems))
    names = {name.removesuffix(".weight"): delta for name, delta in adapter.deltas.items()}
    delta_ranks = [r for d in names.values() if (r := _rank(d)) is not None]
    rank = adapter.card.rank or cfg.commonest(delta_ranks, 8)
    ranks = {name: _rank_for(delta, rank) for name, delta in names.items()}
    alphas = {name: cfg.exact_alpha(delta.scale, ranks[name]) for name, delta in names.items()}
    alpha = cfg.commonest(alphas.values(), 8.0)
    config: dict[str, Any] = {
        "alpha": alpha,
        "alpha_pattern": cfg.patterns_of(alphas, alpha),
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "init_weights": True,
        "peft_type": kind,
        "r": rank,
        "modules_to_save": sorted(adapter.modules) or None,
        "rank_pattern": cfg.patterns_of(ranks, rank),
        "target_modules": targets,
        "task_type": task_type,
        "use_effective_conv2d": any("t1" in d.parts or "t2" in d.parts for d in names.values()),
    }
    if kind == "LOKR":
        config |= {"decompose_both": both, "decompose_factor": factor}
    tensors: dict[str, Tensor] = {}
    for name, delta in names.items():
        for suffix, tensor in write_module(_Leaf(deltas={"weight": replace(delta, scale=1.0)})).items():
            if suffix != "alpha":
                tensors[f"{_PREFIX}{name}.{suffix}"] = tensor.contiguous()
    for name, module_tensors in adapter.modules.items():
        tensors |= {f"{_PREFIX}{name}.{key}": tensor.contiguous() for key, tensor in module_tensors.items()}
    return config, tensors


def _inside(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """Yield (delta, full copy) for each delta inside a module that has a full copy."""
    for name in adapter.deltas:
        yield from ((name, module) for module in adapter.modules if name.startswith(f"{module}."))


def _problems(name: str, delta: Delta) -> Iterator[str]:
    if not name.endswith(".weight") or delta.magnitude is not None or delta.rows is not None:
        yield f"{name}: PEFT supports LoHa and LoKr on full weights only, without DoRA; write kohya's layout"
    elif any(core in delta.parts for core in ("t1", "t2")) and len(delta.shape) != 4:
        yield f"{name}: PEFT supports cores only for 2-d convolutions; write kohya's layout"
    elif delta.form == "kronecker" and "w2" in delta.parts and len(delta.shape) == 3:
        yield f"{name}: PEFT multiplies a full second factor of a 1-d convolution differently; write kohya's layout"


def _rank(delta: Delta) -> int | None:
    """Return the rank of a delta's low-rank parts, or None if all parts are full."""
    return next((int(delta.parts[b].shape[0]) for b in ("b2", "b1") if b in delta.parts), None)


def _rank_for(delta: Delta, rank: int) -> int:
    """Return the rank to write for a delta.

    A delta with two full factors has no rank. It gets `rank` if PEFT then creates full factors, else the
    smallest rank for which PEFT creates full factors."""
    rank_of_delta = _rank(delta)
    if rank_of_delta is not None:
        return rank_of_delta
    sizes = [n for w in ("w1", "w2") for n in delta.parts[w].shape[:2]]
    return rank if 2 * rank >= max(sizes) else -(-max(sizes) // 2)


def _factor_of(adapter: Adapter, both: bool) -> int | None:
    """Return the decompose_factor for which PEFT creates parts of these shapes, or None.

    -1 is PEFT's default."""
    firsts = {n for d in adapter.deltas.values() for n in _first_factor(d)}
    for factor in (None, *sorted(firsts), *range(1, 2 * max(firsts) + 2)):
        if all(_follows(delta, factor, both) for delta in adapter.deltas.values()):
            return -1 if factor is None else factor
    return None


def _first_factor(delta: Delta) -> tuple[int, ...]:
    parts = delta.parts
    return tuple(parts["w1"].shape) if "w1" in parts else (parts["a1"].shape[0], parts["b1"].shape[1])


def _follows(delta: Delta, factor: int | None, both: bool) -> bool:
    want = trained_shapes("lokr", delta.shape, _rank_for(delta, 1), factor, both)
    if "t2" in delta.parts:  # with a core, b2 is (r, n)
        want = {**want, "b2": (want["b2"][0], delta.parts["b2"].shape[1])} if "b2" in want else want
        return {k: tuple(t.shape) for k, t in delta.parts.items() if k != "t2"} == want
    return {k: tuple(t.shape) for k, t in delta.parts.items()} == want
