"""Merge a mix of adapters into a base, as a new full model in a new folder.

    W' = round(W + Σ strengthᵢ·ΔWᵢ)          summed in float32, rounded once to the written dtype

The base is not changed. A 16-bit weight has about three significant digits, so rounding loses part of a small
delta; the report says how much of the delta remains. `merge` loads the model; `merge_shards` rewrites the
model's files one weight at a time.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.adapters import use as using
from veneer.adapters.rounding import Rounding, seeded, stochastic
from veneer.core.adapter import Adapter, mix_text
from veneer.core.attach import active_mix
from veneer.core.merge import change_problem, dtype_of, exact_weights, parameter_changes
from veneer.core.targets import base_modules
from veneer.errors import AdapterError, BaseError, ConfigError, ResourceError, bullets, first_few, nearest
from veneer.files.atomic import as_veneer_errors, atomic_write, new_folder
from veneer.files.safetensors import strict_json
from veneer.files.weights import Checkpoint, checkpoint_parts
from veneer.formats.moe import as_stored
from veneer.models.loading import errors_only, loading
from veneer.models.quantize import quantized_weights
from veneer.models.text.meta_model import tied_weights
from veneer.ops.quantization_formats import KINDS
from veneer.ops.quantized import Quantized, dequantized, quantize

if TYPE_CHECKING:
    from veneer.models.text.base import TextBase

_MERGE_FILE = "merge.json"
_WARN, _ASK = 0.05, 0.5
"""Thresholds of `delta_error` for a merge that rounds to nearest. From `_WARN` on, the merge warns; from
`_ASK` on, it also requires `accept_loss`."""


@dataclass
class MergeReport:
    """The result of a merge.

    changed: the share of weights that still differ from the base after rounding, among all weights with a
        nonzero exact delta.
    delta_error: ‖(W'−W) − Δ‖/‖Δ‖ over these weights, with W' and W rounded to `dtype`. 0 means that the
        delta is intact; 1 means that the result is about as wrong as without the delta.
    delta_kept: ⟨W'−W, Δ⟩/‖Δ‖² over these weights; 1 means that on average all of the delta is kept.
    untied: whether the head no longer shares the embedding's weight, because the mix changes only one of the
        two.
    rounding: the rounding method.
    seen: the base's quantization, such as nf4, if the merge used dequantized weights; else ""."""

    folder: str = ""
    base: str = ""
    adapters: list[dict[str, Any]] = field(default_factory=list)
    dtype: str = ""
    tensors: int = 0
    weights: int = 0
    changed: float = 0.0
    delta_error: float = 0.0
    delta_kept: float = 0.0
    untied: bool = False
    rounding: str = "nearest"
    seen: str = ""
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def count(self, rounding: Rounding) -> None:
        """Copy the rounding statistics into this report."""
        self.weights, self.changed = rounding.weights, rounding.changed
        self.delta_error, self.delta_kept = rounding.error, rounding.kept

    @property
    def warning(self) -> str:
        """A warning if rounding gave the merged change a large relative error, else ""."""
        if self.rounding != "nearest" or self.delta_error < _WARN:
            return ""
        return f"rounding to {self.dtype} gives the merged change a relative error of {self.delta_error:.0%}"

    def check(self, accept_loss: bool, fix: str) -> None:
        """Raise AdapterError if rounding loses half of the change or more.

        Does nothing if `accept_loss` is true."""
        if not accept_loss and self.warning and self.delta_error >= _ASK:
            raise AdapterError(
                f"{self.warning}; nothing was written", fix=f"{fix}, or --accept-loss (accept_loss=True) to write it"
            )

    def write(self, folder: Path) -> None:
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        atomic_write(folder / _MERGE_FILE, [text.encode() + b"\n"])


def merge(
    base: TextBase,
    adapters: Sequence[using.AdapterSpec],
    folder: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    allow_other_base: bool = False,
    seed: int | None = None,
    accept_loss: bool = True,
) -> MergeReport:
    """Write a model folder: `base` with `adapters` merged in, and merge.json.

    The folder includes the tokenizer, and appears complete or not at all. The sum is computed in float32 and
    rounded once. The report states the share of the change that was lost to rounding. The base does not
    change.

    base: can be quantized. The written weight is then W' = W̃ + ΔW, where W̃ is the dequantized weight that the
        adapter was trained with.
    adapters: folders, files or names, each optionally with ":strength".
    dtype: float32, bfloat16 or float16; by default the dtype in which the base is loaded.
    seed: round stochastically, without bias (adapters.rounding), with this seed.
    accept_loss: if False, refuse a merge in which rounding loses half of the change or more.

    Raises ConfigError if there are no adapters, if the folder is not empty, or if the base is loaded in a
    16-bit dtype other than `dtype`; and the errors of reading the adapters."""
    folder = Path(folder)
    target = _target(base, dtype)
    _check_request(adapters, folder)
    report = MergeReport(str(folder), base.name, dtype=str(target).removeprefix("torch."), seen=base.quantized)
    with using.attach_adapters(base, adapters, allow_other_base=allow_other_base) as attachment:
        mix = attachment.selection.mix
        strengths = [using.parse_spec(a) for a in adapters]
        report.adapters = [{"name": n, "strength": s, "digest": attachment.adapters[n].digest()} for n, s in strengths]
        model = merged_model(base.model, mix, target, report, seed)
    report.check(accept_loss, "--dtype float32, --stochastic 0")
    try:
        with as_veneer_errors(folder), new_folder(folder) as temporary, errors_only():
            model.save_pretrained(temporary, max_shard_size="5GB")
            base.tokenizer.save_pretrained(temporary)
            report.bytes = sum(f.stat().st_size for f in temporary.glob("*.safetensors"))
            report.write(temporary)
    except Exception as error:
        if "No space left" in str(error):  # safetensors raises its own exception
            raise ResourceError("no space left on the device; nothing was written", where=str(folder)) from error
        raise
    return report


def _check_request(adapters: Sequence[using.AdapterSpec], folder: Path) -> None:
    if not adapters:
        raise ConfigError("there is nothing to merge", fix="name at least one adapter")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError("the output folder exists and is not empty", where=str(folder), fix="give a new one with -o")


def _target(base: TextBase, dtype: str | None) -> torch.dtype:
    target = base.dtype if dtype is None else dtype_of(dtype)
    if target != base.dtype and base.dtype != torch.float32:
        problem = f"the base is loaded in {base.dtype}, so its weights would be rounded twice on the way to {target}"
        raise ConfigError(problem, fix="load it with dtype float32")
    return target


def merged_model(
    model: Any,
    mix: Iterable[tuple[Adapter, float]],
    dtype: torch.dtype,
    report: MergeReport | None = None,
    seed: int | None = None,
) -> Any:
    """Return a new model of `model`'s class in `dtype` with the mix merged in.

    The new model shares unchanged tensors with `model`, whose weights are not modified.

    report: receives the counts and the rounding error.
    seed: as in `merge`.

    Raises AdapterError if a merged weight is outside `dtype`'s range."""
    report = report or MergeReport()
    report.rounding = _rounding_name(seed)
    state_dict = model.state_dict()
    tied: dict[Any, list[str]] = {}  # address -> names; tied weights are rounded identically
    rounding, new, bad = Rounding(), {}, []
    for name, weight, exact in exact_weights(model, mix):
        stored = state_dict[name]  # a tied weight is never quantized
        names = tied.setdefault(name if isinstance(stored, Quantized) else (stored.data_ptr(), stored.shape), [])
        names.append(name)
        new[name] = _rounded(weight, exact, dtype, rounding, seed, f"/{names[0]}")
        if not torch.isfinite(new[name]).all():
            bad.append(name)
    if bad:
        under = mix_text(active_mix(model)) or "the mix"
        problem = f"{len(bad)} merged weights do not fit into {dtype} under {under}: {first_few(bad, 3)}"
        raise AdapterError(problem, fix="use dtype bfloat16 or float32, or a smaller strength")
    state = {n: dequantized(t).to(dtype) if t.is_floating_point() else t for n, t in state_dict.items() if n not in new}
    report.untied = any(not torch.equal(new[names[0]], new[n]) for names in tied.values() for n in names[1:])
    report.tensors = len(new)
    report.count(rounding)
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        if report.untied:
            part.tie_word_embeddings = False
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with loading(), torch.device("meta"):
        shell = type(model)(config)
    shell.load_state_dict(state | new, strict=True, assign=True)
    # copy buffers that are not in the state dict, such as rotary frequencies
    for name, module in base_modules(model):
        for key, buffer in module.named_buffers(recurse=False):
            if (own_buffers := shell.get_submodule(name)._buffers)[key].is_meta:
                own_buffers[key] = buffer
    if not report.untied:
        shell.tie_weights()
    shell.generation_config = copy.deepcopy(model.generation_config)
    return shell


def _rounded(
    original: Tensor, exact: Tensor, dtype: torch.dtype, rounding: Rounding, seed: int | None, name: str
) -> Tensor:
    after = exact.to(dtype) if seed is None else stochastic(exact, dtype, seeded(seed, name))
    rounding.add(original, exact, after)
    return after


def _rounding_name(seed: int | None) -> str:
    return "nearest" if seed is None else f"stochastic, seed {seed}"


# -- shard by shard ----------------------------------------------------------------------------------------------------

_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
"""Model types that store linear weights as (in, out). A square shape does not show this."""


def merge_shards(
    base: str | Path,
    adapters: Sequence[using.AdapterSpec],
    folder: str | Path,
    *,
    seed: int | None = None,
    seen: str = "",
    accept_loss: bool = True,
) -> MergeReport:
    """Write a model folder with `adapters` merged in, without loading the model.

    Every safetensors file is rewritten with the same header: each weight keeps its dtype, and weights that
    the mix does not change keep their bytes. All other files are copied. One weight is in memory at a time,
    in float32. The folder appears complete or not at all.

    base: a model folder in the layout of transformers or diffusers. For diffusers, the first part of an
        adapter's module names is the component's folder.
    seed: round stochastically, without bias (adapters.rounding), with this seed.
    accept_loss: as in `merge`.
    seen: the quantization (nf4, fp4 or int8) of the base that the adapters were trained on. Each weight that
        this quantization applies to is quantized and dequantized, and the mix is merged into the result.

    Raises ConfigError for an invalid request, and BaseError if the base is not a folder of safetensors files.
    Raises AdapterError with a list of all changes that cannot be merged: no weight of this name, another
    shape, a weight dtype that cannot hold the result, or a change of only one of two tied weights (token rows
    change both)."""
    base, folder = Path(base), Path(folder)
    _check_request(adapters, folder)
    if not base.is_dir():
        raise BaseError("there is no such model folder", where=str(base))
    selected = [using.parse_spec(a) for a in adapters]
    mix = [(using.read_adapter(name).adapter, strength) for name, strength in selected]
    parts = checkpoint_parts(base)
    plan = _plan(parts, _as_stored(parts, mix))
    quantized = _quantized_names(base, parts, seen) if seen else frozenset()
    report = MergeReport(str(folder), str(base), seen=seen)
    report.rounding = _rounding_name(seed)
    report.adapters = [
        {"name": name, "strength": s, "digest": adapter.digest()}
        for (name, s), (adapter, _) in zip(selected, mix, strict=True)
    ]
    rounding = Rounding()
    with as_veneer_errors(folder), new_folder(folder) as temporary:
        shards = {file for part in parts.values() for file in part.files}
        for file in sorted(p for p in base.rglob("*") if p.is_file()):
            if any(part.startswith(".") for part in file.relative_to(base).parts):
                continue
            target = temporary / file.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file not in shards:
                shutil.copyfile(file, target)
        for component, part in parts.items():
            for file in part.files:
                chunks = _merged_shard(
                    part, file, plan[component], rounding, seed, component, (seen, quantized), mix_text(tuple(selected))
                )
                atomic_write(temporary / file.relative_to(base), chunks)
                report.bytes += file.stat().st_size
        report.tensors = sum(map(len, plan.values()))
        report.count(rounding)
        dtypes = {str(parts[c].entries[n].dtype) for c, changes in plan.items() for n in changes}
        report.dtype = ", ".join(sorted(dtype.removeprefix("torch.") for dtype in dtypes))
        report.check(accept_loss, "--stochastic 0, --dtype float32 without --by-shard")
        report.write(temporary)
    return report


def _quantized_names(base: Path, parts: dict[str, Checkpoint], kind: str) -> frozenset[str]:
    """Return the names of the tensors that are quantized when this base is loaded with quantization `kind`."""
    from veneer.models.text.base import text_without_weights

    if kind not in KINDS:
        raise ConfigError(f"adapters trained on {kind} weights cannot be merged by shard", fix="leave out --by-shard")
    names = quantized_weights(text_without_weights(str(base)).model)
    if "" not in parts or (missing := [n for n in names if n not in parts[""].entries]):
        joined = f" ({missing[0]})" if "" in parts else ""
        problem = f"the files store weights in parts{joined}, which are joined before they are quantized"
        raise BaseError(problem, where=str(base), fix="leave out --by-shard")
    return frozenset(names)


Plan = dict[str, dict[str, list[tuple[Callable[[Tensor], Tensor], float]]]]
"""Component -> tensor name -> list of (function that returns ΔW, strength)."""


def _as_stored(parts: dict[str, Checkpoint], mix: list[tuple[Adapter, float]]) -> list[tuple[Adapter, float]]:
    """Return the mix with pairs of experts in the layout of the model's files."""
    if (part := parts.get("")) is None:
        return mix
    config = _config(part.path)
    text = config.get("text_config")
    kinds = [str(c.get("model_type")) for c in (config, text) if isinstance(c, dict)]
    return [(replace(adapter, pairs=as_stored(adapter.pairs, part.find, kinds)), s) for adapter, s in mix]


def _plan(parts: dict[str, Checkpoint], mix: list[tuple[Adapter, float]]) -> Plan:
    """Return, for each tensor of the files, the changes that apply to it.

    Before anything is written, all changes are checked on the meta device. If two modules share a weight, an
    attached adapter changes only the module it names, except that token rows change both. The files store a
    shared weight once, so only token rows can be merged into a shared weight."""
    plan: Plan = {component: {} for component in parts}
    problems: list[str] = []
    configs = {component: _config(part.path) for component, part in parts.items()}
    tied = {
        component: [{name: part.find(name) for name in group} for group in tied_weights(part.path)]
        for component, part in parts.items()
    }
    for adapter, strength in mix:
        shapes = parameter_changes(adapter.mapped(lambda t: t.to("meta")))
        for (name, change), (_, shape_only) in zip(parameter_changes(adapter), shapes, strict=True):
            component, name_in_part = ("", name) if "" in parts else (name.partition(".")[0], name.partition(".")[2])
            if component not in parts:
                problems.append(f"{name}: the base has no component {component!r}, only {', '.join(parts)}")
                continue
            part, config = parts[component], configs[component]
            tensor = part.find(name_in_part)
            weight = tensor or name_in_part
            shared = next((group for group in tied[component] if weight in {*group, *group.values()}), {})
            rows = name.removesuffix(".weight") in adapter.token_rows
            if shared and not rows:
                other_names = ", ".join(other_name for other_name in shared if other_name != weight)
                problems.append(
                    f"{name}: {other_names} shares this weight, but the change is for only one; omit --by-shard"
                )
                continue
            if tensor is None:
                similar = nearest(name_in_part, part.entries, 1)
                problems.append(f"{name}: the base has no such weight" + (f"; nearest {similar[0]}" if similar else ""))
                continue
            entry = part.entries[tensor]
            if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
                problems.append(f"{name}: stored as {entry.dtype}, which cannot hold a merged weight")
            elif config.get("model_type") in _TRANSPOSED and len(entry.shape) == 2:
                problems.append(f"{name}: weights of {config['model_type']} are stored transposed; omit --by-shard")
            elif problem := change_problem(shape_only, entry.shape):
                problems.append(f"{name}: {problem}")
            else:
                for each in {tensor, *filter(None, shared.values())}:  # changing token rows changes both tied tensors
                    plan[component].setdefault(each, []).append((change, strength))
    if problems:
        raise AdapterError(
            f"the mix does not fit the files of this base ({len(problems)} problems):\n{bullets(problems, None)}"
        )
    return plan


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    config = strict_json(path.read_bytes(), where=str(path)) if path.is_file() else {}
    return config if isinstance(config, dict) else {}


def _merged_shard(
    part: Checkpoint,
    file: Path,
    plan: dict[str, list[tuple[Callable[[Tensor], Tensor], float]]],
    rounding: Rounding,
    seed: int | None,
    component: str,
    seen: tuple[str, frozenset[str]],
    under: str,
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a shard with the changes applied, in file order.

    seen: (kind of quantization, names of the quantized tensors).
    under: the mix as text, for error messages."""
    header = part.files[file]
    with file.open("rb") as source:
        yield source.read(header.data_start)
    for name in sorted(header.entries, key=lambda n: (header.entries[n].begin, header.entries[n].end)):
        weight = part.tensor(name)
        if name in seen[1]:
            weight = quantize(weight, seen[0]).dense()
        after = weight
        if name in plan:
            exact = weight if weight.dtype == torch.float64 else weight.float()
            start = exact
            for change, strength in plan[name]:
                exact = exact + change(start) * strength
            after = _rounded(weight, exact, weight.dtype, rounding, seed, f"{component}/{name}")
            if not torch.isfinite(after).all():
                problem = f"{name}: the merged weight does not fit into {weight.dtype} under {under}"
                raise AdapterError(
                    problem, where=str(file), fix="use a smaller strength, or a base in bfloat16 or float32"
                )
        if after.numel():
            yield memoryview(after.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
