"""Preference pairs as tokens: both answers follow one prompt, and no answer loses its partner.

The prompt does not count in the loss.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny_base import tiny_tokenizer
from tests.train.text.test_encode import learned
from veneer.train.config.text import DataSection
from veneer.train.text.encode import encode_rows
from veneer.train.text.preference import Item, answer_rows, collate_items, mismatched_examples, preference_items
from veneer.train.text.rows import Row

TOKENIZER = tiny_tokenizer()


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def row(chosen: str, rejected: str, *before: dict[str, Any], where: str = "d:1") -> Row:
    prompt = before or (said("user", "Where is it?"),)
    ends = [(*prompt, said("assistant", text)) for text in (chosen, rejected)]
    return Row("messages", ends[0], rejected=ends[1], where=where)


def items(rows: list[Row], *, paired: bool = True, **data: Any) -> tuple[list[Item], Any]:
    texts, owners = answer_rows(rows)
    encoded = encode_rows(texts, TOKENIZER, DataSection(train="-", **data))
    return preference_items(encoded, rows, owners, paired=paired)


def test_only_the_two_answers_of_a_pair_are_trained() -> None:
    before = [said("system", "Be kind."), said("user", "Hi"), said("assistant", "Hello"), said("user", "And now?")]
    pairs, encoded = items([row("Here.", "There it is!", *before), row("a", "b")])
    assert [i.row for i in pairs] == [0, 1]
    chosen, rejected = pairs[0].answers
    assert learned(chosen, TOKENIZER) == ["Here.<|im_end|>"]
    assert learned(rejected, TOKENIZER) == ["There it is!<|im_end|>"]
    assert chosen.prompt == rejected.prompt
    assert TOKENIZER.decode(chosen.prompt).endswith("And now?<|im_end|>\n<|im_start|>assistant\n")
    assert encoded.counts.used == 4
    assert encoded.counts.trained_tokens == sum(i.trained_tokens for i in pairs)


def test_assistant_turns_of_long_answers_are_trained() -> None:
    shared = (said("user", "Hi"), said("assistant", "Hello"))
    ends = [
        (*shared, said("user", "Why?"), said("assistant", "So.")),
        (*shared, said("user", "When?"), said("assistant", "Then."), said("user", "Oh."), said("assistant", "Yes.")),
    ]
    pairs, _ = items([Row("messages", ends[0], rejected=ends[1])])
    assert [learned(e, TOKENIZER) for e in pairs[0].answers] == [
        ["So.<|im_end|>"],
        ["Then.<|im_end|>", "Yes.<|im_end|>"],
    ]


def test_dropped_answer_drops_its_partner_except_for_kto() -> None:
    rows = [row("Here.", "", where="d:1"), row("Here.", "x " * 300, where="d:2"), row("a", "b", where="d:3")]
    pairs, encoded = items(rows, max_length=200, long_rows="drop")
    assert [i.row for i in pairs] == [2]
    assert encoded.counts.partners == 2
    assert encoded.counts.first_rows["partners"] == ["d:1", "d:2"]
    assert len(encoded.examples) == encoded.counts.used == 2
    judged, _ = items(rows, paired=False, max_length=200, long_rows="drop")
    assert [(i.row, i.desirable) for i in judged] == [(0, True), (1, True), (2, True), (2, False)]


def test_cut_pairs_still_share_their_prompt() -> None:
    long = said("user", "The printer on the third floor " * 10)
    pairs, encoded = items(
        [row("Short.", "It is a good deal longer than that one.", long)], max_length=60, long_rows="cut"
    )
    chosen, rejected = pairs[0].answers
    assert chosen.prompt == rejected.prompt
    assert encoded.counts.other_prompts == 0
    assert encoded.counts.cut == 2
    assert max(chosen.tokens, rejected.tokens) == 60
    assert learned(chosen, TOKENIZER) == ["Short.<|im_end|>"]
    assert len(chosen.trained) == chosen.tokens


def test_pairs_with_different_prompt_tokens_are_counted() -> None:
    """Without a template, a single token can contain the end of the prompt and the start of an answer."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    # two letters that the tokenizer merges into one token
    merged = next(a + b for a in "eirt" for b in "nrhe" if len(tokenizer(a + b)["input_ids"]) == 1)
    ends = [(said("user", "x" + merged[0]), said("assistant", text)) for text in (merged[1], "!")]
    texts, owners = answer_rows(rows := [Row("prompt-completion", ends[0], rejected=ends[1], where="d:1")])
    _, encoded = preference_items(encode_rows(texts, tokenizer, DataSection(train="-")), rows, owners, paired=True)
    assert encoded.counts.other_prompts == 1
    assert encoded.counts.first_rows["other_prompts"] == ["d:1"]


def test_answers_of_a_pair_are_adjacent_in_a_batch() -> None:
    pairs, _ = items([row("Here.", "There it is!"), row("a", "b")])
    batch = collate_items(pairs)
    assert batch.items == pairs
    assert batch.lengths == [e.tokens for i in pairs for e in i.answers]
    for part, e in zip(batch.input_ids.split(batch.lengths), [e for i in pairs for e in i.answers], strict=True):
        assert torch.equal(part, torch.tensor(e.input_ids))


def test_mismatched_examples_answer_another_prompt() -> None:
    rows = [row("a", "b"), row("Yes, there.", "d", said("user", "Hm?")), row("e", "f")]
    pairs, _ = items(rows, paired=False)
    rows_ = mismatched_examples(pairs, 1000)
    assert len(rows_) == 6
    answers = [learned(e, TOKENIZER)[0] for e in rows_]
    assert [e.prompt for e in rows_] == [i.answers[0].prompt for i in pairs]
    # answers 0, 1, 4 and 5 have the same prompt; the next answer to another prompt is answer 2, to "Hm?"
    assert answers == [f"{t}<|im_end|>" for t in ("Yes, there.", "Yes, there.", "e", "e", "Yes, there.", "Yes, there.")]
    assert all(e.tokens == 20 for e in mismatched_examples(pairs, 20))
    assert mismatched_examples(pairs[:2], 1000) == []
