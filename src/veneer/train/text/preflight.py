"""Preflight of a text run: rows, trained modules, vocabulary, and memory.

The checks of the data are in `checks`, those for all runs in `train.preflight`. Changes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from veneer.core.adapter import Adapter
from veneer.core.targets import base_modules, expert_parameters, matches_per_pattern, resolve_targets, target_matches
from veneer.errors import TargetError, counted, gigabytes
from veneer.ops.linear import keeps_copy
from veneer.ops.weight_panels import panels_here
from veneer.plan.memory import packed_weights
from veneer.plan.plan import Plan
from veneer.plan.render import rough_duration
from veneer.plan.shape import model_shape
from veneer.train.config.text import TrainConfig
from veneer.train.planning import plan_of_run, still_needed, to_be_set
from veneer.train.preflight import (
    Finding,
    Report,
    available_memory,
    computes_on,
    learning_rate,
    memory_finding,
    precision,
    recomputes,
    share,
    shared_out,
    trainable_parameters,
    undivided,
    where_it_goes,
)
from veneer.train.text.batches import plan_steps
from veneer.train.text.checks import TextSubject, data_findings
from veneer.train.text.data import TextData
from veneer.train.text.encode import Example
from veneer.train.text.prompts import PromptItem, first_rollouts

_GUESSED = (
    "elsewhere such guesses were right within a tenth of the peak, and runs took 1.2 to 3.3 times as long "
    "(docs/how-to/plan.md)"
)
"""Error of the plans of benchmarks/plan.py without calibration of the machine."""


def text_preflight(base: Any, config: TrainConfig, data: TextData, *, devices: int = 1, **options: Any) -> Report:
    """Inspect a run on a loaded base; see `inspect_run`."""
    encoded, lengths = data.train.encoded, [item.tokens for item in data.train.items]
    if config.drawn is not None:
        prompts = [item for item in data.train.items if isinstance(item, PromptItem)]
        steps = first_rollouts(prompts, config, data.train.rows)
        micros = [[micro.tokens for micro in step.micros] for step in steps]
    else:
        plan = plan_steps(lengths, config.batching, seed=config.seed, epoch=0, pieces=devices)
        micros = [[sum(lengths[i] for i in micro) for micro in step] for step in plan]
    subject = TextSubject(
        base=base,
        config=config,
        data=data,
        devices=devices,
        steps_per_epoch=len(micros),
        largest_micro=max((tokens for step in micros for tokens in step), default=0),
        micros=[len(step) for step in micros],
        **options,
    )
    report = Report(numbers=subject.numbers)
    report.add(*data_findings(subject), *(finding for check in _BASE_CHECKS for finding in check(subject)))
    report.sample = marked_pieces(encoded.examples[0], base.tokenizer) if encoded.examples else []
    report.plan = subject.plan
    return report


def marked_pieces(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the row as (text, trained) pieces: runs of tokens with equal masks."""
    pieces: list[tuple[list[int], bool]] = []
    for token, trained in zip(example.input_ids, example.trained, strict=True):
        if not pieces or pieces[-1][1] != trained:
            pieces.append(([], trained))
        pieces[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), trained) for ids, trained in pieces]


def _what_is_trained(s: TextSubject) -> Iterator[Finding]:
    """Failure classes 3 and 12: an adapter without targets, or with full copies.

    Full copies make the adapter huge."""
    model, spec = s.base.model, s.config.adapter.spec()
    if s.data.start is not None:
        yield from _going_on(s, s.data.start)
        return
    try:
        found = matches_per_pattern(model, spec)
        targets = resolve_targets(model, spec)
        pairs, whole = trainable_parameters(model, targets, spec)
    except TargetError as error:
        yield Finding(
            "stop", "targets", str(error.what) + (f" ({error.where})" if error.where else ""), error.fix or ""
        )
        return
    total = sum(p.numel() for p in model.parameters())
    s.numbers.update(matched={p: len(names) for p, names in found.items()}, pairs=len(targets), base_parameters=total)
    s.numbers.update(trainable=pairs + whole, adapter_bytes=4 * (pairs + whole))
    matched = ", ".join(f"`{p}` {counted(len(names), 'module')}" for p, names in found.items())
    size = gigabytes(4 * (pairs + whole))
    yield Finding("ok", "targets", f"{matched}; trainable: {share(pairs + whole, total)} parameters, a file of {size}")
    yield from undivided([(model, targets, spec)])
    if whole > pairs:
        text = (
            f"full copies take {share(whole, pairs + whole)} of the adapter, a file of {size}: "
            f"{', '.join([*spec.modules_to_save, *spec.token_rows])}"
        )
        yield Finding(
            "warn", "size", text, "train single rows with adapter.token_rows, or drop adapter.modules_to_save"
        )


def _going_on(s: TextSubject, start: Adapter) -> Iterator[Finding]:
    count, size = sum(t.numel() for _, t in start.tensors()), start.size_bytes()
    total = sum(p.numel() for p in s.base.model.parameters())
    s.numbers.update(pairs=len(start.pairs), base_parameters=total, trainable=count, adapter_bytes=size)
    if wrong := {d.form for d in start.deltas.values()} - {"hadamard", "kronecker"}:
        kinds = ", ".join(sorted(wrong))
        text = f"adapter.start holds deltas that are not pairs ({kinds}), which cannot be trained"
        yield Finding("stop", "targets", text, "go on from a LoRA, LoHa or LoKr")
    text = f"starts from {s.config.adapter.start}: {counted(len(start.pairs), 'pair')}; "
    text += f"trainable: {share(count, total)} parameters"
    yield Finding("ok", "targets", f"{text}, a file of {gigabytes(size)}")


def _experts_are_reached(s: TextSubject) -> Iterator[Finding]:
    """Failure class 4: experts, most of a mixture model's weights, silently frozen."""
    if s.data.start is not None:
        return  # it trains the modules of its adapter
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
        reached = {t.name for t in resolve_targets(model, spec)} & set(experts)
    except TargetError:
        return  # reported by _what_is_trained
    meant = {
        n for n in experts if any(target_matches(p, n) or target_matches(p, n.rpartition(".")[0]) for p in spec.exclude)
    }
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


def vocabulary(s: TextSubject) -> Iterator[Finding]:
    """Report tokens without an embedding row, and embedding rows never trained.

    The latter occur with a chat template on a base without one."""
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
    weight, unread = embedding.weight.detach(), getattr(s.base, "unread", None)
    name = next((n for n, p in s.base.model.named_parameters() if p is embedding.weight), "")
    first = range(min(4096, rows))
    some, those = (unread.rows(name, at) if unread else weight[list(at)] for at in (first, added))
    sample, norms = some.float().norm(dim=1), those.float().norm(dim=1)
    dead = [t for t, norm in zip(added, norms.tolist(), strict=True) if norm < 0.05 * float(sample.median())]
    config = s.config.adapter
    learned = {i for ids in config.token_rows.values() for i in ids}
    dead = [t for t in dead if t not in learned]
    if dead and not any("embed" in m or "wte" in m for m in config.modules_to_save):
        names = ", ".join(f"`{s.base.tokenizer.convert_ids_to_tokens(t)}` ({t})" for t in dead[:5])
        text = f"{len(dead)} added tokens of the data have embedding rows near zero, never trained: {names}"
        yield Finding("warn", "vocabulary", text, "train their rows: adapter.token_rows: {embed_tokens: [IDS]}")


def _it_fits(s: TextSubject) -> Iterator[Finding]:
    """Failure class 8: out of memory hours into a run, at the longest rows."""
    model, config = s.base.model, s.config
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context and s.longest > context:
        text = f"the longest row has {s.longest:,} tokens and the base reads {context:,}"
        yield Finding("stop", "memory", text, f"data.max_length={context} with data.long_rows=cut or drop")
    device = computes_on(s.base)
    free = available_memory(config, device, s.free_memory)
    mode = config.memory.recomputing
    plain, again = (
        plan_of_run(
            config,
            s.base,
            s.data.train.items,
            trainable=int(s.numbers.get("trainable", 0)),
            held_out=len(s.data.held.encoded.examples),
            checkpointing=recomputed,
            room=free,
        )
        for recomputed in (False, True)
    )
    need, less = (still_needed(plan.memory, plan.device) for plan in (plain, again))
    on, _ = recomputes(mode, need, free)
    s.plan = chosen = again if on else plain
    s.numbers.update(memory_needed=need, memory_checkpointed=less, memory_free=free)
    unpacked = _why_unpacked(s, device.type)
    drawer, kept = (0, 0) if unpacked else _packs(s, chosen, on)
    keeps, packs = _keeps(s, chosen, device.type), drawer + kept
    peak, parts = chosen.memory.peak + keeps + packs, {**chosen.memory.parts, "packed": packs}
    s.numbers.update(predicted_peak_bytes=peak, predicted_parts=parts)
    s.numbers.update(kept_dequantized=keeps, kept_packed=kept, drawer_packed=drawer)
    if not chosen.changes and chosen.seconds is not None:
        s.numbers.update(predicted_seconds=round(chosen.seconds, 4))
    wanted = (less if on else need) + packs
    longest = f"the largest micro-batch has {s.largest_micro:,} tokens, the longest row {s.longest:,}"
    limited = config.memory.limit_gb is not None and free == int(config.memory.limit_gb * 1e9)
    more = "a higher memory.limit_gb" if limited else "a machine with more memory"
    fix = to_be_set(chosen) or f"a smaller base, or {more} (veneer plan shows what it takes)"
    if wanted - packs <= free < wanted:
        fix = "memory.keep_packed_gb=0"
    found = memory_finding(wanted, free, longest, fix=fix, force=s.force)
    if wanted <= free and wanted > 0.9 * free and mode == "off":
        found = Finding("warn", "memory", f"this run may not fit: {found.text}", "memory.activation_checkpointing=auto")
    elif wanted <= free and on and mode == "auto":
        found = replace(found, text=f"activations will be recomputed to save memory: {found.text}")
    yield found
    if packs:
        text = f"{gigabytes(packs)} of it are frozen weights kept a second time, in the order of their products"
        yield Finding("ok", "memory", text)
    yield from _nothing_kept(s, packs, unpacked or "no product is measured faster so here")
    yield from _predicted(chosen, packs)


def _why_unpacked(s: TextSubject, device: str) -> str:
    """Why no weight of this base can be kept packed, whatever its products; "" where some may."""
    quantized = bool(getattr(s.base, "quantized", ""))
    reasons = {
        "it is quantized": quantized,
        "it is sharded": s.config.memory.shard,
        "it is not on a CPU": device != "cpu",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _nothing_kept(s: TextSubject, packs: int, why: str) -> Iterator[Finding]:
    """Report settings that keep weights when there are none to keep.

    `why`: the reason that nothing is packed."""
    memory = s.config.memory
    if memory.keep_packed_gb and not packs:
        text = f"memory.keep_packed_gb: no weight of this base is kept in the order of its products: {why}"
        yield Finding("warn", "memory", text, "leave it out")
    if memory.keep_dequantized_gb and not getattr(s.base, "quantized", ""):
        text = "memory.keep_dequantized_gb: this base is not quantized, so no weight is kept dequantized"
        yield Finding("warn", "memory", text, "leave it out, or set base.quantize")


def _keeps(s: TextSubject, plan: Plan, device: str) -> int:
    """Bytes of a quantized base's weights that stay dequantized: as asked for; else on a GPU most of what the plan
    finds room for, and on a CPU none, where it gives 4% (docs/notes/qlora.md)."""
    if not getattr(s.base, "quantized", ""):
        return 0
    if s.config.memory.keep_dequantized_gb is not None:
        return int(s.config.memory.keep_dequantized_gb * 1e9)
    return 8 * plan.keeps // 10 if device == "cuda" else 0


def _packs(s: TextSubject, plan: Plan, recomputed: bool) -> tuple[int, int]:
    """Return the bytes of packed weights for sampling and for training.

    The packed weights are those with clearly faster products on this machine, up to the configured bytes.
    Without a setting, all of them are packed if the plan has room (for training, only if no activations are
    recomputed), else none.

    Sampling comes first: repacking all weights for each token takes several times as long as the products."""
    asked = s.config.memory.keep_packed_gb
    if asked == 0:
        return 0, 0
    dtype = next(s.base.model.parameters()).dtype
    shape, name = model_shape(s.base.model), str(dtype).removeprefix("torch.")
    drawer = kept = 0
    if s.config.drawn is not None and panels_here(16, dtype):
        drawer = packed_weights(shape, name, lambda _rows, _columns, turned: turned)
    if asked is not None or (plan.packs and not recomputed):
        kept = packed_weights(shape, name, functools.partial(keeps_copy, dtype))
    if asked is not None:
        return min(drawer, int(asked * 1e9)), min(kept, int(asked * 1e9))
    room = 8 * (plan.room - plan.memory.peak) // 10
    drawer *= drawer <= room
    return drawer, kept * (drawer + kept <= room)


def _predicted(plan: Plan, packs: int) -> Iterator[Finding]:
    """Report the plan: the process's peak memory and the training time."""
    if plan.seconds is None or plan.changes:
        return
    takes = f"{rough_duration(plan.seconds)} of training ({plan.rates.source})"
    text = f"plan: a peak of {gigabytes(plan.memory.peak + packs)}, {takes}"
    if not plan.rates.measured:
        text += "; not calibrated here"
        if plan.device.kind == "cpu":
            text += f": {_GUESSED}"
    yield Finding("ok", "plan", text)


_BASE_CHECKS: tuple[Callable[[TextSubject], Iterator[Finding]], ...] = (
    _what_is_trained,
    _experts_are_reached,
    learning_rate,
    shared_out,
    precision,
    vocabulary,
    _it_fits,
    where_it_goes,
)
