"""Preflight of the base, the adapter and the machine: what is trained, whether it fits, and where it goes."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from veneer.core.adapter import Adapter
from veneer.core.targets import base_modules, expert_parameters, matches, matches_per_pattern, resolve
from veneer.errors import TargetError
from veneer.plan.plan import Plan
from veneer.plan.render import duration
from veneer.train.config.text import TrainConfig
from veneer.train.estimate import free_memory, trainable_parameters
from veneer.train.findings import Finding, RunSubject, Subject, gigabytes, share
from veneer.train.planning import plan_of_run, still_needed, to_be_set

__all__ = ["CACHE", "RUN_CHECKS", "learning_rate", "precision", "recipe_changes", "shared_out", "where_it_goes"]

_WINDOW = (1e-5, 3e-3)  # below, LoRA barely moves; of 80 runs that diverged in a public sweep, 72 were at 3e-3
_GUESSED = (
    "elsewhere such guesses were right within a tenth of the peak, and runs took 1.2 to 3.3 times as long "
    "(docs/how-to/plan.md)"
)
"""The runs of benchmarks/plan.py beside what is planned without their calibration."""
_PREFERENCE_WINDOW = (1e-6, 5e-4)  # around what published preference runs with LoRA took, 5e-6 to 5e-5
_FREE_TO_CHANGE = {"evaluation", "checkpoint", "memory", "samples"}  # sections that a resumed run may change
_FREE_KEYS = {"batching.micro_rows", "batching.micro_tokens", "base.device", "data.train", "data.validation"}
_FREE_KEYS |= {"data.pictures", "data.class_folder", "data.cache"}  # where they are; what is in them is compared
CACHE = "cache"
"""A folder in the output that an earlier run may have left: latents and class pictures, which are never stale."""


def what_is_trained(s: Subject) -> Iterator[Finding]:
    """Failure classes 3 and 12: an adapter that reaches nothing, and one that is huge because it holds full copies."""
    model, spec = s.base.model, s.config.adapter.spec()
    if s.start is not None:
        yield from _going_on(s, s.start)
        return
    try:
        found = matches_per_pattern(model, spec)
        targets = resolve(model, spec)
        pairs, whole = trainable_parameters(model, targets, spec)
    except TargetError as error:
        yield Finding(
            "stop", "targets", str(error.what) + (f" ({error.where})" if error.where else ""), error.fix or ""
        )
        return
    total = sum(p.numel() for p in model.parameters())
    s.numbers.update(matched={p: len(names) for p, names in found.items()}, pairs=len(targets), base_parameters=total)
    s.numbers.update(trainable=pairs + whole, adapter_bytes=4 * (pairs + whole))
    matched = ", ".join(f"`{p}` {len(names)} modules" for p, names in found.items())
    size = gigabytes(4 * (pairs + whole))
    yield Finding("ok", "targets", f"{matched}; trainable: {share(pairs + whole, total)} parameters, a file of {size}")
    if whole > pairs:
        text = (
            f"full copies take {share(whole, pairs + whole)} of the adapter, a file of {size}: "
            f"{', '.join([*spec.modules_to_save, *spec.token_rows])}"
        )
        yield Finding(
            "warn", "size", text, "train single rows with adapter.token_rows, or drop adapter.modules_to_save"
        )


def _going_on(s: Subject, start: Adapter) -> Iterator[Finding]:
    count, size = sum(t.numel() for _, t in start.tensors()), start.size_bytes()
    total = sum(p.numel() for p in s.base.model.parameters())
    s.numbers.update(pairs=len(start.pairs), base_parameters=total, trainable=count, adapter_bytes=size)
    if start.deltas:
        kinds = ", ".join(sorted({d.form for d in start.deltas.values()}))
        text = f"adapter.start holds deltas that are no pairs ({kinds}), which cannot be trained"
        yield Finding("stop", "targets", text, "go on from a LoRA adapter")
    text = (
        f"goes on from {s.config.adapter.start}: {len(start.pairs)} pairs; trainable: {share(count, total)} parameters"
    )
    yield Finding("ok", "targets", f"{text}, a file of {gigabytes(size)}")


def experts_are_reached(s: Subject) -> Iterator[Finding]:
    """Failure class 4: experts, most of a mixture model's weights, silently frozen."""
    if s.start is not None:
        return  # it trains what it was made for
    model, spec = s.base.model, s.config.adapter.spec()
    experts: dict[str, int] = {}
    for name, module in base_modules(model):
        for parameter in expert_parameters(module):
            if parameter.endswith("proj") or "Experts" in type(module).__name__:
                experts[f"{name}.{parameter}"] = int(getattr(module, parameter).numel())
        if ".experts." in name and hasattr(module, "in_features"):
            experts[name] = int(module.in_features) * int(module.out_features)  # type: ignore[arg-type, call-overload]
    if spec.layers is not None:
        inside = {str(layer) for layer in spec.layers}
        experts = {n: size for n, size in experts.items() if inside & set(n.split("."))}
    if not experts:
        return
    try:
        reached = {t.name for t in resolve(model, spec)} & set(experts)
    except TargetError:
        return  # said by what_is_trained
    meant = {n for n in experts if any(matches(p, n) or matches(p, n.rpartition(".")[0]) for p in spec.exclude)}
    frozen = sorted(set(experts) - reached - meant)
    s.numbers.update(expert_parameters=len(experts), experts_reached=len(reached))
    if frozen:
        part = share(sum(experts[n] for n in frozen), sum(p.numel() for p in model.parameters()))
        text = (
            f"{len(frozen)} of {len(experts)} expert weights get no pair and stay frozen, {part} of the base's "
            f"parameters: {', '.join(frozen[:2])}"
        )
        names = sorted({n.rpartition(".")[2] for n in frozen})
        fix = f"add {', '.join(names)} to adapter.targets (or all-linear), or say adapter.exclude: ['*experts*']"
        yield Finding("stop", "experts", text, fix)
    elif reached:
        yield Finding("ok", "experts", f"{len(reached)} expert weights get a pair for each expert")


def learning_rate(s: RunSubject) -> Iterator[Finding]:
    """The rate, the warm-up and the length of the run."""
    rate, steps = s.config.optimizer.learning_rate, s.config.steps
    preference = isinstance(s.config, TrainConfig) and s.config.preference.loss is not None
    low, high = _PREFERENCE_WINDOW if preference else _WINDOW
    if s.config.optimizer.name in ("adamw", "adam", "nadam", "radam", "adamax") and not low <= rate <= high:
        side = "below" if rate < low else "above"
        what = "preferences are learned" if preference else "LoRA learns"
        text = f"learning rate {rate:g} is {side} the window {low:g} to {high:g} in which {what}"
        fix = "1e-4 to 1e-3 is where sweeps over 27 models found their best"
        yield Finding("warn", "learning rate", text, "5e-6 to 5e-5 is usual" if preference else fix)
    total = steps if steps is not None else s.steps_per_epoch * (s.config.epochs or 0)
    s.numbers.update(steps=total, steps_per_epoch=s.steps_per_epoch, largest_micro_batch=s.largest_micro)
    warm = s.config.schedule.warmup
    if isinstance(warm, int) and 0 < total <= warm:
        text = f"warm-up takes {warm} steps and the run has {total}: the learning rate never reaches its peak"
        yield Finding("stop", "schedule", text, "schedule.warmup as a share (0.03), or more steps")
    elif 0 < total < 10:
        text = f"the whole run is {total} steps: too few to learn much"
        fix = "more schedule.steps" if steps is not None else "fewer batching.rows, or more schedule.epochs"
        yield Finding("warn", "schedule", text, fix)
    elif total:
        passes = f"{total / s.steps_per_epoch:.3g} times over the data" if s.steps_per_epoch else ""
        largest = f"the largest micro-batch is {s.largest_micro:,} {s.unit}"
        yield Finding("ok", "schedule", f"{total:,} steps, {passes}; {largest}")


def shared_out(s: RunSubject) -> Iterator[Finding]:
    """How the work of a step falls to several devices."""
    n = s.devices
    sharded = getattr(s.config.memory, "shard", False)
    if n == 1:
        if sharded:
            text = "memory.shard splits the weights over several devices, and this run has one"
            yield Finding("warn", "devices", text, "start it with --devices N, or leave memory.shard out")
        return
    least, most = min(s.micros, default=0), max(s.micros, default=0)
    s.numbers.update(devices=n, micro_batches=[least, most])
    idle = sum(count < n for count in s.micros)
    if 10 * idle > len(s.micros):  # the last step of an epoch may be a small one
        text = f"{idle} of {len(s.micros)} steps have fewer micro-batches than the {n} devices: some of them wait"
        yield Finding("warn", "devices", text, f"batching.rows of {n} or more, or fewer devices")
    each = f"{-(-least // n)} to {-(-most // n)}" if -(-least // n) != -(-most // n) else f"{-(-most // n)}"
    how = "each holds a part of the frozen weights" if sharded else "each holds the whole base"
    text = f"{n} devices share each step, at most {each} micro-batches for one; {how}"
    yield Finding("ok", "devices", text)


def precision(s: RunSubject) -> Iterator[Finding]:
    """Failure class 10: dtypes that overflow or underflow without a word."""
    model = s.base.model
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()})
    device = next(model.parameters()).device
    s.numbers.update(dtype=kinds, device=str(device))
    if "float16" in kinds:
        text = (
            f"the base is float16 on {device.type}: gradients below 6e-8 vanish and values above 65,504 become infinite"
        )
        fix = "base.dtype=bfloat16 (or float32)"
        yield Finding("stop" if device.type == "cpu" else "warn", "precision", text, fix)
    elif len(kinds) > 1:
        yield Finding("warn", "precision", f"the base mixes {' and '.join(kinds)}", "base.dtype=bfloat16 (or float32)")
    else:
        yield Finding("ok", "precision", f"base in {', '.join(kinds)} on {device.type}, pairs and optimizer in float32")


def vocabulary(s: Subject) -> Iterator[Finding]:
    """Tokens without an embedding row, and rows never trained (a chat template on a base that never saw one)."""
    embedding = s.base.model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    used = {token for e in s.encoded.examples for token in e.input_ids}
    s.numbers.update(distinct_tokens=len(used), embedding_rows=rows)
    beyond = sorted(t for t in used if t >= rows)
    if beyond:
        names = ", ".join(f"`{s.base.tokenizer.convert_ids_to_tokens(t)}` ({t})" for t in beyond[:5])
        text = f"{len(beyond)} tokens of the data have no row in the base's embedding of {rows:,} rows: {names}"
        yield Finding("stop", "vocabulary", text, "the tokenizer belongs to another base: use the base's own")
        return
    added = sorted((set(s.base.tokenizer.added_tokens_decoder) & used) - {getattr(embedding, "padding_idx", None)})
    if not added or not embedding.weight.is_floating_point():
        return
    weight = embedding.weight.detach()
    sample, norms = weight[:4096].float().norm(dim=1), weight[added].float().norm(dim=1)
    dead = [t for t, norm in zip(added, norms.tolist(), strict=True) if norm < 0.05 * float(sample.median())]
    config = s.config.adapter
    learned = {i for ids in config.token_rows.values() for i in ids}
    dead = [t for t in dead if t not in learned]
    if dead and not any("embed" in m or "wte" in m for m in config.modules_to_save):
        names = ", ".join(f"`{s.base.tokenizer.convert_ids_to_tokens(t)}` ({t})" for t in dead[:5])
        text = f"{len(dead)} added tokens of the data have embedding rows near zero, never trained: {names}"
        yield Finding("warn", "vocabulary", text, "train their rows: adapter.token_rows: {embed_tokens: [IDS]}")


def it_fits(s: Subject) -> Iterator[Finding]:
    """Failure class 8: out of memory hours in, when the longest rows come."""
    model, config = s.base.model, s.config
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context and s.longest > context:
        text = f"the longest row has {s.longest:,} tokens and the base reads {context:,}"
        yield Finding("stop", "memory", text, f"data.max_length={context} with data.long_rows=cut or drop")
    device = next(model.parameters()).device
    free = s.free_memory if s.free_memory is not None else free_memory(device)
    if config.memory.limit_gb is not None:
        free = min(free, int(config.memory.limit_gb * 1e9))
    mode = config.memory.activation_checkpointing
    plain, again = (plan_of_run(s, checkpointing=c, room=free) for c in (False, True))
    need, less = (still_needed(plan.memory, plan.device) for plan in (plain, again))
    on = mode == "on" or (mode == "auto" and need > 0.9 * free)
    chosen = again if on else plain
    s.numbers.update(memory_needed=need, memory_checkpointed=less, memory_free=free)
    keeps = _keeps(s, chosen, device.type)
    s.numbers.update(predicted_peak_bytes=chosen.memory.peak + keeps, predicted_parts=chosen.memory.parts)
    s.numbers.update(kept_dequantised=keeps)
    if not chosen.changes and chosen.seconds is not None:
        s.numbers.update(predicted_seconds=round(chosen.seconds, 4))
    wanted = less if on else need
    size = f"about {gigabytes(wanted)} beyond the base, {gigabytes(free)} free"
    longest = f"the largest micro-batch has {s.largest_micro:,} tokens, the longest row {s.longest:,}"
    if wanted > free:
        text = (
            f"this run does not fit: it needs about {gigabytes(wanted)} beyond the base, and "
            f"{gigabytes(free)} are free; {longest}"
        )
        fix = to_be_set(chosen) or "a smaller base, or a machine with more memory (veneer plan shows what it takes)"
        yield Finding("warn" if s.force else "stop", "memory", text, fix)
    elif wanted > 0.9 * free and mode == "off":
        text = f"this run may not fit: {size}; {longest}"
        yield Finding("warn", "memory", text, "memory.activation_checkpointing=auto")
    elif on and mode == "auto":
        yield Finding("ok", "memory", f"activations will be recomputed to save memory: {size}; {longest}")
    else:
        yield Finding("ok", "memory", f"{size}; {longest}")
    yield from _predicted(chosen)


def _keeps(s: Subject, plan: Plan, device: str) -> int:
    """Bytes of a quantised base's weights that stay dequantised: as asked for; else on a GPU most of what the plan
    finds room for, and on a CPU none, where it gives 4% (docs/notes/qlora.md)."""
    if not getattr(s.base, "quantised", ""):
        return 0
    if s.config.memory.keep_dequantised_gb is not None:
        return int(s.config.memory.keep_dequantised_gb * 1e9)
    return 8 * plan.keeps // 10 if device == "cuda" else 0


def _predicted(plan: Plan) -> Iterator[Finding]:
    """The plan in short: what the process will hold at its peak, and how long training takes."""
    if plan.seconds is None or plan.changes:
        return
    text = f"plan: a peak of {gigabytes(plan.memory.peak)}, {duration(plan.seconds)} of training ({plan.rates.source})"
    if not plan.rates.measured:
        text += "; not calibrated here"
        if plan.device.kind == "cpu":
            text += f": {_GUESSED}"
    yield Finding("ok", "plan", text)


def where_it_goes(s: RunSubject) -> Iterator[Finding]:
    """Output in use, disk space, and resuming into a different configuration."""
    folder = Path(s.config.output.directory)
    if folder.exists() and not folder.is_dir():
        yield Finding("stop", "output", f"{folder} is a file, not a folder", "give another output.directory")
        return
    used = folder.is_dir() and any(p.name != CACHE for p in folder.iterdir())
    if used and not s.resume:
        text = f"{folder} already holds a run or other files; nothing is overwritten"
        yield Finding("stop", "output", text, "go on with --resume, or give another output.directory")
    if s.resume and s.previous is not None:
        changes = recipe_changes(s.previous, s.config.recipe())
        if changes:
            text = f"the run in {folder} was started with other settings: {'; '.join(changes)}"
            yield Finding(
                "stop", "resume", text, "resume with the same settings, or start anew in another output.directory"
            )
    trainable = int(s.numbers.get("trainable", 0))
    # a checkpoint: weights and AdamW's two moments; the newest ones, the one being written, the best; and the adapter
    need = (s.config.checkpoint.keep + 2) * 12 * trainable + 8 * trainable
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = s.free_disk if s.free_disk is not None else shutil.disk_usage(there).free
    s.numbers.update(disk_needed=need, disk_free=free)
    if need > free:
        text = f"checkpoints and adapter need {gigabytes(need)} on disk, and {there} has {gigabytes(free)} free"
        yield Finding("stop", "disk", text, "free some space, give another output.directory, or checkpoint.keep=1")
    else:
        yield Finding(
            "ok", "disk", f"checkpoints and adapter need at most {gigabytes(need)}, {gigabytes(free)} are free"
        )


def recipe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two recipes and changes what a run learns, as `adapter.rank: 16 before, 8 now`."""

    def flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for section, values in recipe.items():
            if section not in _FREE_TO_CHANGE:
                out.update(
                    {f"{section}.{k}": v for k, v in values.items()}
                    if isinstance(values, Mapping)
                    else {section: values}
                )
        return {k: v for k, v in out.items() if k not in _FREE_KEYS}

    a, b = flat(before), flat(now)
    return [f"{k}: {a.get(k)} before, {b.get(k)} now" for k in sorted(a | b) if not _equal(a.get(k), b.get(k))]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12)
    listed = [list(x) if isinstance(x, tuple) else x for x in (a, b)]
    return bool(listed[0] == listed[1])


RUN_CHECKS: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
    what_is_trained,
    experts_are_reached,
    learning_rate,
    shared_out,
    precision,
    vocabulary,
    it_fits,
    where_it_goes,
)
