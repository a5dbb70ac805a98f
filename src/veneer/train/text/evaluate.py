"""Score the base and adapters on held-out rows: loss, and generated completions.

    scores = score_mixes(base, rows, {"base": [], "support": ["runs/support"]})
    scores["support"].exact_match

    loss         Σ −log p(target) / number of targets, with the same targets as in training
    exact_match  share of rows with a greedy completion equal to the expected answer, ignoring leading and
                 trailing white space; JSON is compared by value: key order is ignored, 12.0 equals 12
    valid_json   share of rows with a completion that is a JSON object or array
    json_fields  for each key of the expected JSON objects: share of rows with an equal value
    likelier     share of pairs with log p(chosen) > log p(rejected)
    reward_…     log p(chosen) − log p(rejected), minus the same difference for the base: dpo's reward margin
                 with β = 1; accuracy: share of pairs with a positive result, margin: mean result in nats

Rows of plain text have no answer, so they only have loss and perplexity. For pairs, loss and completions are
those of the chosen answer.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.core.adapter import mix_text
from veneer.errors import AdapterError, DataError
from veneer.models.patching import without_dropout
from veneer.models.text.fast import fast
from veneer.models.text.generate import Completion, Prompt, complete
from veneer.models.text.loss import text_loss
from veneer.train.config.text import DataSection
from veneer.train.devices import ALONE, Devices
from veneer.train.loop import EvalResult
from veneer.train.rewards.text_scores import as_json, same_field, same_text
from veneer.train.text.batches import collate, grouped
from veneer.train.text.encode import Example, encode_rows
from veneer.train.text.preference import Item, answer_logps, answer_rows, preference_items
from veneer.train.text.render import Renderer
from veneer.train.text.rows import Row

if TYPE_CHECKING:
    from veneer.core.attach import Attachment
    from veneer.models.text.base import TextBase

_Mixes = Mapping[str, Sequence[str | tuple[str, float]]]
"""Name in the result -> adapters applied together; no adapters means the base.

An adapter is "NAME_OR_PATH[:strength]" or (name, strength)."""

_Answering = Callable[..., AbstractContextManager[Callable[..., list[Completion]]]]
"""Function (base, adapters by name, rows=) -> context manager.

The context manager yields a function (prompts, mix=, max_new_tokens=) -> completions, which selects the mix
on the model during the call. `veneer.serve.engine.offline.answering` is an example."""

_MICRO_TOKENS = 4096


@dataclass
class Scores:
    """The scores of one mix.

    answers: the model's completion for each row that has an expected answer, in row order."""

    rows: int = 0
    exact_match: float | None = None
    valid_json: float | None = None
    loss: float | None = None
    perplexity: float | None = None
    json_fields: dict[str, float] = field(default_factory=dict)
    likelier: float | None = None
    reward_accuracy: float | None = None
    reward_margin: float | None = None
    trained_tokens: int = 0
    seconds: float = 0.0
    answers: list[str] = field(default_factory=list, repr=False)

    def to_dict(self, *, answers: bool = False) -> dict[str, Any]:
        """Return all fields as plain values; include the field `answers` only if `answers` is true."""
        values = asdict(self)
        if not answers:
            del values["answers"]
        return values


def score_mixes(
    base: TextBase,
    rows: Sequence[Row],
    mixes: _Mixes,
    *,
    data: DataSection | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    generate: bool = True,
    attachment: Attachment | None = None,
    allow_other_base: bool = False,
    answering: _Answering | None = None,
    on_progress: Callable[[str, int, int], None] = lambda mix, done, rows: None,
) -> dict[str, Scores]:
    """Score each mix on `rows`.

    All adapters are attached once; only the selection changes between mixes.

    data: tokenization settings (max_length, train_on, chat_template). By default, the defaults of training,
        with rows truncated to the base's context.
    generate: False computes only loss and perplexity.
    attachment: the base's existing attachment.
    answering: replaces models.text.generate.complete; see `_Answering`.
    on_progress: called as on_progress(mix, answered rows, rows).

    Raises DataError if no row can be scored."""
    from veneer.adapters.use import attach_adapters, parse_spec

    if not rows:
        raise DataError("there are no rows to evaluate", fix="give a file with rows")
    data = data or DataSection(train="-", max_length=base.context, long_rows="cut")
    texts, owners = answer_rows(rows) if any(row.rejected for row in rows) else (list(rows), [])
    encoded = encode_rows(texts, base.tokenizer, data)
    examples, pairs = encoded.examples, list[Item]()
    if owners:
        pairs, _ = preference_items(encoded, rows, owners, paired=True)
        examples = [item.answers[0] for item in pairs]
    answered = [row for row in rows if row.last_assistant() < len(row.messages)] if generate else []
    prompts = [_prompt(base, row, encoded.renderer) for row in answered]
    expected = [str(row.messages[row.last_assistant()]["content"]) for row in answered]
    specs = {name: [parse_spec(s) for s in mix] for name, mix in mixes.items()}
    names = list(dict.fromkeys(name for mix in specs.values() for name, _ in mix))
    adapters = attach_adapters(base, names, attachment=attachment, allow_other_base=allow_other_base)
    out: dict[str, Scores] = {}
    previous = adapters.selection
    try:
        with adapters.off():
            base_margins = _margins(base, pairs)
            answerer = answering(base, adapters.adapters, rows=batch_size) if answering and answered else nullcontext()
            with answerer as answer:  # opened before any scoring, because opening the engine can change the model
                for mix, spec in specs.items() if answered else ():
                    began = time.perf_counter()
                    adapters.use(*spec)
                    out[mix] = Scores(len(rows))
                    out[mix].answers = answers_of(
                        base,
                        prompts,
                        max_new_tokens=max_new_tokens,
                        batch_size=batch_size,
                        on_progress=functools.partial(on_progress, mix),
                        answer=None if answer is None else functools.partial(answer, mix=spec),
                    )
                    score_answers(out[mix], expected)
                    out[mix].seconds = time.perf_counter() - began
        for mix, spec in specs.items():
            began = time.perf_counter()
            adapters.use(*spec)
            with fast(base.model):
                score = score_examples(base.model, examples, base.device)
            assert score is not None
            scores = out.setdefault(mix, Scores(len(rows)))
            scores.trained_tokens = score.trained
            if score.trained:
                if not math.isfinite(score.loss):
                    text = f"the loss is not finite with {mix_text(tuple(spec)) or 'the base'}"
                    raise AdapterError(text, fix="lower the strengths, or use --dtype float32")
                scores.loss, scores.perplexity = score.loss, score.perplexity
            if pairs:
                margins = _margins(base, pairs) if spec else base_margins
                scores.likelier = _mean(m > 0 for m in margins)
                if spec:
                    scores.reward_accuracy = _mean(m > b for m, b in zip(margins, base_margins, strict=True))
                    scores.reward_margin = _mean(m - b for m, b in zip(margins, base_margins, strict=True))
            scores.seconds += time.perf_counter() - began
    finally:
        adapters.selection = previous
        if attachment is None:
            adapters.detach()
    return out


def _margins(base: TextBase, pairs: Sequence[Item]) -> list[float]:
    """Return log p(chosen) − log p(rejected) of each pair with the selected mix."""
    if not pairs:
        return []
    with fast(base.model):
        logps = answer_logps(base, [e for item in pairs for e in item.answers], _MICRO_TOKENS)
    assert logps is not None
    return [chosen - rejected for chosen, rejected in zip(logps[::2], logps[1::2], strict=True)]


def score_examples(
    model: Any,
    examples: Sequence[Example],
    device: torch.device,
    *,
    loss: Callable[..., Tensor] = text_loss,
    micro_tokens: int = _MICRO_TOKENS,
    interrupted: Callable[[], bool] = lambda: False,
    devices: Devices = ALONE,
) -> EvalResult | None:
    """Return Σ NLL over the targets of `examples`, or None once `interrupted()` is true.

    Runs in eval mode without gradients and restores the model's mode. A row longer than `micro_tokens` forms
    its own batch. Rows without targets are skipped. With several `devices`, the result covers only the
    batches of this process."""
    examples = [e for e in examples if e.trained_tokens]
    groups = grouped([e.tokens for e in examples], micro_tokens)
    total, trained, rows, best = 0.0, 0, 0, 0
    with torch.no_grad(), without_dropout(model):
        for number, counts in devices.deal([sum(examples[i].tokens for i in group) for group in groups]):
            if interrupted():
                return None
            batch = collate([examples[i] for i in groups[number]])
            right = torch.empty(batch.trained_tokens, dtype=torch.bool, device=device)
            value = loss(model, batch.input_ids.to(device), batch.lengths, batch.trained, right)
            if counts:
                total += float(value)
                best += int(right.sum())
                trained += batch.trained_tokens
                rows += len(batch.lengths)
    return EvalResult(total, trained, rows, right=best)


def answers_of(
    base: TextBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 32,
    on_progress: Callable[[int, int], None] = lambda done, rows: None,
    answer: Callable[..., list[Completion]] | None = None,
) -> list[str]:
    """Return greedy completions in the order of the prompts.

    Identical prompts are completed once. answer: function (prompts, max_new_tokens=) that replaces
    models.text.generate.complete."""
    answer = answer or functools.partial(complete, base, batch_size=batch_size)
    keys = [json.dumps(prompt, sort_keys=True, default=str) for prompt in prompts]
    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    # Longest first, so that batches have little padding. Progress is reported after each chunk of batches.
    order = sorted(first.values(), key=lambda i: (-len(keys[i]), i))
    answers: dict[str, str] = {}
    for at in range(0, len(order), 4 * batch_size):
        chunk = order[at : at + 4 * batch_size]
        done = answer([prompts[i] for i in chunk], max_new_tokens=max_new_tokens)
        answers |= {keys[i]: completion.text for i, completion in zip(chunk, done, strict=True)}
        on_progress(round(len(answers) * len(prompts) / len(first)), len(prompts))
    return [answers[key] for key in keys]


def score_answers(scores: Scores, expected_answers: Sequence[str]) -> None:
    """Set the scores that compare `scores.answers` with the expected answers."""
    pairs = list(zip(scores.answers, expected_answers, strict=True))
    scores.exact_match = _mean(same_text(answer, expected_answer) for answer, expected_answer in pairs)
    scores.valid_json = _mean(isinstance(as_json(answer), dict | list) for answer, _ in pairs)
    right: dict[str, list[bool]] = {}
    for answer, expected_answer in pairs:
        value, fields = as_json(answer), as_json(expected_answer)
        for key in fields if isinstance(fields, dict) else ():
            right.setdefault(key, []).append(same_field(value, fields, key))
    scores.json_fields = {key: _mean(values) for key, values in right.items()}


def _prompt(base: TextBase, row: Row, renderer: Renderer) -> Prompt:
    """Return the prompt that inference gives the model before the row's last answer."""
    messages = row.messages[: row.last_assistant()]
    if renderer.template is not None and not row.tools and renderer.template == base.tokenizer.chat_template:
        return [{k: v for k, v in m.items() if k != "weight"} for m in messages]
    text = renderer.prompt(row)
    bos = base.tokenizer.bos_token
    if renderer.template is not None and bos and text.startswith(bos):
        # If both the template and the tokenizer write BOS, remove the BOS of the template.
        ids = base.tokenizer("x")["input_ids"]
        text = text.removeprefix(bos) if ids and ids[0] == base.tokenizer.bos_token_id else text
    return text


def _mean(values: Any) -> float:
    numbers = [float(v) for v in values]
    return sum(numbers) / len(numbers) if numbers else math.nan
