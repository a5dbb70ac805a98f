"""The engine: a request's completion is never changed by batching, caching or other requests' failures."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import types
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.families import FAMILIES, VOCAB
from tests.serve.forward.test_runner import base_of, recurrent, trained
from veneer.core.adapter import Adapter
from veneer.core.attach import attach
from veneer.errors import AdapterError
from veneer.serve.engine import grammar
from veneer.serve.engine.engine import TextEngine
from veneer.serve.forward.runner import block_bytes
from veneer.serve.names.adapter_sources import Problems
from veneer.serve.request import BASE, DigestMix, EngineEvent, Finished, Refused, Request, Sampling, Started, Token
from veneer.serve.settings import EngineSettings

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


class Shelf:
    """Provides adapters by digest, as a library does, and records each read."""

    def __init__(self, *adapters: Adapter) -> None:
        self.by_digest = {a.digest(): a for a in adapters}
        self.reads: list[str] = []
        self.gate: threading.Event | None = None

    def __call__(self, digest: str, problems: Problems) -> Adapter:
        self.reads.append(digest)
        if self.gate is not None:
            self.gate.wait(10)
        if digest not in self.by_digest:
            raise AdapterError("its file is gone")
        return self.by_digest[digest].mapped(lambda t: t.clone())


def fresh(family: str = "qwen3") -> Any:
    return FAMILIES[family]()


def engine_of(model: Any, shelf: Shelf, **settings: Any) -> TextEngine:
    small = {"cache_bytes": 1 << 20} | settings
    return TextEngine(base_of(model), shelf, EngineSettings(**small))


async def answer(engine: TextEngine, request: Request) -> tuple[list[int], str, Finished]:
    ids, text = [], ""
    async for event in engine.events(request):
        if isinstance(event, Token):
            ids.append(event.id)
            text += event.text
        elif isinstance(event, Finished):
            return ids, text + event.text, event
    raise AssertionError("no end")


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 120))


def together(engine: TextEngine, requests: Iterable[Request]) -> list[Any]:
    """Return the completions of requests that run concurrently."""

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(answer(engine, request) for request in requests))

    return run(all_of_them())


def greedy(model: Any, shelf: Shelf, mix: DigestMix, prompt: tuple[int, ...], n: int) -> list[int]:
    """Sample greedily without a cache, with the mix attached by veneer.core.

    Runs a full forward pass per token.
    """
    with attach(model) as attachment, torch.no_grad():
        for digest, _ in mix:
            attachment.add(digest, shelf.by_digest[digest])
        attachment.use(*mix)
        ids = list(prompt)
        for _ in range(n):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def prompt(n: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mixtral"])
def test_answers_in_a_mixed_batch_equal_separate_answers(family: str) -> None:
    model = fresh(family)
    exclude = ("*.experts",) if family == "mixtral" else ()
    shelf = Shelf(
        trained(model, 1), trained(model, 2, rslora=True, rank=5), trained(model, 3, dora=True, exclude=exclude)
    )
    a, b, c = shelf.by_digest
    mixes: list[DigestMix] = [BASE, ((a, 1.0),), ((b, -0.5),), tuple(sorted([(a, 0.5), (c, 1.0)])), ((c, 1.0),), BASE]
    prompts = [prompt(n, n) for n in (5, 40, 17, 23, 33, 1)]
    want = [greedy(model, shelf, mix, p, 12) for mix, p in zip(mixes, prompts, strict=True)]
    with engine_of(model, shelf, budget=16, rows=4) as engine:
        got = together(engine, [Request(p, GREEDY, mix) for p, mix in zip(prompts, mixes, strict=True)])
        assert [ids for ids, _, _ in got] == want
        for (_, _, end), p in zip(got, prompts, strict=True):
            assert end.reason == "length"
            assert (end.usage.prompt, end.usage.completion) == (len(p), 12)
        assert engine.cache.in_use == 0
        assert sorted(shelf.reads) == sorted([a, b, c])


def test_preemption_changes_no_answer() -> None:
    model = fresh()
    shelf = Shelf(trained(model, 1))
    mix: DigestMix = ((next(iter(shelf.by_digest)), 1.0),)
    prompts = [prompt(20, i) for i in range(6)]
    many = Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)
    want = [greedy(model, shelf, mix, p, 40) for p in prompts]
    size = 2 * 2 * 2 * 8 * 16 * 4  # layers · (keys, values) · heads · head dim · tokens per block · float32 bytes
    with engine_of(model, shelf, cache_bytes=11 * size) as engine:
        assert engine.runner.blocks == 11
        got = together(engine, [Request(p, many, mix) for p in prompts])
        assert engine.stats().preemptions > 0
    assert [ids for ids, _, _ in got] == want


def test_prefixes_are_shared_only_under_one_mix() -> None:
    model = fresh()
    one, two = trained(model, 1), trained(model, 2)
    shelf = Shelf(one, two)
    a, b = shelf.by_digest
    p = prompt(50)
    cached = []
    with engine_of(model, shelf) as engine:
        for mix in [((a, 1.0),), ((b, 1.0),), ((a, 1.0),), BASE, ((a, 0.5),), ((b, 1.0),), BASE]:
            ids, _, end = run(answer(engine, Request(p, GREEDY, mix)))
            cached.append(end.usage.cached)
            assert ids == greedy(model, shelf, mix, p, 12)
    assert cached == [0, 0, 48, 0, 0, 48, 48]


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "mixtral"])
def test_the_logprobs_of_a_prompt_are_the_models_own(family: str) -> None:
    """The logprobs are equal even if the prompt is chunked, batched, cached, or recomputed after a preemption."""
    model = fresh(family)
    adapter = trained(model, 1)
    shelf = Shelf(adapter)
    mix: DigestMix = ((adapter.digest(), 0.7),)
    long, short = prompt(70), prompt(1)
    with attach(model) as attachment, torch.no_grad():
        attachment.add("a", adapter)
        attachment.use(("a", 0.7))
        want = model(input_ids=torch.tensor([long])).logits[0].double().log_softmax(-1)
    many = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
    scoring = replace(many, logprobs=2, prompt_logprobs=True)

    async def first(engine: TextEngine, request: Request) -> Token:
        tokens = [event async for event in engine.events(request) if isinstance(event, Token)]
        assert [bool(t.prompt) for t in tokens] == [True] + [False] * 23
        return tokens[0]

    async def work(engine: TextEngine) -> list[Any]:
        await answer(engine, Request(long, GREEDY, mix))
        others = [answer(engine, Request(prompt(30, seed), many, mix if seed % 2 else BASE)) for seed in range(3)]
        asked = [first(engine, Request(p, scoring, mix)) for p in (long, short)]
        return (await asyncio.gather(*others, *asked))[3:]

    block = block_bytes(base_of(model))
    for budget, blocks in ((16, 200), (64, 14)):
        with engine_of(model, shelf, budget=budget, rows=8, cache_bytes=blocks * block) as engine:
            scored, alone = run(work(engine))
            assert bool(engine.stats().preemptions) == (blocks == 14)
        assert [t.id for t in scored.prompt] == list(long)
        assert scored.prompt[0].logprob is None
        for k, token in enumerate(scored.prompt[1:], 1):
            assert token.logprob == pytest.approx(float(want[k - 1, token.id]), abs=1e-4)
            best = want[k - 1].topk(2)
            assert [i for i, _, _ in token.top] == best.indices.tolist()
            assert [p for _, _, p in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [(t.id, t.logprob) for t in alone.prompt] == [(short[0], None)]


def test_an_unreadable_adapter_fails_only_its_request() -> None:
    model = fresh()
    shelf = Shelf(trained(model, 1))
    good = next(iter(shelf.by_digest))
    wanted: list[DigestMix] = [((good, 1.0),), (("sha256:gone", 1.0),)] * 5
    with engine_of(model, shelf) as engine:
        got = together(engine, [Request(prompt(9, i), GREEDY, mix) for i, mix in enumerate(wanted)])
    for i, (ids, _, end) in enumerate(got):
        if i % 2:
            assert (end.reason, ids) == ("error", [])
        else:
            assert ids == greedy(model, shelf, ((good, 1.0),), prompt(9, i), 12)


def test_reading_an_adapter_does_not_stop_other_requests() -> None:
    model = fresh()
    shelf = Shelf(trained(model, 1))
    shelf.gate = threading.Event()
    slow = next(iter(shelf.by_digest))

    async def both(engine: TextEngine) -> None:
        waiting = asyncio.create_task(answer(engine, Request(prompt(9), GREEDY, ((slow, 1.0),))))
        for i in range(5):
            await answer(engine, Request(prompt(9, i), GREEDY))
        assert not waiting.done()
        shelf.gate.set()
        ids, _, _ = await waiting
        assert ids == greedy(model, shelf, ((slow, 1.0),), prompt(9), 12)

    with engine_of(model, shelf) as engine:
        run(both(engine))


def test_a_cancelled_request_releases_everything() -> None:
    model = fresh()
    shelf = Shelf(trained(model, 1))
    mix: DigestMix = ((next(iter(shelf.by_digest)), 1.0),)
    long = Sampling(max_tokens=200, temperature=0.0, ignore_eos=True)

    async def leave(engine: TextEngine) -> None:
        events: AsyncIterator[EngineEvent] = engine.events(Request(prompt(9), long, mix))
        seen = 0
        async for event in events:
            seen += isinstance(event, Token)
            if seen == 3:
                break
        await events.aclose()  # type: ignore[attr-defined]
        never = asyncio.create_task(answer(engine, Request(prompt(9), long, mix)))
        await asyncio.sleep(0)
        never.cancel()
        for _ in range(500):
            if not engine.here:
                break
            await asyncio.sleep(0.01)
        assert engine.here == 0
        assert engine.cache.in_use == 0
        assert engine.stats().running == engine.stats().waiting == 0

    with engine_of(model, shelf) as engine:
        run(leave(engine))
        digest = mix[0][0]
        lease = engine.residents.acquire(((digest, 1.0),), lambda result: None)
        thing = weakref.ref(lease.parts[0][0])
        lease.release()
        engine.residents.drop(digest)
        gc.collect()
        assert thing() is None


def test_a_failed_step_ends_only_the_failing_request() -> None:
    model = fresh()
    shelf = Shelf()
    with engine_of(model, shelf) as engine:
        own: Callable[..., Any] = engine.runner.run

        def broken(rows: Any) -> Any:
            if any(row.tokens and 77 in row.tokens for row in rows):
                raise RuntimeError("no")
            return own(rows)

        engine.runner.run = broken  # type: ignore[method-assign]
        bad, good = (77, 5, 6), tuple(t for t in prompt(9) if t != 77)
        got = together(engine, [Request(p, Sampling(max_tokens=1, temperature=0.0)) for p in [bad, good] * 3])
    assert [end.reason for _, _, end in got] == ["error", "length"] * 3
    assert all(end.error.status == 500 for _, _, end in got[::2])


def test_the_engine_keeps_serving_after_a_failed_step() -> None:
    model = fresh()
    with engine_of(model, Shelf()) as engine:
        own, faults = engine.scheduler.step, [1]

        def broken() -> Any:
            if faults and engine.scheduler.running:
                faults.pop()
                raise RuntimeError("no")
            return own()

        engine.scheduler.step = broken  # type: ignore[method-assign]
        _, _, end = run(answer(engine, Request(prompt(9), GREEDY)))
        assert end.reason == "error"
        ids, _, _ = run(answer(engine, Request(prompt(9), GREEDY)))
        assert ids == greedy(model, Shelf(), BASE, prompt(9), 12)


def test_invalid_requests_are_refused_at_once() -> None:
    model = fresh()
    with engine_of(model, Shelf(), queue=0) as engine:
        for request, code in [
            (Request(prompt(200), Sampling(max_tokens=100)), "context_exceeded"),
            (Request(()), "invalid_request"),
            (Request((5, VOCAB + 3), Sampling(max_tokens=3)), "invalid_request"),
            (Request(prompt(3), Sampling(max_tokens=3)), "overloaded"),
            (Request(prompt(3), Sampling(max_tokens=3, logit_bias={VOCAB + 9: 1.0})), "overloaded"),
        ]:
            with pytest.raises(Refused) as refused:
                run(answer(engine, request))
            assert refused.value.code == code
    with pytest.raises(Refused) as refused:
        run(answer(engine, Request(prompt(3), Sampling(max_tokens=3))))
    assert refused.value.code == "shutting_down"


def test_stopping_cancels_running_requests() -> None:
    """Draining comes before cancelling; tests/serve/test_server.py covers draining."""
    model = fresh()
    engine = engine_of(model, Shelf()).start()
    own = engine.runner.run

    def slow(rows: Any) -> Any:
        time.sleep(0.02)  # slow enough that the completion is still running when the engine stops
        return own(rows)

    engine.runner.run = slow  # type: ignore[method-assign]

    async def late() -> Finished:
        events = engine.events(Request(prompt(9), Sampling(max_tokens=240, temperature=0.0, ignore_eos=True)))
        assert isinstance(await anext(events), Started)
        stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
        last = [e async for e in events][-1]
        await stopping
        return last

    assert run(late()).reason == "cancelled"
    assert engine.here == 0
    assert engine.cache.in_use == 0


def test_sampled_answers_depend_only_on_their_seed() -> None:
    model = fresh()
    with engine_of(model, Shelf()) as engine:
        requests = [Request(prompt(9), Sampling(max_tokens=10, seed=i, ignore_eos=True)) for i in range(12)]
        many, few = ([ids for ids, _, _ in together(engine, each)] for each in (requests, requests[:3]))
        assert few == many[:3]
        assert len({tuple(ids) for ids in many}) > 6


@pytest.mark.parametrize("make", [recurrent, fresh])
def test_a_repeated_step_starts_from_the_same_state(make: Callable[[], Any]) -> None:
    """A step can fail on its last row after earlier rows ran; the other completions must not change."""
    model = make()
    with engine_of(model, Shelf(), budget=16) as engine:
        own: Callable[..., Any] = engine.runner.run
        steps = 0

        def broken(rows: Any) -> Any:
            nonlocal steps
            if len(rows) == 1:
                return own(rows)
            steps += 1
            made = own(rows)
            if steps % 2:
                raise RuntimeError("after all of it was computed")
            return made

        engine.runner.run = broken  # type: ignore[method-assign]
        prompts = [prompt(n, n) for n in (5, 20, 33)]

        async def told(p: tuple[int, ...]) -> list[Token]:
            request = Request(p, replace(GREEDY, logprobs=0))
            return [event async for event in engine.events(request) if isinstance(event, Token)]

        async def together() -> list[list[Token]]:
            return await asyncio.gather(*map(told, prompts))

        got = run(together())
        assert steps > 4
    for p, tokens in zip(prompts, got, strict=True):
        ids = list(p)
        for token in tokens:  # compare each token with a full recomputation of the sequence
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            assert token.logprob == pytest.approx(float(scores[token.id]), abs=1e-4)
            ids.append(token.id)
        assert len(tokens) == 12


def test_an_engine_reports_that_it_is_idle() -> None:
    model = fresh()
    with engine_of(model, Shelf(), stuck_seconds=0.2) as engine:
        own: Callable[..., Any] = engine.runner.run
        gate = threading.Event()
        assert engine.problem() == ""

        def fails(rows: Any) -> Any:
            raise RuntimeError("CUDA error: device-side assert triggered")

        def waits(rows: Any) -> Any:
            gate.wait(20)
            return own(rows)

        async def ask() -> str:
            return (await answer(engine, Request(prompt(9), GREEDY)))[2].reason

        engine.runner.run = fails  # type: ignore[method-assign]
        assert [run(ask()) for _ in range(3)] == ["error"] * 3
        assert "failed for all their requests" in engine.problem()
        engine.runner.run = own  # type: ignore[method-assign]
        assert run(ask()) == "length"
        assert engine.problem() == ""
        engine.runner.run = waits  # type: ignore[method-assign]

        async def stuck() -> None:
            asked = asyncio.create_task(ask())
            await asyncio.sleep(0.5)
            assert "has not ended" in engine.problem()
            gate.set()
            assert await asked == "length"

        run(stuck())
        assert engine.problem() == ""


def test_masks_are_built_while_the_model_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_of(fresh(), Shelf()) as engine:
        own: Callable[..., Any] = engine.runner.run
        computing, masked = threading.Event(), threading.Event()
        beside: list[bool] = []
        steppers: set[threading.Thread] = set()

        def run_slowly(rows: Any) -> Any:
            steppers.add(threading.current_thread())
            computing.set()
            assert masked.wait(10)
            computing.clear()
            masked.clear()
            return own(rows)

        class Watched:
            def mask(self) -> Any:
                beside.append(computing.wait(10) and threading.current_thread() not in steppers)
                masked.set()
                allowed = torch.zeros(engine.vocabulary, dtype=torch.bool)
                allowed[7] = True
                return allowed

            done = False

            def forced(self) -> list[int]:
                return []

            def allowed(self, tokens: Any) -> int:
                return 0

            def advance(self, token: int) -> None:
                assert token == 7

        engine.runner.run = run_slowly  # type: ignore[method-assign]

        compiled = types.SimpleNamespace(copy=Watched)
        monkeypatch.setattr(grammar, "compile_grammar", lambda *_, **__: compiled)
        sampling = Sampling(max_tokens=3, temperature=0.0, ignore_eos=True, grammar=("regex", "a"))
        _, _, end = run(answer(engine, Request(prompt(9), sampling)))
        assert (end.reason, end.usage.completion) == ("length", 3)
        assert beside == [True] * 3
