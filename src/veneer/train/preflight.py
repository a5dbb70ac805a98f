"""Preflight: predict a run before step one, with stops, warnings and numbers.

    report = inspect_run(config, base, data)        train/inspect.py
    print(report.text())           also report.to_dict() for JSON
    report.raise_if_stopped()      PreflightError with everything that must change

A finding stops a run that would train nothing, train the wrong thing, or not fit in memory. An unusual
setting that can be intentional causes a warning. This module has the parts that all runs share: the report,
the checks of settings, processes, precision, output and disk, and the rule about memory. No check changes
anything.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from veneer.core.adapter import LoraSpec
from veneer.core.targets import Target, base_modules, full_modules, target_matches, token_embeddings
from veneer.errors import PreflightError, counted, first_few, gigabytes
from veneer.models.device import free_on_gpu
from veneer.plan.plan import Plan
from veneer.plan.shape import PairForm
from veneer.train.checkpoint import differences
from veneer.train.config.load import RunConfig
from veneer.train.config.section import SERVER_KEYS
from veneer.train.config.text import TrainConfig

CACHE = "cache"
"""Subfolder of the output for latents and class images, which later runs can reuse."""
# LoRA hardly learns below this range; in a public sweep, 72 of the 80 runs that diverged used the rate 3e-3
_WINDOW = (1e-5, 3e-3)
_PREFERENCE_WINDOW = (1e-6, 5e-4)  # includes the rates of published LoRA preference runs, 5e-6 to 5e-5
_NAMED = 5
_FREE_TO_CHANGE = {"evaluation", "checkpoint", "memory", "samples"}  # sections that a resumed run can change
_FREE_KEYS = {"batching.micro_rows", "batching.micro_tokens", "base.device", "reinforcement.most_failed"}
_FREE_KEYS |= {f"{section}.{key}" for section in ("reinforcement", "distillation") for key in ("rows", "gap")}
# these are locations; a resumed run compares the contents instead
_FREE_KEYS |= {f"data.{key}" for key in ("train", "validation", "pictures", "class_folder", "cache")}
_FREE_OF_REWARDS = {*SERVER_KEYS, "memory_gb"}
# keys of earlier versions that old checkpoints contain
_FREE_KEYS |= {"reinforcement.turns", *(f"distillation.{key}" for key in (*SERVER_KEYS, "most_failed"))}
_FREE_KEYS |= {"optimizer.momentum"}
_FREE_OF_REWARDS |= {"ignore_case", "unit", "fields"}

Level = Literal["stop", "warn", "ok"]


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    check: name of the check; does not change between versions. fix: what the user can do."""

    level: Level
    check: str
    text: str
    fix: str = ""


@dataclass
class Report:
    """The result of `inspect_run`.

    findings: sorted by level, stops first
    numbers: measurements by name
    sample: one row as (text, learned) pieces
    plan: memory and time; None if the data cannot be read, or if memory is measured later

    Without a loaded base, only the first `looked` of `rows` rows are read (`rows` is None if the number is
    unknown), and `guesses` lists uncertain assumptions as sentences. With a base, `looked` is None."""

    findings: list[Finding] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    sample: list[tuple[str, bool]] = field(default_factory=list)
    plan: Plan | None = None
    rows: int | None = None
    looked: int | None = None
    guesses: list[str] = field(default_factory=list)

    @property
    def stops(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "stop"]

    @property
    def starts(self) -> bool:
        """Return whether the run would start."""
        fits = self.looked is None or (self.plan is not None and self.plan.fits)
        return fits and not self.stops

    def add(self, *findings: Finding) -> None:
        """Add findings, and keep all findings sorted by level, stops first."""
        order = {"stop": 0, "warn": 1, "ok": 2}
        self.findings = sorted([*self.findings, *findings], key=lambda finding: order[finding.level])

    def raise_if_stopped(self) -> None:
        """Raise PreflightError with every finding that stops the run, and the fix for each."""
        stops = self.stops
        if len(stops) == 1:
            raise PreflightError(stops[0].text, fix=stops[0].fix or None)
        if stops:
            lines = "\n".join(f"  - {f.text}" + (f"\n    fix: {f.fix}" if f.fix else "") for f in stops)
            raise PreflightError(f"{len(stops)} problems would make this run fail or train nothing:\n{lines}")

    def text(self) -> str:
        """Return the sample and the findings as text.

        Trained tokens are between ⟦ and ⟧. The most severe finding is last, so it is visible at the end of a
        terminal's output."""
        words = {"stop": "STOP", "warn": "warn", "ok": "  ok"}
        lines = []
        if self.sample:
            row = "".join(f"⟦{piece}⟧" if learned else piece for piece, learned in self.sample)
            lines = ["one row, learned tokens between ⟦ and ⟧:", row, ""]
        for f in reversed(self.findings):
            lines += [f"{words[f.level]}  {f.text}", *([f"      fix: {f.fix}"] if f.fix else [])]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values.

        Without a loaded base, the result has no measurements. Instead, it has the plan, with the number of rows
        and the assumptions that the plan is based on."""
        findings = [asdict(f) for f in self.findings]
        sample = [{"text": piece, "learned": learned} for piece, learned in self.sample]
        if self.looked is None:
            return {"ok": not self.stops, "findings": findings, "numbers": self.numbers, "sample": sample}
        plan = None if self.plan is None else self.plan.to_dict()
        based_on = {"rows": self.rows, "looked": self.looked, "guesses": self.guesses}
        return {"plan": plan, "findings": findings, "sample": sample, **based_on}


@dataclass(kw_only=True)
class RunSubject:
    """A run that is about to start. Checks read these fields, and write to `numbers` and `plan`.

    previous: the recipe of the run that is being resumed
    free_memory, free_disk: bytes; None to measure
    largest_micro: size of the largest micro-batch, in `unit`s (token, picture)
    devices: number of devices that share the run
    force: start a run that does not fit in memory according to its plan, with a warning"""

    base: Any
    config: RunConfig
    resume: bool = False
    previous: Mapping[str, Any] | None = None
    free_memory: int | None = None
    free_disk: int | None = None
    steps_per_epoch: int = 0
    largest_micro: int = 0
    unit: str = "token"
    devices: int = 1
    force: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None


def share(part: float, total: float) -> str:
    """Format a share as `12 of 40 (30%)`, with more digits below 1%."""
    percent = 100 * part / total if total else 0.0
    digits = ".0f" if percent >= 1 or not part else ".2g"
    return f"{part:,} of {total:,} ({percent:{digits}}%)"


def about_some(
    check: str, part: int, total: int, text: str, names: Sequence[str] = (), fix: str = "", *, stops: bool = False
) -> Iterator[Finding]:
    """Yield a finding about `part` of `total` rows or pictures, or nothing if `part` is 0.

    `text`: what is wrong with these rows. `names`: names of these rows; the first few are shown. `stops`: the
    level is `stop` if `part` is more than half of `total`."""
    if part:
        level: Level = "stop" if stops and part > total / 2 else "warn"
        named = f": {first_few(names, _NAMED)}" if names else ""
        yield Finding(level, check, f"{share(part, total)} {text}{named}", fix)


# --- checks that all runs share ---------------------------------------------------------------------------------------


def learning_rate(s: RunSubject) -> Iterator[Finding]:
    """Check the learning rate, the warm-up and the length of the run."""
    rate, steps = s.config.optimizer.learning_rate, s.config.steps
    preference = isinstance(s.config, TrainConfig) and s.config.preference.loss is not None
    low, high = _PREFERENCE_WINDOW if preference else _WINDOW
    if s.config.optimizer.name in ("adamw", "adam") and not low <= rate <= high:
        side = "below" if rate < low else "above"
        method = "preferences are learned" if preference else "LoRA learns"
        text = f"learning rate {rate:g} is {side} the range {low:g} to {high:g}, in which {method}"
        fix = "1e-4 to 1e-3 is where sweeps over 27 models found the best learning rates"
        yield Finding("warn", "learning rate", text, "5e-6 to 5e-5 is usual" if preference else fix)
    total = steps if steps is not None else s.steps_per_epoch * (s.config.epochs or 0)
    s.numbers.update(steps=total, steps_per_epoch=s.steps_per_epoch, largest_micro_batch=s.largest_micro)
    warm = s.config.schedule.warmup
    if isinstance(warm, int) and 0 < total <= warm:
        text = f"warm-up takes {counted(warm, 'step')}, but the run has {total}: "
        text += "the learning rate never reaches its peak"
        fix = "set schedule.warmup to a share of the steps (0.03), or train for more steps"
        yield Finding("stop", "schedule", text, fix)
    elif 0 < total < 10:
        text = f"the whole run is {counted(total, 'step')}, which is too few to learn much"
        fix = "increase schedule.steps" if steps is not None else "decrease batching.rows, or increase schedule.epochs"
        yield Finding("warn", "schedule", text, fix)
    elif total:
        passes = total / s.steps_per_epoch if s.steps_per_epoch else 0
        over = "once over the data" if passes == 1 else f"{passes:.3g} times over the data"
        largest = f"the largest micro-batch is {counted(s.largest_micro, s.unit)}"
        yield Finding("ok", "schedule", f"{counted(total, 'step')}, {over}; {largest}")


def check_devices(s: RunSubject) -> Iterator[Finding]:
    """Check whether several devices share the run."""
    sharded, batching = getattr(s.config.memory, "shard", False), s.config.batching
    if s.devices > 1:
        if batching.rows < s.devices and getattr(batching, "mode", "bucket") == "bucket":
            text = f"a step has {counted(batching.rows, 'row')}, so some of the {s.devices} devices wait"
            yield Finding("warn", "devices", text, f"set batching.rows to {s.devices} or more, or use fewer devices")
        how = "each device holds a part of the frozen weights" if sharded else "each device holds the full base"
        yield Finding("ok", "devices", f"{s.devices} devices share the micro-batches of each step; {how}")
    elif sharded:
        text = "memory.shard splits the weights over several devices, but this run has one device"
        yield Finding("warn", "devices", text, "start the run with --devices N, or remove memory.shard")


def precision(s: RunSubject) -> Iterator[Finding]:
    """Check for dtypes that silently overflow or underflow."""
    model = s.base.model
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()})
    device = computes_on(s.base)
    s.numbers.update(dtype=kinds, device=str(device))
    if "float16" in kinds:
        text = f"the base is float16 on {device.type}: gradients below 6e-8 vanish, values above 65,504 become infinite"
        level: Level = "stop" if device.type == "cpu" else "warn"
        yield Finding(level, "precision", text, "set base.dtype=bfloat16 (or float32)")
    else:
        yield Finding("ok", "precision", f"base in {', '.join(kinds)} on {device.type}, adapter, optimizer in float32")


def computes_on(base: Any) -> torch.device:
    """Return the device of the base's weights, or the device to which unread weights will be loaded."""
    unread = getattr(base, "unread", None) is not None  # an image base has no such attribute
    return torch.device(base.device if unread else next(base.model.parameters()).device)


def check_output(s: RunSubject) -> Iterator[Finding]:
    """Check the output folder, the disk space, and the settings of a resumed run."""
    folder = Path(s.config.output.directory)
    if folder.exists() and not folder.is_dir():
        yield Finding("stop", "output", f"{folder} is a file, not a folder", "give another output.directory")
        return
    used = folder.is_dir() and any(p.name != CACHE for p in folder.iterdir())
    if used and not s.resume:
        text = f"{folder} already holds a run or other files; nothing is overwritten"
        yield Finding("stop", "output", text, "continue with --resume, or set another output.directory")
    if s.resume and s.previous is not None:
        changes = differences(_fixed_settings(s.previous), _fixed_settings(s.config.recipe()))
        if changes:
            text = f"the run in {folder} was started with other settings: {'; '.join(changes)}"
            fix = "resume with the same settings, or start a new run in another output.directory"
            yield Finding("stop", "resume", text, fix)
    trainable = int(s.numbers.get("trainable", 0))
    # A checkpoint has the weights and AdamW's two moments. The disk has to hold the newest checkpoints, the one
    # being written, the best one, and the adapter.
    need = (s.config.checkpoint.keep + 2) * 12 * trainable + 8 * trainable
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = s.free_disk if s.free_disk is not None else shutil.disk_usage(there).free
    s.numbers.update(disk_needed=need, disk_free=free)
    if need > free:
        text = f"checkpoints and adapter need {gigabytes(need)} on disk, but {there} has {gigabytes(free)} free"
        yield Finding("stop", "disk", text, "free some space, or set another output.directory or checkpoint.keep=1")
    else:
        text = f"checkpoints and adapter need at most {gigabytes(need)}, {gigabytes(free)} are free"
        yield Finding("ok", "disk", text)


def _fixed_settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe that a resumed run cannot change, as JSON values.

    For a server's URL, the result contains only whether a URL is set."""
    out: dict[str, Any] = {}
    for section, values in recipe.items():
        settings = values if isinstance(values, Mapping) else {"": values}
        for key, value in settings.items():
            name = f"{section}.{key}" if key else section
            if name == "reinforcement.rewards":
                value = [
                    {k: v is not None if k == "url" else v for k, v in reward.items() if k not in _FREE_OF_REWARDS}
                    for reward in value or ()
                ]
            if section not in _FREE_TO_CHANGE and name not in _FREE_KEYS:
                out[name] = value
    return json.loads(json.dumps(out))  # type: ignore[no-any-return]


# --- memory -----------------------------------------------------------------------------------------------------------


def available_memory(config: RunConfig, device: torch.device, free: int | None = None) -> int:
    """Return the bytes that the run can still use, at most `memory.limit_gb`.

    free: free bytes on the device; None to measure."""
    free = free_memory(device) if free is None else free
    return free if config.memory.limit_gb is None else min(free, int(config.memory.limit_gb * 1e9))


def recomputes(mode: str, need: int | None, free: int | None) -> tuple[bool, str]:
    """Return (whether to recompute activations in the backward pass, the reason).

    mode: memory.activation_checkpointing; "auto" recomputes if `need` is above 90% of `free`. need: bytes
    that are needed in addition to the base if all activations are stored."""
    if mode != "auto":
        return mode == "on", ""
    if need is None or free is None:
        return False, "the memory that the run needs is not known"
    return need > 0.9 * free, f"about {need / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; on if above 90%"


def memory_finding(need: int, free: int, detail: str, *, fix: str, force: bool) -> Finding:
    """Return a finding on whether `need`, in bytes beyond the base, fits in memory.

    force: if the run does not fit, return a warning instead of a stop."""
    if need <= free:
        text = f"needs about {gigabytes(need)} in addition to the base, {gigabytes(free)} free; {detail}"
        return Finding("ok", "memory", text)
    text = f"it needs about {gigabytes(need)} in addition to the base, but {gigabytes(free)} are free; {detail}"
    return Finding("warn" if force else "stop", "memory", f"this run does not fit: {text}", fix)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated, up to the container's limit."""
    if device.type == "cuda":
        return free_on_gpu(device)
    import psutil

    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        cached = int((group / "memory.stat").read_text().partition("\ninactive_file ")[2].partition("\n")[0])
        return free if limit == "max" else min(free, int(limit) - used + cached)
    except (OSError, ValueError):
        return free


def used_memory(device: torch.device) -> int:
    """Return the bytes that this process uses.

    On CUDA, this is the memory allocated by torch; otherwise, the resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def trainable_parameters(model: nn.Module, targets: list[Target], spec: LoraSpec) -> tuple[int, int]:
    """Return the numbers of trainable parameters as (in pairs, in full modules and token rows)."""
    modules: dict[str, Any] = dict(base_modules(model))
    pairs = sum(_pair_parameters(modules[t.module_name], t, spec) for t in targets)
    full = sum(p.numel() for name in full_modules(model, spec) for p in modules[name].parameters())
    rows = sum(len(ids) * modules[name].weight.shape[1] for name, ids in token_embeddings(model, spec).items())
    return pairs, full + rows


def _pair_parameters(module: Any, target: Target, spec: LoraSpec) -> int:
    """Return the number of parameters that `spec` adds to `target`.

    These are A, B and DoRA's magnitude, or the parts of a LoHa or LoKr."""
    rank = next((r for p, r in spec.rank_pattern.items() if target_matches(p, target.name)), spec.rank)
    form = PairForm.of(spec)
    if target.kind == "experts":
        experts, *matrix = getattr(module, target.parameter or "").shape
        return int(experts) * form.costs(tuple(matrix), rank).parameters
    # a quantized weight is stored in a different shape, so use the module's features
    linear = hasattr(module, "in_features")
    shape = (module.out_features, module.in_features) if linear else tuple(module.weight.shape)
    return form.costs(shape, rank).parameters + spec.dora * int(shape[0])
