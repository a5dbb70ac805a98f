"""Evaluation: the loss equals transformers' loss, and answers are compared as documented."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from veneer.core.adapter import LoraSpec
from veneer.core.attach import attach
from veneer.core.init import create
from veneer.errors import AdapterError, DataError
from veneer.formats import peft
from veneer.models.text.base import TextBase
from veneer.models.text.fast import fast
from veneer.train.text import evaluate as module
from veneer.train.text.encode import Example
from veneer.train.text.evaluate import Scores, answers_of, score_answers, score_examples, score_mixes
from veneer.train.text.rows import Row


@pytest.fixture(scope="module")
def adapter(base: TextBase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter that changes the output."""
    folder = tmp_path_factory.mktemp("adapter") / "strong"
    made = create(base.model, LoraSpec(rank=4), seed=1)
    for pair in made.pairs.values():
        pair.B.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    made.card.base_fingerprint = base.fingerprint
    peft.write_folder(made, folder, base_name=base.name, base=base.model)
    return folder


def row(asked: str, answer: str, *, system: str = "") -> Row:
    first = ({"role": "system", "content": system},) if system else ()
    messages = (*first, {"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    return Row("messages", messages, where="test:1")


ROWS = [row("Where is it?", '{"team": "it", "urgent": true}'), row("And why so late again?", '{"team": "hr"}')]


def test_loss_equals_transformers_row_by_row(base: TextBase) -> None:
    total, trained = 0.0, 0
    for r in ROWS:
        text = base.tokenizer.apply_chat_template(list(r.messages), tokenize=False)
        ask = base.tokenizer.apply_chat_template(list(r.messages[:-1]), tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([base.tokenizer(text.rstrip("\n"), add_special_tokens=False)["input_ids"]])
        start = len(base.tokenizer(ask, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logp = F.log_softmax(base.model(input_ids=ids).logits[0].double(), dim=-1)
        total -= sum(float(logp[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
        trained += ids.shape[1] - start
    scores = score_mixes(base, ROWS, {"base": []}, max_new_tokens=2)["base"]
    assert scores.trained_tokens == trained
    assert scores.loss == pytest.approx(total / trained, rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(total / trained), rel=1e-4)
    assert scores.rows == 2


def test_loss_is_independent_of_batching(base: TextBase) -> None:
    g = torch.Generator().manual_seed(0)
    examples = []
    for n in (5, 17, 9, 30, 2):
        ids = torch.randint(3, 300, (n,), generator=g).tolist()
        examples.append(Example(ids, [i > n // 2 for i in range(n)], 0))
    one = score_examples(base.model, examples, base.device)
    for size in (1, 20, 40, 1000):
        many = score_examples(base.model, list(reversed(examples)), base.device, micro_tokens=size)
        assert many.trained == one.trained
        assert many.nll == pytest.approx(one.nll, rel=1e-5)


def test_accuracy_counts_greedy_tokens(base: TextBase) -> None:
    ids = [5, 6, 7]
    with torch.no_grad():
        for n in range(12):
            written = int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(written if n % 3 else (written + 1) % 300)
        best = base.model(input_ids=torch.tensor([ids])).logits[0, 2:-1].argmax(-1)
    expected = int((best == torch.tensor(ids[3:])).sum())
    assert expected == 8
    examples = [Example(ids, [i > 2 for i in range(15)], 0), Example([5, 6], [False, False], 0)]
    for path in (nullcontext(), fast(base.model)):
        with path:
            actual = score_examples(base.model, examples, base.device)
        assert (actual.right, actual.trained) == (expected, 12)
        assert actual.measures == {"token_accuracy": 8 / 12}


def test_scoring_uses_no_dropout_and_restores_the_mode(base: TextBase) -> None:
    examples = [Example([5, 6, 7], [False, True, True], 0)]
    base.model.train()
    try:
        score_examples(base.model, examples, base.device)
        assert base.model.training
    finally:
        base.model.eval()
    assert score_examples(base.model, examples, base.device, interrupted=lambda: True) is None


def test_each_mix_is_scored_and_the_base_restored(base: TextBase, adapter: Path) -> None:
    mixes = {"base": [], "full": [str(adapter)], "none": [f"{adapter}:0"], "half": [(str(adapter), 0.5)]}
    scores = score_mixes(base, ROWS, mixes, max_new_tokens=4)
    assert list(scores) == list(mixes)
    assert scores["none"].loss == scores["base"].loss
    assert len({scores["base"].loss, scores["full"].loss, scores["half"].loss}) == 3
    with attach(base.model) as attachment:  # `attach` raises if an adapter is still attached
        attachment.add("a", peft.read_folder(adapter, base.model))
        attachment.use("a")
        example = score_mixes(base, ROWS, {"again": [("a", 1.0)]}, generate=False, attachment=attachment)["again"]
        assert example.loss == pytest.approx(scores["full"].loss)
        assert attachment.selection.mix[0][0] is attachment.adapters["a"]


def test_plain_text_rows_have_loss_only(base: TextBase) -> None:
    scores = score_mixes(base, [Row("text", text="The printer does not answer.", where="t:1")], {"base": []})["base"]
    assert scores.loss is not None
    assert scores.exact_match is None


def test_an_empty_dataset_is_an_error(base: TextBase) -> None:
    with pytest.raises(DataError, match="no rows"):
        score_mixes(base, [], {"base": []})


def test_missing_adapter_is_named(base: TextBase, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere"):
        score_mixes(base, ROWS, {"x": [str(tmp_path / "nowhere")]})


def test_equal_prompts_are_answered_once_and_in_order(base: TextBase, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt: list[str] = []

    class Said:
        def __init__(self, text: str) -> None:
            self.text = text

    def complete(base: Any, prompts: list[str], **settings: Any) -> list[Said]:
        prompt.extend(prompts)
        return [Said(f"re: {p}") for p in prompts]

    monkeypatch.setattr(module, "complete", complete)
    events: list[tuple[int, int]] = []
    prompts = ["a", "bbb", "a", "cc", "bbb"]
    out = answers_of(base, prompts, batch_size=1, on_progress=lambda *args: events.append(args))
    assert out == [f"re: {p}" for p in prompts]
    assert sorted(prompt) == ["a", "bbb", "cc"]
    assert events[-1] == (5, 5)


JSON_ANSWERS = [
    ("yes", "yes", 1, 0), (" yes\n", "yes", 1, 0), ("Yes", "yes", 0, 0), ('{"a": 1}', '{"a":1}', 1, 1),
    ('{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1, 1), ('{"a": 1.0}', '{"a": true}', 0, 1), ("[1]", "[1]", 1, 1),
    ('{"a": 1', '{"a": 1}', 0, 0), ("5", "5", 1, 0), ("5.0", "5", 0, 0), ("", "yes", 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected", "exact", "valid"), JSON_ANSWERS)
def test_json_answers_are_compared_by_value(answer: str, expected: str, exact: int, valid: int) -> None:
    scores = Scores(1, answers=[answer])
    score_answers(scores, [expected])
    assert (scores.exact_match, scores.valid_json) == (exact, valid)


def test_fields_are_scored_if_expected() -> None:
    expected = [{"team": "it", "n": 1}, {"team": "hr"}, {"team": "it", "n": 2}]
    answers = ['{"n": 1, "team": "it"}', '{"team": "it"}', "nonsense"]
    scores = Scores(3, answers=answers)
    score_answers(scores, [json.dumps(w) for w in expected])
    assert scores.json_fields == {"team": pytest.approx(1 / 3), "n": pytest.approx(1 / 2)}


def test_pairs_are_scored_by_logprob_margins(base: TextBase, adapter: Path) -> None:
    texts = [("It is in the mail.", "No."), ("Soon.", "Never, and do not ask again."), ("Here", "There it is")]
    pairs = []
    for chosen, rejected in texts:
        a, b = row("Where is it?", chosen), row("Where is it?", rejected)
        pairs.append(Row("messages", a.messages, rejected=b.messages, where="test:1"))
    scores = score_mixes(base, pairs, {"base": [], "mine": [str(adapter)]}, max_new_tokens=2)
    margins = {}
    for mix in ([], [str(adapter)]):
        sides = [
            [score_mixes(base, [row("Where is it?", t)], {"x": mix}, generate=False)["x"] for t in pair]
            for pair in texts
        ]
        logps = [[-(s.loss or 0) * s.trained_tokens for s in side] for side in sides]
        margins["mine" if mix else "base"] = [w - l for w, l in logps]
    for name, mix_scores in scores.items():
        assert mix_scores.likelier == pytest.approx(sum(m > 0 for m in margins[name]) / 3)
    gained = [m - b for m, b in zip(margins["mine"], margins["base"], strict=True)]
    assert scores["mine"].reward_margin == pytest.approx(sum(gained) / 3, rel=1e-3, abs=1e-3)
    assert scores["mine"].reward_accuracy == pytest.approx(sum(g > 0 for g in gained) / 3)
    assert scores["base"].reward_accuracy is None
    alone = score_mixes(base, [row("Where is it?", chosen) for chosen, _ in texts], {"base": []}, generate=False)
    assert scores["base"].loss == pytest.approx(alone["base"].loss, rel=1e-5)
    assert len(scores["mine"].answers) == 3
