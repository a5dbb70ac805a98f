"""A recorded decoding step is a function of its buffers: whoever replays it by calling it again on the same ones gets
what a step that is not recorded gives, whatever changes between two of them. Kernels are interpreted, on a CPU."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor
from transformers import LlamaConfig

from tests.families import VOCAB, build
from tests.serve.engine.test_engine import Shelf, answer, engine_of, greedy, prompt, run
from tests.serve.forward.test_runner import base_of, prompts, same, trained
from veneer.core.adapter import Adapter
from veneer.ops.mixed_rows import RECORD
from veneer.ops.sizes import RECORDED_ADAPTERS, RECORDED_ROWS, RECORDINGS
from veneer.plan.serving import Traffic, recorded_bytes, recorded_sizes, serving_memory
from veneer.plan.shape import text_shape
from veneer.plan.tables import base_config
from veneer.serve.engine import engine as engine_module
from veneer.serve.forward import graphs as graphs_module
from veneer.serve.forward.graphs import Capture, DecodeGraphs, StepSize
from veneer.serve.forward.paged import BLOCK
from veneer.serve.forward.runner import Prepared, Runner, RunnerRow
from veneer.serve.request import BASE, DigestMix, Request, Sampling

triton = pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.ops.dispatch.DEVICE", "cuda")


class Again:
    """Stands in for a GPU's recording: calls the function again. Counts what was recorded and what replayed."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda out: out) -> None:
        self.recorded = self.replayed = 0
        self._change = change

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        out = step().clone()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            out.copy_(self._change(step()))

        return replay, out


Mix = list[tuple[Prepared, float]]


def small() -> Any:
    """One layer: the interpreter takes a millisecond and more for each program of a kernel."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return build(LlamaConfig(**sizes, num_hidden_layers=1, head_dim=16, vocab_size=VOCAB, max_position_embeddings=64))


class Served:
    """Sequences side by side in a runner, each given tokens that do not depend on its answers."""

    def __init__(self, model: Any, capture: Capture | None = None) -> None:
        self.device = "" if capture is None else "cuda"
        self.runner = Runner(base_of(model), cache_bytes=1 << 14, like=("fused", ""), capture=capture)
        self.at, self.free = dict[int, int](), list(range(self.runner.blocks))
        self.blocks: dict[int, list[int]] = {}

    def step(self, work: list[tuple[int, list[int], Mix]]) -> list[Tensor]:
        """(sequence, its next tokens, mix) of each row -> the logits after them."""
        rows = []
        for sequence, tokens, mix in work:
            first = self.at.get(sequence, 0)
            own = self.blocks.setdefault(sequence, [])
            while len(own) * BLOCK < first + len(tokens):
                own.append(self.free.pop(len(self.free) // 2))
            rows.append(RunnerRow(tokens, first, own, mix, 1, sequence))
            self.at[sequence] = first + len(tokens)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("veneer.ops.dispatch.DEVICE", self.device)
            return [t.clone() for t in self.runner.run(rows)]

    def end(self, sequence: int) -> None:
        self.free += self.blocks.pop(sequence)
        del self.at[sequence]


def both(capture: Capture | None = None) -> tuple[Any, Served, Served]:
    """A model; a runner that records its steps; one of torch's operations that does not."""
    model = small()
    return model, Served(model, capture or Again()), Served(small())


def ready(served: Served, adapters: dict[str, Adapter]) -> dict[str, Prepared]:
    return {name: served.runner.prepare(adapter, name) for name, adapter in adapters.items()}


def test_rows_come_and_go_and_mixes_change_without_another_recording() -> None:
    again = Again()
    model, recorded, plain = both(capture=again)
    adapters = {"a": trained(model, 1), "b": trained(model, 2, rank=5, rslora=True), "c": trained(model, 3, rank=2)}
    mixes: dict[str, list[tuple[str, float]]] = {
        "none": [],
        "a": [("a", 1.0)],
        "b": [("b", -0.5)],
        "ab": [("a", 0.7), ("b", 0.4)],
        "cb": [("c", 2.0), ("b", 1)],
    }
    steps: list[list[tuple[int, str]]] = [
        [(0, "ab"), (1, "none"), (2, "a"), (3, "a")],
        [(3, "cb"), (0, "none"), (2, "cb"), (1, "b")],
        [(4, "none"), (2, "ab"), (0, "ab")],
    ]
    ids, own, other = prompts([3, 17, 15, 5, 2]), ready(recorded, adapters), ready(plain, adapters)
    started: set[int] = set()
    for n, step in enumerate(steps):
        for sequence, _ in step:
            if sequence not in started:
                started.add(sequence)
                for served in (recorded, plain):
                    served.step([(sequence, ids[sequence], [])])
        got, want = (
            served.step([(s, [7 + n + s], [(kept[name], strength) for name, strength in mixes[m]]) for s, m in step])
            for served, kept in ((recorded, own), (plain, other))
        )
        for g, w in zip(got, want, strict=True):
            same(g, w)
        if n == 1:
            recorded.end(3)
            plain.end(3)
    graphs = recorded.runner.graphs
    assert graphs is not None
    assert graphs.problem == ""
    assert (graphs.sizes, again.recorded, again.replayed) == (1, 1, len(steps))


def test_adapters_load_and_leave_and_their_slots_go_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "RECORDED_ADAPTERS", 2)
    model, recorded, plain = both()
    for served in (recorded, plain):
        served.step([(0, [5, 9, 11], [])])
    for seed in range(3):
        adapters = {f"n{seed}": trained(model, seed, rank=1 + seed)}
        (own,), (other,) = ready(recorded, adapters).values(), ready(plain, adapters).values()
        same(recorded.step([(0, [seed], [(own, 1.0)])])[0], plain.step([(0, [seed], [(other, 1.0)])])[0])
        if seed % 2:
            recorded.runner.let_go(own.key)
            plain.runner.let_go(other.key)
    assert recorded.runner.graphs is not None
    assert recorded.runner.graphs.problem == ""
    many = ready(recorded, {str(i): trained(model, 9 + i, rank=1) for i in range(3)})
    kept = ready(plain, {name: one.adapter for name, one in many.items()})
    got = recorded.step([(0, [3], [(one, 0.5) for one in many.values()])])
    same(got[0], plain.step([(0, [3], [(one, 0.5) for one in kept.values()])])[0])  # more than slots: as ever


def test_a_dora_and_a_changed_head_and_embedding() -> None:
    again = Again()
    model, recorded, plain = both(again)
    adapters = {
        "dora": trained(model, 1, dora=True),
        "head": trained(model, 2, targets=("lm_head", "*.q_proj")),
        "words": trained(model, 3, targets=("*.embed_tokens", "*.q_proj")),
    }
    own, other = ready(recorded, adapters), ready(plain, adapters)
    for served in (recorded, plain):
        for sequence in range(2):
            served.step([(sequence, [5, 9, 11], [])])
    for name, recordings in (("dora", 1), ("head", 2), ("words", 2)):
        for token in (3, 4) if name == "dora" else (5,):
            got, want = (
                served.step([(0, [token], [(kept[name], 0.8)]), (1, [token + 1], [])])
                for served, kept in ((recorded, own), (plain, other))
            )
            for g, w in zip(got, want, strict=True):
                same(g, w)
        assert again.recorded == recordings, name
    assert again.replayed == 3


@pytest.mark.parametrize("fails", [True, False])
def test_what_cannot_be_recorded_or_gives_other_logits_is_not_used(fails: bool) -> None:
    def change(out: Tensor) -> Tensor:
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        return out * 1.01

    _, recorded, plain = both(capture=Again(change))
    for served in (recorded, plain):
        served.step([(0, [5, 9, 11], [])])
    for token in (3, 4):
        same(recorded.step([(0, [token], [])])[0], plain.step([(0, [token], [])])[0])
    graphs = recorded.runner.graphs
    assert graphs is not None
    assert graphs.sizes == 0
    assert graphs.problem == "RuntimeError: " + (
        "operation not permitted when stream is capturing"
        if fails
        else "a recorded step gave other logits than the step itself"
    )


def test_prompts_and_large_steps_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "RECORDED_ROWS", 1)
    again = Again()
    _, recorded, _ = both(capture=again)
    recorded.step([(0, [5, 9, 11], []), (1, [4], [])])
    recorded.step([(0, [5], []), (1, [4], [])])
    assert again.recorded == 0


def test_a_recording_that_does_nothing_is_not_believed() -> None:
    """As one is of another device's stream."""
    _, recorded, plain = both(capture=lambda step: (lambda: None, step()))
    for served in (recorded, plain):
        served.step([(0, [5, 9, 11], [])])
    for token in (3, 4):
        same(recorded.step([(0, [token], [])])[0], plain.step([(0, [token], [])])[0])
    assert recorded.runner.graphs is not None
    assert "other logits" in recorded.runner.graphs.problem


def test_an_adapter_that_overflows_does_not_end_recording() -> None:
    """Its logits are nothing to compare with; the steps of others are recorded."""
    again = Again()
    model, recorded, plain = both(capture=again)
    (own,) = ready(recorded, {"a": trained(model, 1)}).values()
    for served in (recorded, plain):
        served.step([(0, [5, 9, 11], [])])
        served.step([(1, [7, 2], [])])
    assert not recorded.step([(0, [3], [(own, math.nan)])])[0].isfinite().any()
    assert again.recorded == 0
    same(recorded.step([(1, [3], [])])[0], plain.step([(1, [3], [])])[0])
    assert again.recorded == 1


def test_sizes_beyond_the_last_that_there_is_room_for_run_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "RECORDINGS", 1)
    again = Again()
    _, recorded, plain = both(capture=again)
    for served in (recorded, plain):
        for sequence in range(2):
            served.step([(sequence, [5, 9, 11], [])])
    for work in ([(0, [3], [])], [(0, [4], []), (1, [4], [])], [(1, [3], [])]):
        for g, w in zip(recorded.step(work), plain.step(work), strict=True):
            same(g, w)
    assert (again.recorded, again.replayed) == (1, 2)


def test_a_plan_counts_pages_and_records_of_the_size_that_they_have() -> None:
    """It cannot ask who has them, which would load torch."""
    shape = text_shape(base_config("smollm2-135m"))
    one, two = (replace(shape, layers=shape.layers[:n]) for n in (1, 2))
    layer, traffic = shape.layers[1], Traffic(1, 0, together=1, tenants=1)
    more = recorded_bytes(two, traffic) - recorded_bytes(one, traffic)
    assert more == len(layer.products) * RECORDED_ADAPTERS * RECORD * 8
    cache = serving_memory(one, traffic, rank=4, dtype="bfloat16", quantise=None, budget=1).cache
    assert cache == BLOCK * 2 * layer.kv_heads * layer.head_dim * 2


def test_a_plan_counts_the_sizes_that_are_recorded() -> None:
    traffic = Traffic(prompt=700, answer=400, together=5, tenants=2)
    adapter: Any = SimpleNamespace(rank=16, gains={}, groups={})
    met = set()
    for count in range(1, traffic.together + 1):
        for first in (0, 511, 512, 1023, 1024, traffic.prompt + traffic.answer - 1):
            for mix in ([], [(adapter, 1.0)]):
                rows = [RunnerRow([0], first, range(first // BLOCK + 1), [], 1, i) for i in range(count)]
                size = StepSize.of(rows, [mix] * count, 9)
                met.add((size.rows, size.blocks, size.adapters))
    assert sorted(met, reverse=True) == recorded_sizes(traffic)
    assert len(recorded_sizes(Traffic(10, 100_000, together=500))) == RECORDINGS
    assert recorded_sizes(Traffic(together=500))[0][0] == RECORDED_ROWS


def test_without_kernels_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("veneer.ops.dispatch.DEVICE", "")
    again = Again()
    _, recorded, _ = both(capture=again)
    recorded.device = ""
    recorded.step([(0, [5], [])])
    assert isinstance(recorded.runner.graphs, DecodeGraphs)
    assert recorded.runner.graphs.problem.startswith("no kernel for ")
    assert again.recorded == 0


def test_sizes_are_powers_of_two() -> None:
    """And short sequences, whose attention is in one part, are of one."""
    rows = [RunnerRow([1], first, range(99)) for first in (0, 15, 1023)]
    assert StepSize.of(rows, [[], [], []], 8) == StepSize(4, 64)
    assert StepSize.of([*rows[:1], RunnerRow([1], 1024, range(99))], [[], []], 8) == StepSize(2, 128)
    assert StepSize.of(rows[:1], [[]], 8) == StepSize(1, 32)


def test_an_engine_that_records_answers_as_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    again = Again()
    monkeypatch.setattr(engine_module, "Runner", partial(Runner, like=("fused", ""), capture=again))
    model = small()
    shelf = Shelf(trained(model, 1), trained(model, 2, rank=5))
    a, b = shelf.by_digest
    mixes: list[DigestMix] = [BASE, ((a, 1.0),), tuple(sorted([(a, 0.5), (b, 1.0)]))]
    lengths, asked = (5, 9, 3), (2, 5, 3)
    want = [greedy(model, shelf, mix, prompt(n, n), m) for mix, n, m in zip(mixes, lengths, asked, strict=True)]
    with engine_of(model, shelf, rows=2, cache_bytes=1 << 14) as engine:

        async def all_of_them() -> list[Any]:
            requests = [
                Request(prompt(n, n), Sampling(max_tokens=m, temperature=0.0, ignore_eos=True), mix)
                for mix, n, m in zip(mixes, lengths, asked, strict=True)
            ]
            return await asyncio.gather(*(answer(engine, r) for r in requests))

        got = run(all_of_them())
        graphs = engine.runner.graphs
        assert graphs is not None
        assert graphs.problem == ""
    assert [ids for ids, _, _ in got] == want
    assert again.replayed > again.recorded >= 1
