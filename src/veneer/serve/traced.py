"""A server's steps followed on a GPU that is not there, beside what the plan counts for them.

    found = traced_serving(config, traffic)
    found.trace.peak, found.counted.peak · found.trace.waits

The base is made of its config alone (models/text/bare.py) and served by the engine's own runner and sampler, the way
that a small model of the same config was seen to run, its sequences as long as those of the traffic. Two steps are
taken: one in which every request decodes, and one in which some prompts are read beside those that decode. Rows have no
adapter, one, or two; but for one that is greedy, each draws from a nucleus, which takes most memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from veneer.core.adapter import Adapter, LoraSpec
from veneer.core.init import create
from veneer.errors import ConfigError
from veneer.models.text.bare import bare_text, config_of, small_text
from veneer.models.text.base import TextBase
from veneer.plan.memory import Load
from veneer.plan.plan import Plan
from veneer.plan.serving import Traffic, serving_memory
from veneer.plan.shape import model_shape
from veneer.plan.trace import Trace, traced
from veneer.plan.traced import TracedStep
from veneer.serve.engine.sampler import SampledRow, sample
from veneer.serve.forward.paged import BLOCK
from veneer.serve.forward.runner import Prepared, Runner, RunnerRow, block_bytes
from veneer.serve.request import Sampling
from veneer.serve.settings import EngineSettings

_WISHES = (
    Sampling(seed=1, top_p=0.95),
    Sampling(seed=2, top_p=0.9, logprobs=5),
    Sampling(seed=3, top_p=0.8, top_k=40, min_p=0.01, presence_penalty=0.5),
    Sampling(seed=4, top_p=0.99, temperature=0.7, repetition_penalty=1.1, logit_bias={3: 1.0}, min_tokens=9),
)


def traced_traffic(made: Plan, fields: Mapping[str, Any], say: Callable[[str], None]) -> TracedStep | None:
    """The steps of a server with a plan's traffic, its base as the planned run has it; None where the plan serves
    nothing. `fields`: the base's config.json."""
    if made.traffic is None or made.planned is None or not isinstance(made.planned[0], Load):
        return None
    load = made.planned[0]
    rank = load.rank if load.spec is None else load.spec.rank
    return traced_serving(fields, made.traffic, rank=rank, dtype=load.dtype, quantise=load.quantise, say=say)


def traced_serving(
    fields: Mapping[str, Any],
    traffic: Traffic,
    *,
    rank: int = 16,
    dtype: str = "bfloat16",
    quantise: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> TracedStep:
    """Two steps of a server of a base of this config.json. Raises ConfigError for a family that is not known or whose
    sequences run alone, and what torch raises where two devices meet."""
    config = config_of(fields)
    kind: torch.dtype = getattr(torch, dtype)
    length = traffic.prompt + traffic.answer
    say("a small server of this family is tried, to know what runs")
    how = _way(config, length)
    if how[0] == "alone":
        what = f"a server runs each sequence of this base alone, which is not traced: {how[1]}"
        raise ConfigError(what, fix="trace the training step, or another base")
    budget = max(EngineSettings.budget, traffic.together)
    with traced() as trace, torch.no_grad():
        say("the served base is made of its configuration, without weights")
        model = bare_text(config, dtype=kind, device="cuda", quantise=quantise)
        trace.hold("weights", [*model.parameters(), *model.buffers()])
        base = _base(model, kind, torch.device("cuda"), length, quantise or "")
        blocks = -(-length // BLOCK)
        room = block_bytes(base) * blocks * traffic.together
        runner = Runner(base, cache_bytes=room, like=how)
        trace.hold("weights", [*model.parameters(), *model.buffers()])  # some lie together now
        trace.hold("keys and values", [t for pages in runner.pages for t in (pages.K, pages.V)])
        adapters = [_adapter(runner, model, rank, str(i)) for i in range(min(traffic.tenants, traffic.together))]
        _steps(runner, traffic, budget, adapters, trace, say)
        shape = model_shape(model)
        runner.close()
    counted = serving_memory(shape, traffic, rank=rank, dtype=dtype, quantise=quantise, budget=budget)
    if how[0] != "fused":  # the others' steps are not recorded
        counted = replace(counted, recordings=0)
    ways = f"{how[0]}{f' ({how[1]})' if how[1] else ''}"
    return TracedStep(trace, counted, ways, ends={"veneer/serve/engine/sampler.py _read": 2}, what="served, traced")


def _way(config: Any, length: int) -> tuple[str, str]:
    small = small_text(config, torch.float32)
    runner = Runner(_base(small, torch.float32, torch.device("cpu"), length), cache_bytes=1 << 22)
    runner.close()
    return runner.how, runner.why


def _base(model: Any, dtype: torch.dtype, device: torch.device, length: int, quantised: str = "") -> TextBase:
    none: Any = None
    return TextBase("traced", model, none, Path(), "", dtype, device, "", context=length, quantised=quantised)


def _adapter(runner: Runner, model: Any, rank: int, key: str) -> Prepared:
    """As the runner keeps one: what was packed is kept in that form alone."""
    with torch.device("cuda"):
        made = create(model, LoraSpec(rank=rank), seed=0)
    ready = runner.prepare(made, key)
    if ready.packed is not None:
        ready.adapter = ready.packed.adapter = Adapter()
    return ready


def _steps(
    runner: Runner, traffic: Traffic, budget: int, adapters: list[Prepared], trace: Trace, say: Callable[[str], None]
) -> None:
    context, vocabulary = traffic.prompt + traffic.answer, runner.base.model.config.get_text_config().vocab_size
    own = -(-context // BLOCK)
    rows, draws = [], []
    for i, wish in enumerate(islice(cycle(_WISHES), traffic.together)):
        mix = [(adapters[i % len(adapters)], 1.0)] if adapters and i % 4 != 3 else []
        if mix and i % 2 and len(adapters) > 1:
            mix.append((adapters[(i + 1) % len(adapters)], 0.5))
        rows.append(RunnerRow([0], context - 1, range(i * own, (i + 1) * own), mix, 1, i))
        wish = wish if i else Sampling(temperature=0)
        draws.append(SampledRow(wish, range(min(9, vocabulary)), vocabulary=vocabulary, ends=(1,)))
    reads = min(2, traffic.together)
    each = min(traffic.prompt, (budget - traffic.together + reads) // reads)
    prompts = [replace(row, tokens=[0] * each, first=traffic.prompt - each) for row in rows[:reads]]
    for one in adapters:
        packed = [] if one.packed is None else one.packed.groups.values()
        trace.hold("adapters", [t for A, parts in packed for t in (A, *(p.B for p in parts))])
        trace.hold("adapters", [t for _, t in one.adapter.tensors()])
    trace.begin()
    for step, what in ((rows, "requests that decode"), ([*prompts, *rows[reads:]], "prompts beside them")):
        say(f"a server's step: {what} ({trace.operations:,} operations so far)")
        logits = runner.run(step)
        sample(logits, draws)
        del logits
    trace.end()
