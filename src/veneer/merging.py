"""A mix folded into a base: a new full model in a folder of its own. The base is not changed.

    W' = round(W + Σ strengthᵢ·ΔWᵢ)          summed in float32, rounded once to the dtype that is written

A 16-bit weight has about three digits, so part of a small delta rounds away: the report says how much is left.
Stands above formats and models, beside `using`; knows folders of models and of adapters.
"""

from __future__ import annotations

import copy
import json
import secrets
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer import using
from veneer.core.adapter import Adapter
from veneer.core.merge import exact_weights
from veneer.errors import AdapterError, BaseError, ConfigError, ResourceError
from veneer.formats.atomic import as_veneer_error, atomic_write, flush_folder
from veneer.models.quiet import quiet

if TYPE_CHECKING:
    from veneer.models.text import TextBase

__all__ = ["DTYPES", "MERGE_FILE", "Merged", "merge", "merged_model"]

MERGE_FILE = "merge.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Merged:
    """What a merge did.

    `changed`: of the weights whose exact delta is not zero, the share that differs from the base after rounding.
    `delta_error`: ‖(W'−W) − Δ‖/‖Δ‖ over all of them, W' and W as rounded to `dtype`: 0 is a delta kept whole, 1 about
    as wrong as no delta at all. `untied`: the head no longer shares the embedding's weight, because the mix moves one
    and not the other."""

    folder: str = ""
    base: str = ""
    adapters: list[dict[str, Any]] = field(default_factory=list)
    dtype: str = ""
    tensors: int = 0
    weights: int = 0
    changed: float = 0.0
    delta_error: float = 0.0
    untied: bool = False
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Rounding:
    """Sums for `changed` and `delta_error`, in float64."""

    moved: int = 0
    weights: int = 0
    error: float = 0.0
    size: float = 0.0

    def add(self, before: Tensor, exact: Tensor, after: Tensor) -> None:
        delta = exact - before.to(exact.dtype)
        there = delta != 0
        start = before.to(after.dtype)
        self.weights += int(there.sum())
        self.moved += int(((start != after) & there).sum())
        left = (after.to(exact.dtype) - start.to(exact.dtype)) - delta
        self.error += float(left.double().square().sum())
        self.size += float(delta.double().square().sum())


def merge(
    base: TextBase,
    adapters: Sequence[str | tuple[str, float]],
    folder: str | Path,
    *,
    dtype: str | None = None,
    allow_other_base: bool = False,
) -> Merged:
    """Write `base` with `adapters` folded in to a new `folder`, with its tokenizer and a report (`merge.json`).

    `adapters`: as in `using.attach_adapters`, "NAME_OR_PATH[:strength]". `dtype`: float32, bfloat16 or float16; by
    default the one the base is loaded in. The folder appears whole or not at all. Raises ConfigError for no adapters,
    a folder that is not empty, or a base that was loaded in another 16-bit dtype; and what reading the adapters
    raises."""
    folder = Path(folder)
    target = _target(base, dtype)
    if not adapters:
        raise ConfigError("there is nothing to merge", fix="name at least one adapter")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("the folder is there already and not empty", where=str(folder), fix="give a new one with -o")
    report = Merged(str(folder), base.name, dtype=str(target).removeprefix("torch."))
    with using.attach_adapters(base, adapters, allow_other_base=allow_other_base) as attachment:
        mix = attachment.selection.mix
        strengths = [using.parse_spec(a) for a in adapters]
        report.adapters = [{"name": n, "strength": s, "digest": attachment.adapters[n].digest()} for n, s in strengths]
        model = merged_model(base.model, mix, target, report)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.tmp")
    try:
        with quiet():
            model.save_pretrained(temporary, max_shard_size="5GB")
            base.tokenizer.save_pretrained(temporary)
        report.bytes = sum(f.stat().st_size for f in temporary.glob("*.safetensors"))
        text = json.dumps(report.to_dict(), indent=2, sort_keys=True)
        atomic_write(temporary / MERGE_FILE, [text.encode() + b"\n"])
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
        flush_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise as_veneer_error(error, folder) from error
        if "No space left" in str(error):  # safetensors has an error of its own
            raise ResourceError("no room to write; nothing was changed", where=str(folder)) from error
        raise
    return report


def _target(base: TextBase, dtype: str | None) -> torch.dtype:
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r}", fix=", ".join(DTYPES))
    target = base.dtype if dtype is None else DTYPES[dtype]
    if target != base.dtype and base.dtype != torch.float32:
        raise ConfigError(
            f"the base is loaded in {base.dtype}, so its weights would be rounded twice on the way to {target}",
            fix="load it with dtype float32",
        )
    quantised = getattr(base.model.config, "quantization_config", None)
    if quantised is not None and _method(quantised) != "gguf":
        raise BaseError(
            f"the base is quantised ({_method(quantised)}): a merged weight does not fit its grid",
            where=base.name,
            fix="merge into the base it was quantised from",
        )
    return target


def _method(config: Any) -> str:
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", "")
    return str(getattr(method, "value", method))


def merged_model(
    model: Any, mix: Iterable[tuple[Adapter, float]], dtype: torch.dtype, report: Merged | None = None
) -> Any:
    """A new model of `model`'s class with the mix folded in, in `dtype`. Shares every tensor that it can with `model`,
    whose own weights stay as they are; fills in `report`. Raises AdapterError where a weight leaves `dtype`'s range."""
    report = report or Merged()
    rounding, new, bad = _Rounding(), {}, []
    for name, before, exact in exact_weights(model, mix):
        after = exact.to(dtype)
        if not torch.isfinite(after).all():
            bad.append(name)
        rounding.add(before, exact, after)
        new[name] = after
    if bad:
        raise AdapterError(
            f"{len(bad)} merged weights do not fit into {dtype}: {', '.join(bad[:3])}",
            fix="use dtype bfloat16 or float32, or a smaller strength",
        )
    own = model.state_dict()
    state = {n: t.to(dtype) if t.is_floating_point() else t for n, t in own.items()}
    places: dict[tuple[int, torch.Size], list[str]] = {}
    for name in new:
        places.setdefault((own[name].data_ptr(), own[name].shape), []).append(name)
    report.untied = any(not torch.equal(new[names[0]], new[n]) for names in places.values() for n in names[1:])
    report.tensors, report.weights = len(new), rounding.weights
    report.changed = rounding.moved / rounding.weights if rounding.weights else 0.0
    report.delta_error = (rounding.error / rounding.size) ** 0.5 if rounding.size else 0.0
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if report.untied:
            part.tie_word_embeddings = False
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with quiet(), torch.device("meta"):
        shell = type(model)(config)
    shell.load_state_dict(state | new, strict=True, assign=True)
    if not report.untied:
        shell.tie_weights()
    shell.generation_config = copy.deepcopy(model.generation_config)
    return shell
