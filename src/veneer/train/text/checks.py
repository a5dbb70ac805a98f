"""Preflight checks of the data: targets, end tokens, and the inference prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from veneer.errors import counted
from veneer.train.config.distillation import DistillationSection
from veneer.train.config.reinforcement import ReinforcementSection
from veneer.train.config.section import BASE_MODEL
from veneer.train.config.text import TrainConfig
from veneer.train.preflight import Finding, Level, RunSubject, share
from veneer.train.text.data import TextData
from veneer.train.text.encode import EncodedRows
from veneer.train.text.preference import Item
from veneer.train.text.rows import leakage

_SAMPLED = 200  # rows whose prompts are tokenized again; templates fail for all rows or for none


@dataclass(kw_only=True)
class TextSubject(RunSubject):
    """A text run to check."""

    config: TrainConfig
    data: TextData

    @property
    def encoded(self) -> EncodedRows:
        """Return the encoded training rows; for preferences, of each answer."""
        return self.data.train.encoded

    @property
    def longest(self) -> int:
        """Return the tokens of the longest row."""
        return max((e.tokens for e in self.encoded.examples), default=0)

    @property
    def stop_ids(self) -> set[int]:
        """Return the tokens at which generation with this base stops."""
        found: set[int] = set()
        settings = getattr(self.base.model, "generation_config", None)
        for ids in (
            getattr(self.base, "end_of_turn_id", None),
            getattr(settings, "eos_token_id", None),
            self.base.tokenizer.eos_token_id,
        ):
            found.update(ids if isinstance(ids, list | tuple | set) else [] if ids is None else [ids])
        return found


def _something_is_learned(s: TextSubject) -> Iterator[Finding]:
    """Failure class 1: the loss is masked to nothing and the run "succeeds"."""
    c = s.encoded.counts
    s.numbers.update(rows=c.rows, rows_kept=c.kept, rows_untrained=c.untrained, tokens=c.tokens)
    s.numbers.update(learned_tokens=c.trained_tokens, learned_share=c.trained_tokens / c.tokens if c.tokens else 0.0)
    where = ", ".join(c.places.get("untrained", ()))
    fix = "check roles, weights and data.train_on; the learned part is what assistant turns say"
    if c.kept == 0 or c.trained_tokens == 0:
        reasons = [
            f"{n:,} {why}" for n, why in ((c.untrained, "with nothing to learn"), (c.long_dropped, "too long")) if n
        ]
        text = f"no row is left to train on: of {c.rows:,} rows {' and '.join(reasons) or 'none could be used'}"
        yield Finding("stop", "learned", text, fix)
        return
    if c.untrained > c.rows / 2:
        yield Finding("stop", "learned", f"{share(c.untrained, c.rows)} rows have no token to learn: {where}", fix)
    elif c.untrained:
        yield Finding(
            "warn", "learned", f"{share(c.untrained, c.rows)} rows are left out, with no token to learn: {where}", fix
        )
    yield Finding(
        "ok", "learned", f"{share(c.trained_tokens, c.tokens)} tokens are learned, in {counted(c.kept, 'row')}"
    )


def long_rows(s: TextSubject) -> Iterator[Finding]:
    """Report rows that are dropped or cut, with their number and names."""
    c, data = s.encoded.counts, s.config.data
    s.numbers.update(rows_dropped=c.long_dropped, rows_cut=c.cut, longest_row=c.longest, max_length=data.max_length)
    fix = f"data.max_length={c.longest} keeps them whole"
    if c.long_dropped:
        where = ", ".join(c.places["long_dropped"])
        text = f"{share(c.long_dropped, c.rows)} rows are longer than {data.max_length} tokens and dropped: {where}"
        yield Finding("stop" if c.long_dropped > c.rows / 2 else "warn", "long rows", text, fix)
    if c.cut:
        where = ", ".join(c.places["cut"])
        text = (
            f"{share(c.cut, c.rows)} rows are cut to {data.max_length} tokens, the oldest prompt tokens first: {where}"
        )
        yield Finding("warn", "long rows", text, fix)
    if c.cut_ends:
        text = f"{share(c.cut_ends, c.rows)} cut rows lose the end of their answer, and with it the token that stops it"
        yield Finding("stop" if c.cut_ends > c.rows / 2 else "warn", "long rows", text, fix)
    if not c.long_dropped and not c.cut:
        yield Finding(
            "ok", "long rows", f"longest row: {c.longest:,} tokens of {data.max_length:,}; none dropped or cut"
        )


def _the_end_is_learned(s: TextSubject) -> Iterator[Finding]:
    """Failure class 2: a model that never stops, because its end token is no target."""
    examples, ends = s.encoded.examples, s.encoded.end_ids
    if not examples:
        return
    tokenizer = s.base.tokenizer
    what = "end-of-turn" if s.encoded.chat else "end-of-text"
    if not ends:
        fix = (
            "use a chat template that ends assistant turns with a special token (data.chat_template)"
            if s.encoded.chat
            else "give the tokenizer an eos_token"
        )
        text = f"no {what} token is written after an answer: the model would learn to never stop"
        yield Finding("stop", "end", text, fix)
        return
    names = ", ".join(f"`{tokenizer.convert_ids_to_tokens(i)}`" for i in sorted(ends))
    taught = sum(any(on and token in ends for token, on in zip(e.input_ids, e.trained, strict=True)) for e in examples)
    s.numbers.update(rows_with_end=taught, end_tokens=sorted(ends), stop_tokens=sorted(s.stop_ids))
    if taught == 0:
        text = f"the {what} token {names} is learned in no row: the model would never stop"
        yield Finding("stop", "end", text, "check the chat template, data.train_on and data.long_rows")
    elif taught < 0.9 * len(examples):
        text = f"the {what} token {names} is learned only in {share(taught, len(examples))} rows"
        yield Finding("warn", "end", text, "see long rows: cut rows lose their end")
    else:
        yield Finding("ok", "end", f"the {what} token {names} is learned in {share(taught, len(examples))} rows")
    if not ends & s.stop_ids:
        stops = ", ".join(f"`{tokenizer.convert_ids_to_tokens(i)}`" for i in sorted(s.stop_ids)) or "nothing"
        text = f"answers end with {names}, but generation stops at {stops}: answers would run on"
        yield Finding("stop", "end", text, "use the chat template that belongs to this base, or set its eos_token")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id in ends:
        text = f"padding and {what} are the same token, which is harmless here: rows are never padded"
        yield Finding("ok", "padding", text)


def _begins_once(s: TextSubject) -> Iterator[Finding]:
    """Report BOS twice, if text and tokenizer both write it; or never."""
    c, tokenizer, examples = s.encoded.counts, s.base.tokenizer, s.encoded.examples
    bos = tokenizer.bos_token_id
    if bos is None or not examples:
        return
    if c.doubled_bos:
        where = ", ".join(c.places["doubled_bos"])
        text = f"{share(c.doubled_bos, c.rows)} rows begin with {tokenizer.bos_token} twice: {where}"
        level: Level = "stop" if c.doubled_bos > c.rows / 2 else "warn"
        yield Finding(level, "begin", text, f"remove {tokenizer.bos_token} from the rows or from the chat template")
    adds = list(tokenizer("a")["input_ids"][:1]) == [bos]
    missing = sum(e.input_ids[0] != bos for e in examples) if adds else 0
    if missing:
        text = (
            f"the base expects {tokenizer.bos_token} first, and {share(missing, len(examples))} rows begin without it"
        )
        yield Finding("warn", "begin", text, "begin the chat template with {{ bos_token }}")


def _inference_agrees(s: TextSubject) -> Iterator[Finding]:
    """Failure class 6: training rows must begin with the prompt of inference.

    They are compared token by token."""
    data, renderer = s.config.data, s.encoded.renderer
    own = s.base.tokenizer.chat_template
    if (
        s.encoded.chat
        and data.chat_template != "auto"
        and own
        and renderer.template != renderer.tokenizer.get_chat_template()
    ):
        text = f"rows use {renderer.source}, not the base's own: prompt the adapter with the same template"
        yield Finding("warn", "template", text, "data.chat_template=auto uses the base's own")
    if own and not s.encoded.chat and s.data.train.texts and s.data.train.texts[0].messages:
        text = "the base has a chat template and rows do not use it: give the adapter plain prompts, not messages"
        yield Finding("warn", "template", text, "data.chat_template=auto")
    wrong: list[str] = []
    seen = 0
    for example in s.encoded.examples[:: max(1, len(s.encoded.examples) // _SAMPLED)]:
        row = s.data.train.texts[example.row]
        if row.format == "text" or data.train_on == "all" or row.last_assistant() in (0, len(row.messages)):
            continue
        prompt = s.base.tokenizer(renderer.prompt(row), add_special_tokens=not s.encoded.chat, verbose=False)[
            "input_ids"
        ]
        if example.row in s.encoded.cut_rows or len(prompt) >= len(example.input_ids):
            continue  # cut, or its last turn is not trained on
        seen += 1
        if example.input_ids[: len(prompt)] != prompt:
            wrong.append(row.where)
    s.numbers.update(template_rows_checked=seen, template_rows_differ=len(wrong), chat=s.encoded.chat)
    if wrong:
        text = (
            f"{share(len(wrong), seen)} prompts are other tokens in training than at inference: {', '.join(wrong[:3])}"
        )
        level: Level = "stop" if len(wrong) > seen / 2 else "warn"
        fix = "end prompts without a space and begin completions with it, so that no token spans both"
        yield Finding(level, "template", text, fix)
    elif seen:
        yield Finding(
            "ok",
            "template",
            f"prompts at inference match training token for token ({counted(seen, 'row')} checked)",
        )


def _turns_and_control_tokens(s: TextSubject) -> Iterator[Finding]:
    c = s.encoded.counts
    if c.changed_turns:
        text = (
            f"{c.changed_turns:,} earlier turns are trained without what the template shows only in a last turn "
            f"(thinking, mostly): {', '.join(c.places['changed_turns'])}"
        )
        yield Finding("warn", "turns", text, "data.train_on=last learns only turns as inference writes them")
    if c.control:
        where = ", ".join(c.places["control"])
        text = f"{share(c.control, c.rows)} rows hold the base's own control tokens as text: {where}"
        yield Finding("warn", "control tokens", text, "remove them unless they are meant to act as such")
    if c.merged and s.encoded.chat is False:
        text = f"in {share(c.merged, c.rows)} rows one token spans prompt and answer: {', '.join(c.places['merged'])}"
        yield Finding("warn", "boundary", text, "end prompts without a space and begin completions with it")


def _answers_compare(s: TextSubject) -> Iterator[Finding]:
    """Report what a preference run compares, and with which reference."""
    loss, c = s.config.preference.loss, s.encoded.counts
    items = [item for item in s.data.train.items if isinstance(item, Item)]
    if loss is None or not items:
        return
    if loss == "kto":
        yield from _judged(s, items)
    else:
        good, bad = (sum(i.answers[k].learned for i in items) / len(items) for k in (0, 1))
        s.numbers.update(preference_pairs=len(items), chosen_tokens=good, rejected_tokens=bad)
        text = f"{counted(len(items), 'pair')}, two rows each; "
        text += f"chosen answers have {good:.1f} tokens on average, rejected {bad:.1f}"
        yield Finding("ok", "preferences", text)
    if c.partners:
        where = ", ".join(c.places["partners"])
        text = f"{share(c.partners, c.rows)} answers are left out because the other one of their pair is: {where}"
        yield Finding("warn", "preferences", text)
    if c.other_prompts:
        where = ", ".join(c.places["other_prompts"])
        text = f"the two prompts of {share(c.other_prompts, len(items))} pairs are not the same tokens: {where}"
        fix = "end prompts without a space and begin answers with it, so that no token spans both"
        yield Finding("stop" if c.other_prompts > len(items) / 2 else "warn", "preferences", text, fix)
    reference = "the base with the adapter off" if s.data.start is None else f"{s.config.adapter.start} as it is now"
    if loss in ("orpo", "simpo"):
        reference = f"none, {loss} has none"
    yield Finding("ok", "reference", f"compared with: {reference}")


_FEW_PROMPTS = 8
"""Fewer prompts than this cause a warning, even if a step takes fewer."""


def _answers_are_drawn(s: TextSubject) -> Iterator[Finding]:
    """Report what a run samples and learns from."""
    r, c = s.config.drawn, s.encoded.counts
    assert r is not None
    if not c.kept:
        text = f"no prompt is left to answer: {c.long_dropped:,} of {c.rows:,} rows leave an answer no room"
        yield Finding("stop", "prompts", text, f"lower {r.named}.max_tokens, or raise data.max_length")
        return
    if s.devices > 1:
        text = f"answers are drawn by one process, and {s.devices} share this run"
        yield Finding("stop", "prompts", text, "run it on one device")
    each = min(s.config.batching.rows, c.kept)
    s.numbers.update(prompts=c.kept, answers_of_a_step=each * r.group, answer_limit=r.max_tokens)
    text = f"{counted(c.kept, 'prompt')}; a draw is {each} of them with {counted(r.group, 'answer')} each"
    text += f", of {r.max_tokens} tokens at most"
    yield Finding("ok", "prompts", text)
    if c.kept < max(s.config.batching.rows, _FEW_PROMPTS):
        every = "every step draws the same one" if c.kept == 1 else "steps draw the same ones again and again"
        fix = f"add prompts (a few hundred at least), or lower batching.rows ({s.config.batching.rows} here)"
        yield Finding("warn", "prompts", f"only {counted(c.kept, 'prompt')} to train on: {every}", fix)
    yield from _is_taught(r) if isinstance(r, DistillationSection) else _is_rewarded(s, r)


def _long_prompts(s: TextSubject) -> Iterator[Finding]:
    """Report prompts that leave no room for a completion, with number and names."""
    c, data, r = s.encoded.counts, s.config.data, s.config.drawn
    assert r is not None
    s.numbers.update(rows_dropped=c.long_dropped, rows_cut=c.cut, longest_row=c.longest, max_length=data.max_length)
    room = min(data.max_length, s.base.context)
    if not c.long_dropped:
        text = f"longest prompt: {c.longest:,} tokens of {room:,}, answers have up to {r.max_tokens:,}; none dropped"
        yield Finding("ok", "long rows", text)
        return
    where = ", ".join(c.places["long_dropped"])
    text = f"{share(c.long_dropped, c.rows)} prompts leave an answer no room within {room:,} tokens and are dropped"
    fix = f"shorten them, or lower {r.named}.max_tokens"
    if data.max_length < s.base.context:
        fix += f"; the base reads {s.base.context:,} tokens: raise data.max_length"
    yield Finding("stop" if c.long_dropped > c.rows / 2 else "warn", "long rows", f"{text}: {where}", fix)


def _is_taught(d: DistillationSection) -> Iterator[Finding]:
    kl = "KL(student ‖ teacher)" if d.divergence == "reverse" else "KL(teacher ‖ student)"
    what = d.base or ("the base with the adapter off" if d.teacher == BASE_MODEL else d.teacher)
    over = "over the whole vocabulary"
    if d.url is not None:
        what = f"{d.teacher} at {d.url}"
        over = (
            "by the tokens drawn" if d.divergence == "reverse" else f"over the {d.top_logprobs} likeliest and the rest"
        )
    told = ", told more than the student" if d.system else ""
    yield Finding("ok", "teacher", f"{what}{told}; learned: {kl} of each token, {over}")


def _is_rewarded(s: TextSubject, r: ReinforcementSection) -> Iterator[Finding]:
    if r.group == 1:
        text = "groups of one: what an answer is compared with is other prompts' answers"
        yield Finding("warn", "prompts", text, "reinforcement.group=8")
    changed = [k for k, plain in (("temperature", r.temperature == 1), ("top_p", r.top_p == 1)) if not plain]
    changed += ["grammar"] if r.grammar else []
    if changed:
        text = f"tokens are drawn from another distribution than the one that is trained ({', '.join(changed)})"
        yield Finding("warn", "draws", f"{text}: each is weighted by the ratio, {r.importance_cap:g} at most")
    if r.one_step_off_policy:
        text = "drawn while the answers before them are trained on: off-policy by one draw, with exact ratios"
        yield Finding("warn", "draws", text)
    rewards = ", ".join(f"{reward.weight:g} × {reward.called}" for reward in r.rewards)
    yield Finding("ok", "rewards", rewards)
    if r.kl:
        reference = (
            "the base with the adapter off" if s.data.start is None else f"{s.config.adapter.start} as it is now"
        )
        yield Finding("ok", "reference", f"compared with: {reference}")


def _judged(s: TextSubject, items: Sequence[Item]) -> Iterator[Finding]:
    """Check KTO's weights, which should compensate for unequal numbers.

    λ_D·n_D should be 1 to 4/3 of λ_U·n_U (arXiv 2402.01306)."""
    good = sum(bool(item.desirable) for item in items)
    bad = len(items) - good
    weights = s.config.preference
    s.numbers.update(desirable=good, undesirable=bad)
    text = f"{counted(len(items), 'answer')}, {good:,} desirable and {bad:,} not"
    if not good or not bad:
        yield Finding("stop", "preferences", f"{text}: there is nothing to tell apart", "give answers of both kinds")
        return
    ratio = weights.desirable * good / (weights.undesirable * bad)
    if 0.95 <= ratio <= 1.4:
        yield Finding("ok", "preferences", text)
        return
    raised = (
        f"preference.desirable={weights.undesirable * bad / good:.2g}"
        if ratio < 1
        else f"preference.undesirable={0.75 * weights.desirable * good / bad:.2g}"
    )
    yield Finding("warn", "preferences", f"{text}: weighted {ratio:.2f} to 1, where 1 to 1.33 is advised", raised)


def _rows_are_apart(s: TextSubject) -> Iterator[Finding]:
    """Report held-out rows that are also trained on, which distort validation loss."""
    about = s.data.about
    if about is not None:
        yield Finding("ok", "format", f"{counted(about.rows, 'row')} in `{about.format}` format: {about.why}")
        if about.unused:
            text = f"columns that nothing uses: {', '.join(about.unused)}"
            yield Finding("warn", "columns", text, "data.columns names the ones to use, as {prompt: question}")
        if about.duplicates:
            yield Finding(
                "warn", "duplicates", f"{share(about.duplicates, about.rows)} rows repeat an earlier one exactly"
            )
    s.numbers.update(held_out=len(s.data.held.texts))
    if not s.data.held.texts:
        if s.config.evaluation.patience is not None:
            text = "`evaluation.patience` is set, but no row is held out to stop by"
            yield Finding("stop", "held out", text, "give data.validation or data.split, or more rows")
        else:
            yield Finding("warn", "held out", "no rows are held out: over-fitting cannot be seen", "data.split=0.05")
        return
    if s.data.held.encoded.counts.trained_tokens == 0:
        yield Finding("stop", "held out", "the held-out rows have no token to score", "check data.validation's format")
    leak = leakage(s.data.train.texts, s.data.held.texts)
    s.numbers.update(leaked=leak.identical, same_prompt=leak.same_prompt)
    total = len(s.data.held.texts)
    pairs = "; ".join(f"{a} is {b}" for a, b in leak.examples)
    if leak.identical:
        text = f"{share(leak.identical, total)} held-out rows are also trained on: {pairs}"
        fix = "remove them from one side; data.split never puts equal rows on both"
        yield Finding("stop" if leak.identical > total / 2 else "warn", "held out", text, fix)
    if leak.same_prompt:
        others = "are also trained on" if s.config.drawn else "also occur in training, with other answers"
        yield Finding("warn", "held out", f"{share(leak.same_prompt, total)} held-out prompts {others}: {pairs}")
    if not leak.identical and not leak.same_prompt:
        yield Finding("ok", "held out", f"{counted(total, 'held-out row')}, none of them trained on")


_Checks = tuple[Callable[[TextSubject], Iterator[Finding]], ...]

_DATA_CHECKS: _Checks = (
    _something_is_learned,
    long_rows,
    _the_end_is_learned,
    _begins_once,
    _inference_agrees,
    _turns_and_control_tokens,
    _answers_compare,
    _rows_are_apart,
)

_PROMPT_CHECKS: _Checks = (
    _answers_are_drawn,
    _long_prompts,
    _begins_once,
    _rows_are_apart,
)


def data_findings(subject: TextSubject) -> Iterator[Finding]:
    """Yield the findings about a run's rows or prompts.

    The base's weights are not needed."""
    for check in _DATA_CHECKS if subject.config.drawn is None else _PROMPT_CHECKS:
        yield from check(subject)
