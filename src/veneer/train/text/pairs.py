"""Preference rows as tokens: the items that a preference loss compares.

    rows    → answer_rows       a pair as two ordinary rows, chosen and rejected, which `encode` takes as any others
    encoded → items_of          pairs of examples again; for KTO each answer alone, with its judgement
    items   → collate_items     their answers end to end in one batch
              mismatched        KTO: prompts with the answers that belong to others

Does not know losses, tokenizers or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from veneer.train.text.batches import Batch, collate
from veneer.train.text.encode import EncodedRows, Example
from veneer.train.text.rows import Row, unlearned

__all__ = ["Answers", "Item", "answer_rows", "collate_items", "items_of", "mismatched"]


@dataclass
class Item:
    """(chosen, rejected), or one answer that is `desirable` or not. `row`: the index of the row it is from.

    `reference`: log p of each answer under the reference model, once it is known; empty where no loss asks for it."""

    answers: tuple[Example, ...]
    row: int
    desirable: bool | None = None
    reference: tuple[float, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(e.tokens for e in self.answers)

    @property
    def learned(self) -> int:
        return sum(e.learned for e in self.answers)


@dataclass
class Answers(Batch):
    """The answers of some items, in order: those of a pair one after the other."""

    items: list[Item]


def answer_rows(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """Each answer as a row of its own, and for each the index of the row that it is from.

    What both answers of a pair begin with is their prompt and not learned, whoever said it."""
    out: list[Row] = []
    owners: list[int] = []
    for i, row in enumerate(rows):
        ends = [row.messages, row.rejected] if row.rejected else [row.messages]
        shared = row.shared() if row.rejected else 0
        for messages in ends:
            own = (*unlearned(messages[:shared]), *messages[shared:])
            out.append(replace(row, messages=own, rejected=(), label=None))
            owners.append(i)
    return out, owners


def items_of(
    encoded: EncodedRows, rows: Sequence[Row], owners: Sequence[int], *, paired: bool
) -> tuple[list[Item], EncodedRows]:
    """The items in the rows' order, and `encoded` with what is left of its examples.

    rows, owners: the preference rows, and `answer_rows`' second result. `paired`: a pair is one item, and an answer
    whose partner was left out is left out too (counted as `partners`); otherwise each answer is an item."""
    first = {i: at for at, i in reversed(list(enumerate(owners)))}  # of a pair, the chosen answer
    by_row: dict[int, list[Example]] = {}
    for example in encoded.examples:
        by_row.setdefault(owners[example.row], []).append(example)
    counts = replace(encoded.counts, places=dict(encoded.counts.places))
    items: list[Item] = []
    for i, answers in by_row.items():
        row = rows[i]
        if not paired:
            judged = [row.label if row.label is not None else e.row == first[i] for e in answers]
            items += [Item((e,), i, good) for e, good in zip(answers, judged, strict=True)]
        elif len(answers) < 2:
            counts.note("partners", row.where)
        else:
            chosen, rejected = answers
            if {chosen.row, rejected.row} & encoded.cut_rows:
                chosen, rejected = _one_prompt(chosen, rejected)
            if chosen.prompt != rejected.prompt:
                counts.note("other_prompts", row.where)
            items.append(Item((chosen, rejected), i))
    examples = [e for item in items for e in item.answers]
    counts.kept = len(examples)
    counts.tokens, counts.trained_tokens = sum(e.tokens for e in examples), sum(e.learned for e in examples)
    return items, replace(encoded, examples=examples, counts=counts)


def _one_prompt(a: Example, b: Example) -> tuple[Example, Example]:
    """Both after the shorter of their two prompts, where that is what cutting left of the longer one."""
    short = min(a.prompt, b.prompt, key=len)

    def after(example: Example) -> Example:
        prompt = example.prompt
        kept_first = 1 if prompt[0] == short[0] else 0  # a begin-of-text token stays when a row is cut
        gone = len(prompt) - len(short)
        if not gone or prompt[kept_first + gone :] != short[kept_first:]:
            return example
        ids = short + example.input_ids[len(prompt) :]
        return Example(ids, [False] * len(short) + example.trained[len(prompt) :], example.row)

    return after(a), after(b)


def collate_items(items: Sequence[Item]) -> Answers:
    batch = collate([e for item in items for e in item.answers])
    return Answers(batch.input_ids, batch.lengths, batch.trained, list(items))


def mismatched(items: Sequence[Item], max_length: int) -> list[Example]:
    """For each item its prompt with the answer of the next item, in the order given and round again, that has another
    prompt; at most `max_length` tokens, the answer's end cut. Empty where all have the same prompt."""
    out: list[Example] = []
    firsts = [item.answers[0] for item in items]
    prompts = [e.prompt for e in firsts]
    for i, prompt in enumerate(prompts):
        others = (firsts[(i + k) % len(firsts)] for k in range(1, len(firsts)))
        other = next((e for e in others if e.prompt != prompt), None)
        if other is not None and len(prompt) < max_length:
            start = len(other.prompt)
            ids = [*prompt, *other.input_ids[start:]][:max_length]
            out.append(Example(ids, [False] * len(prompt) + other.trained[start : start + len(ids) - len(prompt)], i))
    return out
