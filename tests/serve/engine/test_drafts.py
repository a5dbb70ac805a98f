"""Forced tokens and drafts save forward passes and change no answer."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import families
from tests.serve.forward.test_runner import base_of, trained
from tests.tiny_base import VOCAB_SIZE, tiny_tokenizer
from veneer.serve.engine.drafts import Drafter, Drafts
from veneer.serve.engine.engine import TextEngine
from veneer.serve.engine.grammar import Matcher, compile_grammar
from veneer.serve.engine.sampler import SampledRow, scored
from veneer.serve.forward.runner import Runner, RunnerRow
from veneer.serve.request import BASE, DigestMix, Finished, Request, Sampling, Token
from veneer.serve.settings import EngineSettings

pytest.importorskip("llguidance")
TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
PROMPT = tuple(TOKENIZER.encode("The printer on the third floor; the printer on the"))
SCHEMA = {
    "type": "object",
    "properties": {"team": {"enum": ["billing", "support"]}, "priority": {"enum": ["high", "low"]}},
    "required": ["team", "priority"],
    "additionalProperties": False,
}
TICKET = ("json_schema", json.dumps(SCHEMA))
MODEL: Any = families.llama3(vocab_size=VOCAB_SIZE)
ADAPTER = trained(MODEL, 1)
MIX: DigestMix = ((ADAPTER.digest(), 1.0),)


def engine(**settings: Any) -> TextEngine:
    base = replace(base_of(MODEL), stop_ids=(END,))
    return TextEngine(base, lambda *_: ADAPTER, EngineSettings(**{"cache_bytes": 1 << 20} | settings))


def together(engine: TextEngine, requests: Iterable[Request]) -> list[tuple[list[Token], Finished]]:
    async def answer(request: Request) -> tuple[list[Token], Finished]:
        *events, end = [event async for event in engine.events(request)]
        assert isinstance(end, Finished)
        assert end.error is None
        return [event for event in events if isinstance(event, Token)], end

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*map(answer, requests))

    return asyncio.run(asyncio.wait_for(all_of_them(), 120))


def alone(engine: TextEngine, request: Request) -> tuple[list[Token], Finished]:
    return together(engine, [request])[0]


def text(answer: tuple[list[Token], Finished]) -> str:
    return "".join(token.text for token in answer[0]) + answer[1].text


def test_drafts_change_no_bit_of_an_answer() -> None:
    greedy = Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)
    ways = [
        greedy,
        replace(greedy, logprobs=2, min_tokens=9),
        replace(greedy, frequency_penalty=0.3, repetition_penalty=1.1),
        Sampling(max_tokens=40, seed=4, temperature=0.1, logprobs=1, sampled_logprob=True, ignore_eos=True),
        Sampling(max_tokens=40, seed=5, top_p=0.3, prompt_logprobs=True, logprobs=0),
        Sampling(max_tokens=40, seed=6, temperature=0.5, logprobs=0, sampled_logprob=True, grammar=TICKET),
    ]
    found = []
    for draft in (0, 8):
        with engine(batch_invariant=True, draft=draft, rows=4) as one:
            single = [alone(one, Request(PROMPT, how, MIX)) for how in ways]
            mixes = [mix for mix in (BASE, MIX) for _ in ways]
            batch = together(one, [Request(PROMPT, how, mix) for how, mix in zip(ways * 2, mixes, strict=True)])
            assert one.cache.in_use == 0
            tokens = tuple(token.id for token in single[0][0])
            after = alone(one, Request((*PROMPT, *tokens, 5), greedy, MIX))  # finds the answer in the prefix cache
            found.append([(tokens, end.reason, text((tokens, end))) for tokens, end in [*single, *batch, after]])
            cached = after[1].usage.cached
            assert cached >= (len(PROMPT) + 39) // 16 * 16
            stats = one.stats()
            assert (stats.drafted_tokens > stats.accepted_tokens > 100) == bool(draft)
            assert stats.generated_tokens == sum(len(tokens) for tokens, _, _ in found[-1])
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["json_schema", "regex"])
def test_forced_tokens_equal_the_same_tokens_computed_singly(kind: Any) -> None:
    grammar = TICKET if kind == "json_schema" else ("regex", "The printer on the (third|first) floor[.]")
    sampling = Sampling(max_tokens=60, temperature=0.0, logprobs=1, sampled_logprob=True, grammar=grammar)
    with engine(batch_invariant=True, draft=0) as one:
        tokens, end = alone(one, Request(PROMPT, sampling, MIX))
        plain, _ = alone(one, Request(PROMPT, replace(sampling, logprobs=None, sampled_logprob=False), MIX))
        assert one.stats().forced_tokens >= 2 * 4
        assert one.stats().steps <= 2 * len(tokens) - 4
        vocabulary = one.vocabulary
    assert [(t.id, t.text) for t in tokens] == [(t.id, t.text) for t in plain]
    assert end.usage.completion == len(tokens)
    runner = Runner(base_of(MODEL), cache_bytes=1 << 20, batch_invariant=True)
    adapter = runner.prepare(ADAPTER, "a")
    row = SampledRow(
        replace(sampling, temperature=0.0),
        vocabulary=vocabulary,
        grammar=compile_grammar(kind, grammar[1], TOKENIZER, vocabulary=vocabulary, ends=(END,)).copy(),
    )
    logits = runner.run([RunnerRow(PROMPT, 0, range(20), [(adapter, 1.0)])])
    forced = row.force(99)
    for at, token in enumerate(tokens, len(PROMPT)):
        assert token.logprob == scored(logits, torch.tensor([token.id]), [0])[0].logprob
        if forced:
            assert token.id == forced.pop(0)
            assert token.sampled_logprob == 0
        else:
            assert token.id == int(logits[0].masked_fill(~row.mask(), -torch.inf).argmax())  # type: ignore[operator]
            row.take(token.id)
            forced = row.force(99)
        logits = runner.run([RunnerRow([token.id], at, range(20), [(adapter, 1.0)])])
    assert tokens[-1].id == END
    runner.close()


def test_forced_tokens_change_no_bit_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The regex's characters have two bytes and no token of their own: every second token is forced."""
    found, steps = [], []
    for forced in (Matcher.forced, lambda _: []):
        monkeypatch.setattr(Matcher, "forced", forced)
        with engine(batch_invariant=True, draft=0) as one:
            for grammar in (("regex", "[é-ý]{12}"), TICKET):
                way = Sampling(60, temperature=0.0, logit_bias={20: -3.0}, min_tokens=30, logprobs=1, grammar=grammar)
                ways = [way, replace(way, seed=7, temperature=1.0, frequency_penalty=0.5, sampled_logprob=True)]
                found += [alone(one, Request(PROMPT, how))[0] for how in ways]
                steps.append(one.stats().steps)
    assert found[:4] == found[4:]
    assert steps[0] == 2 * 13 < steps[2] == 2 * 25
    assert steps[1] < steps[3]


@pytest.mark.parametrize("logprobs", [None, 1])
def test_an_answer_can_end_inside_forced_text(logprobs: int | None) -> None:
    whole = '{"a":[1,"reset my password"]}'
    how = Sampling(90, temperature=0.0, logprobs=logprobs, grammar=("regex", r'\{"a":\[1,"reset my password"\]\}'))
    with engine(batch_invariant=True) as one:
        tokens, end = full = alone(one, Request(PROMPT, how))
        assert (text(full), end.reason, tokens[-1].id) == (whole, "stop", END)
        assert one.stats().steps == 1
        assert one.stats().forced_tokens == end.usage.completion == len(tokens)
        assert all((token.logprob is None) == (logprobs is None) for token in tokens)
        for most in (1, 4, len(tokens) - 1):
            part = alone(one, Request(PROMPT, replace(how, max_tokens=most)))
            assert (part[0], part[1].reason, part[1].usage.completion) == (tokens[:most], "length", most)
        stopped = alone(one, Request(PROMPT, replace(how, stop=("my p",))))
        assert (text(stopped), stopped[1].stop) == ('{"a":[1,"reset ', "my p")
        assert stopped[1].usage.completion == len(stopped[0]) < len(tokens)
        assert one.cache.in_use == 0


def test_drafted_samples_follow_the_models_distribution() -> None:
    """χ² over many seeds, against exact probabilities of token pairs; the prompt drafts the pair's first token."""

    def likely(ids: list[list[int]]) -> Any:
        with torch.no_grad():
            first = MODEL(input_ids=torch.tensor(ids)).logits[:, -1].double().topk(3)
        return first.values.softmax(-1).tolist(), first.indices.tolist()

    prompts = [[9, 8, 7, drafted, 9, 8, 7] for drafted in range(3, VOCAB_SIZE)]
    ids = next(ids for ids, tokens in zip(prompts, likely(prompts)[1], strict=True) if ids[3] in tokens)
    (p,), (tokens,) = likely([ids])
    pairs = {}
    for k, (q, others) in enumerate(zip(*likely([[*ids, token] for token in tokens]), strict=True)):
        pairs |= {(tokens[k], other): p[k] * q[i] for i, other in enumerate(others)}
    n = 600
    with engine(rows=2) as one:
        how = [Sampling(max_tokens=2, seed=seed, top_k=3, ignore_eos=True) for seed in range(n)]
        answers = together(one, [Request(tuple(ids), sampling) for sampling in how])
        assert one.stats().drafted_tokens > one.stats().accepted_tokens > n / 10
    counts = Counter((a.id, b.id) for (a, b), _ in answers)
    assert set(counts) <= set(pairs)
    assert sum((counts[pair] - n * p) ** 2 / (n * p) for pair, p in pairs.items()) < 26.1  # 8 degrees, 0.1%


def draft(drafter: Drafter, rows: int = 1, most: int = 8) -> str:
    return "".join(map(chr, drafter.propose(most, rows)))


def test_drafts_come_from_prompt_and_earlier_answers_of_same_root() -> None:
    drafts = Drafts()
    first = drafts.drafter(b"a", [*map(ord, "name=Ada Lovelace; name=")])
    assert draft(first) == "Ada"
    for token in map(ord, "Bob and Bo"):
        first.add(token)
    drafts.finished(first, 18)
    later = [drafts.drafter(root, [*map(ord, "xyz=Bo")]) for root in (b"a", b"b")]
    assert [draft(each) for each in later] == ["b ", ""]


def test_wrong_drafts_stop_and_right_drafts_grow() -> None:
    drafter = Drafts().drafter(b"", [*map(ord, "abcdefghijabcdefghij" * 2)])
    few = len(draft(drafter))
    for token in map(ord, "abcdefghij" * 3):
        drafter.add(token)
    assert len(draft(drafter)) == 8 > few
    assert len(draft(drafter, rows=32)) < 8
    for k in itertools.count():
        drafter.add(ord("ab"[k % 2]))
        drafter.add(1000 + k)
        if not draft(drafter):
            break
    assert k < 40
