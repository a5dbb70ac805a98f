"""Preflight of a text run: rows, trained modules, vocabulary, and memory.

Each check is a function of the run that yields findings. `_DATA_CHECKS` and `_PROMPT_CHECKS` only need the
base's tokenizer; `_BASE_CHECKS` need its weights. The checks of all kinds of runs are in `train.preflight`.
No check changes anything.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from veneer.core.targets import matches_per_pattern, resolve_targets, target_matches
from veneer.errors import TargetError, counted, gigabytes
from veneer.ops.int8 import torch_sums_are_exact
from veneer.ops.linear import keeps_copy
from veneer.ops.profile import WORTH, profile
from veneer.ops.weight_panels import panels_here
from veneer.plan.memory import packed_weights
from veneer.plan.plan import Plan
from veneer.plan.render import rough_duration
from veneer.plan.shape import layer_pairs, model_shape
from veneer.train.config.text import TrainConfig
from veneer.train.lazy import token_counts
from veneer.train.planning import plan_of_run, remaining_bytes, suggested_settings
from veneer.train.preflight import (
    Finding,
    Report,
    RunSubject,
    about_some,
    available_memory,
    check_devices,
    check_output,
    computes_on,
    learning_rate,
    memory_finding,
    precision,
    recomputes,
    share,
    trainable_parameters,
)
from veneer.train.text.data import TextData, planned_steps
from veneer.train.text.encode import EncodedRows, Example
from veneer.train.text.preference import Item
from veneer.train.text.rows import leakage

_SAMPLED = 200  # maximum number of rows to check against the template; a wrong template fails for all rows or for none
_SPACE_FIX = "end prompts without a space and begin answers with the space, so that no token spans both"
_FEW_PROMPTS = 8
"""Number of prompts below which a run gets a warning, even if each step uses fewer prompts."""


@dataclass(kw_only=True)
class TextSubject(RunSubject):
    """A text run to check."""

    config: TrainConfig
    data: TextData

    @property
    def encoded(self) -> EncodedRows:
        """Return the encoded training rows; for preferences, the encoded completions."""
        return self.data.train.encoded

    def rows_with(
        self, count: str, check: str, text: str, fix: str = "", *, stops: bool = False, total: int | None = None
    ) -> Iterator[Finding]:
        """Yield a finding about the rows that the encoding counts as `count`; name the first of them.

        text: the problem of the rows. stops: the finding stops the run if it concerns more than half of
        `total` (by default all rows)."""
        counts = self.encoded.counts
        names = counts.first_rows.get(count, ())
        return about_some(check, getattr(counts, count), total or counts.rows, text, names, fix, stops=stops)

    def tokens(self, ids: Iterable[int], *, numbered: bool = False) -> str:
        """Return the names of up to five tokens, with their ids if `numbered`."""
        named = ((i, f"`{self.base.tokenizer.convert_ids_to_tokens(i)}`") for i in sorted(ids)[:5])
        return ", ".join(f"{name} ({i})" if numbered else name for i, name in named)


def text_preflight(base: Any, config: TrainConfig, data: TextData, *, devices: int = 1, **options: Any) -> Report:
    """Inspect a run on a loaded base; see `inspect_run`."""
    encoded = data.train.encoded
    once = config.model_copy(update={"schedule": config.schedule.model_copy(update={"epochs": 1, "steps": None})})
    steps = planned_steps(data.train.items, once, data.train.rows, devices)
    subject = TextSubject(
        base=base,
        config=config,
        data=data,
        devices=devices,
        steps_per_epoch=len(steps),
        largest_micro=max((micro.tokens for step in steps for micro in step.micros), default=0),
        **options,
    )
    report = Report(numbers=subject.numbers)
    report.add(*data_findings(subject), *(finding for check in _BASE_CHECKS for finding in check(subject)))
    report.sample = marked_pieces(encoded.examples[0], base.tokenizer) if encoded.examples else []
    report.plan = subject.plan
    return report


def data_findings(subject: TextSubject) -> Iterator[Finding]:
    """Yield the findings about a run's rows or prompts.

    The base's weights are not needed."""
    for check in _DATA_CHECKS if subject.config.sampling is None else _PROMPT_CHECKS:
        yield from check(subject)


def marked_pieces(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the row split into pieces (text, trained) wherever the loss mask changes."""
    pairs = zip(example.input_ids, example.trained, strict=True)
    runs = itertools.groupby(pairs, key=lambda pair: bool(pair[1]))
    return [(str(tokenizer.decode([token for token, _ in run])), trained) for trained, run in runs]


# -- rows --------------------------------------------------------------------------------------------------------------


def _something_is_trained(s: TextSubject) -> Iterator[Finding]:
    """Report rows that have no token to train on.

    Without this check, a run with a loss mask that excludes all tokens would seem to succeed."""
    c = s.encoded.counts
    s.numbers.update(rows=c.rows, rows_kept=c.used, tokens=c.tokens, learned_tokens=c.trained_tokens)
    fix = "check roles, weights and data.train_on; the trained part is the assistant turns"
    if c.trained_tokens == 0:
        text = f"no row is left to train on: of {c.rows:,} rows, {c.untrained:,} have nothing to learn and "
        text += f"{c.long_dropped:,} are too long"
        yield Finding("stop", "learned", text, fix)
        return
    text = "rows have no token to learn and are left out"
    yield from s.rows_with("untrained", "learned", text, fix, stops=True)
    text = f"{share(c.trained_tokens, c.tokens)} tokens are learned, in {counted(c.used, 'row')}"
    yield Finding("ok", "learned", text)


def _long_rows(s: TextSubject) -> Iterator[Finding]:
    """Report how many rows are dropped or truncated, and name the first of them."""
    c, limit = s.encoded.counts, s.config.data.max_length
    fix = f"data.max_length={c.longest} avoids truncation"
    text = f"rows are longer than {limit} tokens and dropped"
    yield from s.rows_with("long_dropped", "long rows", text, fix, stops=True)
    text = f"rows are cut to {limit} tokens, the oldest prompt tokens first"
    yield from s.rows_with("cut", "long rows", text, fix)
    text = "cut rows lose the end of the answer, including its end token"
    yield from s.rows_with("cut_ends", "long rows", text, fix, stops=True)
    if not c.long_dropped and not c.cut:
        yield Finding("ok", "long rows", f"longest row: {c.longest:,} tokens of {limit:,}; none dropped or cut")


def _end_is_trained(s: TextSubject) -> Iterator[Finding]:
    """Check that the end token is a target; otherwise, the model would never stop."""
    examples, ends = s.encoded.examples, s.encoded.end_ids
    if not examples:
        return
    end_kind = "end-of-turn" if s.encoded.chat else "end-of-text"
    if not ends:
        fix = "use a chat template (data.chat_template) or a tokenizer that ends answers with a special token"
        text = f"no {end_kind} token is written after an answer: the model would learn to never stop"
        yield Finding("stop", "end", text, fix)
        return
    names = s.tokens(ends)
    with_end = s.encoded.counts.ended
    text = f"the {end_kind} token {names} is learned in {share(with_end, len(examples))} rows"
    if with_end == 0:
        fix = "check the chat template, data.train_on and data.long_rows"
        yield Finding("stop", "end", f"{text}: the model would never stop", fix)
    elif with_end < 0.9 * len(examples):
        yield Finding("warn", "end", text, "see long rows: cut rows lose their end")
    else:
        yield Finding("ok", "end", text)
    if ends.isdisjoint(s.base.stop_ids):
        stops = s.tokens(s.base.stop_ids) or "nothing"
        text = f"answers end with {names}, but generation stops at {stops}: answers would run on"
        yield Finding("stop", "end", text, "use the chat template that belongs to this base, or set its eos_token")


def _bos_once(s: TextSubject) -> Iterator[Finding]:
    """Report rows with no BOS token, or with two (one in the text, one added by the tokenizer)."""
    tokenizer, examples = s.base.tokenizer, s.encoded.examples
    bos = tokenizer.bos_token_id
    if bos is None or not examples:
        return
    fix = f"remove {tokenizer.bos_token} from the rows or from the chat template"
    yield from s.rows_with("doubled_bos", "begin", f"rows begin with {tokenizer.bos_token} twice", fix, stops=True)
    if tokenizer("a")["input_ids"][:1] == [bos]:
        missing = s.encoded.counts.unbegun
        text = f"rows begin without {tokenizer.bos_token}, which the base expects first"
        yield from about_some("begin", missing, len(examples), text, fix="begin the chat template with {{ bos_token }}")


def _prompts_match_inference(s: TextSubject) -> Iterator[Finding]:
    """Check that training rows begin with the prompt of inference, token by token."""
    data, renderer, chat = s.config.data, s.encoded.renderer, s.encoded.chat
    tokenizer = s.base.tokenizer
    base_template = tokenizer.chat_template
    if chat and base_template and data.chat_template != "auto" and renderer.template != tokenizer.get_chat_template():
        text = f"rows use {renderer.source}, not the base's own: prompt the adapter with the same template"
        yield Finding("warn", "template", text, "data.chat_template=auto uses the base's own")
    if base_template and not chat and s.data.train.texts and s.data.train.texts[0].messages:
        text = "the base has a chat template, but rows do not use it: prompt the adapter with plain text"
        yield Finding("warn", "template", text, "data.chat_template=auto")
    wrong: list[str] = []
    checked = 0
    for example in s.encoded.examples[:: max(1, len(s.encoded.examples) // _SAMPLED)]:
        row = s.data.train.texts[example.row]
        if row.format == "text" or data.train_on == "all" or row.last_assistant() in (0, len(row.messages)):
            continue
        prompt = tokenizer(renderer.prompt(row), add_special_tokens=not chat, verbose=False)["input_ids"]
        if example.row in s.encoded.cut_rows or len(prompt) >= len(example.input_ids):
            continue  # the row is truncated, or its last turn is not trained on
        checked += 1
        if example.input_ids[: len(prompt)] != prompt:
            wrong.append(row.where)
    text = "prompts are tokenized differently in training and at inference"
    yield from about_some("template", len(wrong), checked, text, wrong, _SPACE_FIX, stops=True)
    if checked and not wrong:
        text = f"prompts at inference match training token for token ({counted(checked, 'row')} checked)"
        yield Finding("ok", "template", text)


def _turns_and_control_tokens(s: TextSubject) -> Iterator[Finding]:
    c = s.encoded.counts
    if c.changed_turns:
        text = f"{c.changed_turns:,} earlier turns are trained without content that the template renders only in the "
        text += f"last turn (mostly thinking): {', '.join(c.first_rows.get('changed_turns', ()))}"
        fix = "data.train_on=last learns only turns in the form that inference generates"
        yield Finding("warn", "turns", text, fix)
    fix = "remove them unless they are meant as control tokens"
    yield from s.rows_with("control", "control tokens", "rows contain the base's control tokens as text", fix)


def _answers_compare(s: TextSubject) -> Iterator[Finding]:
    """Report how many pairs or completions a preference run compares, and pairs that cannot be used."""
    loss = s.config.preference.loss
    items = [item for item in s.data.train.items if isinstance(item, Item)]
    if loss is None or not items:
        return
    text = f"{counted(len(items), 'pair')}, two rows each"
    if loss == "kto":
        good = sum(bool(item.desirable) for item in items)
        text = f"{counted(len(items), 'answer')}, {good:,} desirable and {len(items) - good:,} not"
        if good in (0, len(items)):
            text += ": there is nothing to compare"
            yield Finding("stop", "preferences", text, "provide desirable and undesirable answers")
            return
    yield Finding("ok", "preferences", text)
    text = "answers are dropped because the other answer of the pair is dropped"
    yield from s.rows_with("partners", "preferences", text)
    text = "pairs have a prompt that is tokenized differently for the two answers"
    yield from s.rows_with("other_prompts", "preferences", text, _SPACE_FIX, stops=True, total=len(items))


def _prompts_are_sampled(s: TextSubject) -> Iterator[Finding]:
    """Report how many prompts and completions a run samples."""
    r, c = s.config.sampling, s.encoded.counts
    assert r is not None
    if not c.used:
        text = f"no prompt is left: {c.long_dropped:,} of {c.rows:,} rows leave no space for a completion"
        yield Finding("stop", "prompts", text, f"lower {r.named}.max_tokens, or raise data.max_length")
        return
    if s.devices > 1:
        text = f"completions are sampled by one process, but this run has {s.devices} processes"
        yield Finding("stop", "prompts", text, "run it on one device")
    each = min(s.config.batching.rows, c.used)
    text = f"{counted(c.used, 'prompt')}; a step samples {each} of them, {counted(r.group, 'completion')} for each"
    yield Finding("ok", "prompts", f"{text}, at most {r.max_tokens} tokens each")
    if c.used < max(s.config.batching.rows, _FEW_PROMPTS):
        fix = f"add prompts (a few hundred at least), or lower batching.rows ({s.config.batching.rows} here)"
        text = f"only {counted(c.used, 'prompt')} to train on: steps repeat them"
        yield Finding("warn", "prompts", text, fix)


def _long_prompts(s: TextSubject) -> Iterator[Finding]:
    """Report how many prompts leave no space for a completion, and name the first of them."""
    c, data, r = s.encoded.counts, s.config.data, s.config.sampling
    assert r is not None
    limit = min(data.max_length, s.base.context)
    if not c.long_dropped:
        text = f"longest prompt: {c.longest:,} tokens of {limit:,}, answers have up to {r.max_tokens:,}; none dropped"
        yield Finding("ok", "long rows", text)
    fix = f"shorten them, or lower {r.named}.max_tokens"
    if data.max_length < s.base.context:
        fix += f"; the base supports {s.base.context:,} tokens: raise data.max_length"
    text = f"prompts leave no space for a completion in {limit:,} tokens, and are dropped"
    yield from s.rows_with("long_dropped", "long rows", text, fix, stops=True)


def _check_rows(s: TextSubject) -> Iterator[Finding]:
    """Report the format, unused columns, duplicates, and held-out rows that are also training rows.

    Held-out rows that are trained on distort the validation loss."""
    metadata = s.data.metadata
    if metadata is not None:
        yield Finding("ok", "format", f"{counted(metadata.rows, 'row')} in `{metadata.format}` format: {metadata.why}")
        if metadata.unused:
            text = f"unused columns: {', '.join(metadata.unused)}"
            fix = "name the columns to use in data.columns, for example {prompt: question}"
            yield Finding("warn", "columns", text, fix)
        text = "rows are exact duplicates of an earlier row"
        yield from about_some("duplicates", metadata.duplicates, metadata.rows, text)
    total = len(s.data.held_out.texts)
    if not total and s.config.evaluation.patience is not None:
        text = "`evaluation.patience` is set, but no row is held out"
        yield Finding("stop", "held out", text, "give data.validation or data.split, or more rows")
        return
    if not total:
        yield Finding("warn", "held out", "no rows are held out, so overfitting cannot be detected", "data.split=0.05")
        return
    if s.data.held_out.encoded.counts.trained_tokens == 0:
        yield Finding("stop", "held out", "the held-out rows have no trained token", "check data.validation's format")
    identical, same_prompt = leakage(
        s.data.train.texts, s.data.held_out.texts, s.data.train.keys(), s.data.held_out.keys()
    )
    fix = "remove them from the training or the held-out rows; data.split never puts equal rows into both"
    text = "held-out rows are also trained on"
    yield from about_some("held out", len(identical), total, text, identical, fix, stops=True)
    overlap = "are also trained on" if s.config.sampling else "also occur in training, with other answers"
    yield from about_some("held out", len(same_prompt), total, f"held-out prompts {overlap}", same_prompt)
    if not identical and not same_prompt:
        yield Finding("ok", "held out", f"{counted(total, 'held-out row')}, none of them trained on")


# -- the base ----------------------------------------------------------------------------------------------------------


def _what_is_trained(s: TextSubject) -> Iterator[Finding]:
    """Report the trained modules and the size of the adapter.

    An adapter without targets stops the run."""
    model, spec = s.base.model, s.config.adapter.spec()
    if (start := s.data.start) is not None:
        pairs, full, size = sum(t.numel() for _, t in start.tensors()), 0, gigabytes(start.size_bytes())
        if wrong := {d.form for d in start.deltas.values()} - {"hadamard", "kronecker"}:
            forms = ", ".join(sorted(wrong))
            text = f"adapter.start contains deltas that are not pairs ({forms}), which cannot be trained"
            yield Finding("stop", "targets", text, "continue from a LoRA, LoHa or LoKr")
        matched = f"starts from {s.config.adapter.start}: {counted(len(start.pairs), 'pair')}"
    else:
        try:
            pairs, full = trainable_parameters(model, resolve_targets(model, spec), spec)
        except TargetError as error:
            where = f" ({error.where})" if error.where else ""
            yield Finding("stop", "targets", f"{error.what}{where}", error.fix or "")
            return
        matches, size = matches_per_pattern(model, spec), gigabytes(4 * (pairs + full))
        matched = ", ".join(f"`{p}` {counted(len(names), 'module')}" for p, names in matches.items())
    total = sum(p.numel() for p in model.parameters())
    s.numbers.update(base_parameters=total, trainable=pairs + full)
    yield Finding("ok", "targets", f"{matched}; trainable: {share(pairs + full, total)} parameters, a file of {size}")
    if full > pairs:
        text = f"full copies of modules take {share(full, pairs + full)} of the adapter"
        yield Finding("warn", "size", text, "drop adapter.modules_to_save, or train rows with adapter.token_rows")


def _experts_are_trained(s: TextSubject) -> Iterator[Finding]:
    """Stop a run that would freeze experts which the configuration does not exclude.

    Experts have most of the weights in a mixture of experts."""
    spec, shape = s.config.adapter.spec(), model_shape(s.base.model)
    if s.data.start is not None:
        return  # the adapter determines the trained modules
    frozen: dict[str, int] = {}
    for i, (layer, pairs) in enumerate(zip(shape.layers, layer_pairs(shape, spec, spec.rank), strict=True)):
        for part in layer.linears:
            name = f"model.layers.{i}.{part.name}"
            is_chosen = part.name in pairs or any(target_matches(p, name) for p in spec.exclude)
            is_chosen = is_chosen or (spec.layers is not None and i not in spec.layers)
            if ".experts." in name and not is_chosen:
                frozen[name] = part.parameters
    if frozen:
        of_base = share(sum(frozen.values()), shape.parameters)
        text = f"{len(frozen)} expert weights get no adapter and stay frozen, {of_base} of the base's parameters: "
        text += ", ".join(list(frozen)[:2])
        names = sorted({name.rpartition(".")[2] for name in frozen})
        fix = f"add {', '.join(names)} to adapter.targets (or all-linear), or set adapter.exclude: ['*experts*']"
        yield Finding("stop", "experts", text, fix)


def _vocabulary(s: TextSubject) -> Iterator[Finding]:
    """Report tokens without an embedding row, and added tokens with an untrained embedding row.

    Embedding rows are untrained if, for example, the base never saw the tokens of the chat template."""
    embedding = s.base.model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    used = set(s.encoded.vocabulary.tolist())
    beyond = sorted(t for t in used if t >= rows)
    if beyond:
        text = f"{len(beyond)} tokens of the data have no row in the base's embedding of {rows:,} rows: "
        text += s.tokens(beyond, numbered=True)
        yield Finding("stop", "vocabulary", text, "the tokenizer belongs to another base: use the base's own")
        return
    config = s.config.adapter
    trained = {i for ids in config.token_rows.values() for i in ids} | {getattr(embedding, "padding_idx", None)}
    added = sorted((set(s.base.tokenizer.added_tokens_decoder) & used) - trained)
    if not added or not embedding.weight.is_floating_point():
        return
    weight, unread = embedding.weight.detach(), s.base.unread
    name = next((n for n, p in s.base.model.named_parameters() if p is embedding.weight), "")
    first = range(min(4096, rows))
    sample_rows, added_rows = (unread.rows(name, at) if unread else weight[list(at)] for at in (first, added))
    sample, norms = sample_rows.float().norm(dim=1), added_rows.float().norm(dim=1)
    dead = [t for t, norm in zip(added, norms.tolist(), strict=True) if norm < 0.05 * float(sample.median())]
    if dead and not any("embed" in m or "wte" in m for m in config.modules_to_save):
        text = f"{len(dead)} added tokens in the data have untrained embedding rows (near zero): "
        text += s.tokens(dead, numbered=True)
        yield Finding("warn", "vocabulary", text, "train their rows: adapter.token_rows: {embed_tokens: [IDS]}")


def _fits_in_memory(s: TextSubject) -> Iterator[Finding]:
    """Check that the longest rows fit in memory, because a run could otherwise fail after hours."""
    config, device = s.config, computes_on(s.base)
    row = int(token_counts(s.encoded.examples)[0].max(initial=0))
    if row > s.base.context:
        text = f"the longest row has {row:,} tokens, but the base supports only {s.base.context:,}"
        yield Finding("stop", "memory", text, f"data.max_length={s.base.context} with data.long_rows=cut or drop")
    free, mode = available_memory(config, device, s.free_memory), config.memory.activation_checkpointing
    planned = functools.partial(
        plan_of_run,
        config,
        s.base,
        s.data.train.items,
        trainable=int(s.numbers.get("trainable", 0)),
        held_out=len(s.data.held_out.encoded.examples),
        available=free,
    )
    plain, again = planned(checkpointing=False), planned(checkpointing=True)
    need, less = (remaining_bytes(plan.memory, plan.device) for plan in (plain, again))
    on, _ = recomputes(mode, need, free)
    s.plan = plan = again if on else plain
    sampling_packed, training_packed = _packed_bytes(s, plan, device.type, on)
    keeps, packs = _dequantized_bytes(s, plan, device.type), sampling_packed + training_packed + _int8_bytes(s)
    s.numbers.update(memory_needed=need, memory_checkpointed=less, memory_free=free)
    s.numbers.update(predicted_peak_bytes=plan.memory.peak + keeps + packs)
    s.numbers.update(predicted_parts={**plan.memory.parts, "packed": packs})
    s.numbers.update(kept_dequantized=keeps, kept_packed=training_packed, drawer_packed=sampling_packed)
    required = (less if on else need) + packs
    longest = f"the largest micro-batch has {s.largest_micro:,} tokens, the longest row {row:,}"
    if packs:
        kind = "int8" if config.base.compute == "int8" else "prepacked"
        longest += f"; {gigabytes(packs)} of it are {kind} copies of frozen weights"
    limited = config.memory.limit_gb is not None and free == int(config.memory.limit_gb * 1e9)
    more = "a higher memory.limit_gb" if limited else "a machine with more memory"
    fix = suggested_settings(plan) or f"a smaller base, or {more} (veneer plan shows how much)"
    if required - packs <= free < required:
        fix = "memory.keep_packed_gb=0"
    finding = memory_finding(required, free, longest, fix=fix, force=s.force)
    if required <= free and on and mode == "auto":
        finding = replace(finding, text=f"activations will be recomputed to save memory: {finding.text}")
    yield finding
    if plan.seconds is not None and not plan.changes:
        s.numbers.update(predicted_seconds=round(plan.seconds, 4))
        takes = f"{rough_duration(plan.seconds)} of training ({plan.rates.source})"
        yield Finding("ok", "plan", f"plan: a peak of {gigabytes(plan.memory.peak + packs)}, {takes}")


def _int8_products(s: TextSubject) -> Iterator[Finding]:
    """Check that 8-bit products are available, and report their speed according to this machine's profile."""
    if s.config.base.compute != "int8":
        return
    if computes_on(s.base).type != "cpu":
        text = "int8 products are supported only on a CPU"
        yield Finding("stop", "int8", text, "remove base.compute, or set base.device=cpu")
        return
    machine = profile()
    dtype, rate = machine.product_rate(str(s.base.dtype).removeprefix("torch."))
    is_exact = torch_sums_are_exact()  # otherwise, the products of the codes run in float32
    faster = machine.rate("int8" if is_exact else "float32") / rate
    text = f"int8 products run at {faster:.1f} times the speed of {dtype} products on this machine"
    if faster < WORTH:
        yield Finding("warn", "int8", text, "remove base.compute: int8")
    else:
        yield Finding("ok", "int8", text)


def _dequantized_bytes(s: TextSubject, plan: Plan, device: str) -> int:
    """Return the bytes of a quantized base's weights that are kept dequantized.

    By default, a GPU keeps most of the weights that the plan has space for. A CPU keeps none, because the
    gain is only 4% (docs/notes/qlora.md)."""
    if not s.base.quantized:
        return 0
    if s.config.memory.keep_dequantized_gb is not None:
        return int(s.config.memory.keep_dequantized_gb * 1e9)
    return 8 * plan.dequantizable // 10 if device == "cuda" else 0


def _int8_bytes(s: TextSubject) -> int:
    """Return the bytes of the weights' 8-bit copies, without the head. Both passes share one copy."""
    if s.config.base.compute == "auto":
        return 0
    shape = model_shape(s.base.model)
    once = packed_weights(shape, "bfloat16", lambda rows, _, is_forward: is_forward and rows != shape.vocabulary)
    return once // 2


def _packed_bytes(s: TextSubject, plan: Plan, device: str, recomputed: bool) -> tuple[int, int]:
    """Return the bytes of packed weights for sampling and for training.

    A weight is packed only if packing clearly speeds up its products, and only up to the configured number of
    bytes. By default, either all of these weights are packed or none, depending on the plan's free space; for
    training, none if activations are recomputed. Only a CPU packs weights, and only if they are neither
    quantized nor sharded.

    Sampling has priority over training. Without stored packed weights, all weights are packed again for each
    sampled token, which takes several times as long as the products."""
    configured = s.config.memory.keep_packed_gb
    is_plain = not s.base.quantized and s.config.base.compute == "auto"
    if configured == 0 or not is_plain or s.config.memory.shard or device != "cpu":
        return 0, 0
    dtype = next(s.base.model.parameters()).dtype
    shape, name = model_shape(s.base.model), str(dtype).removeprefix("torch.")
    sampling = training = 0
    if s.config.sampling is not None and panels_here(16, dtype):
        sampling = packed_weights(shape, name, lambda _rows, _columns, is_forward: is_forward)
    if configured is not None or (plan.packable and not recomputed):
        training = packed_weights(shape, name, functools.partial(keeps_copy, dtype))
    if configured is not None:
        return min(sampling, int(configured * 1e9)), min(training, int(configured * 1e9))
    free = 8 * (plan.available - plan.memory.peak) // 10
    sampling *= sampling <= free
    return sampling, training * (sampling + training <= free)


_Checks = tuple[Callable[[TextSubject], Iterator[Finding]], ...]

_PROMPT_CHECKS: _Checks = (_prompts_are_sampled, _long_prompts, _bos_once, _check_rows)
_DATA_CHECKS: _Checks = (_something_is_trained, _long_rows, _end_is_trained, _bos_once, _prompts_match_inference)
_DATA_CHECKS += (_turns_and_control_tokens, _answers_compare, _check_rows)
_BASE_CHECKS: _Checks = (_what_is_trained, _experts_are_trained, learning_rate, check_devices, precision)
_BASE_CHECKS += (_vocabulary, _int8_products, _fits_in_memory, check_output)
