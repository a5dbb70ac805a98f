"""Training a text adapter: veneer against PEFT + transformers and TRL, on the same data, in one run.

    python benchmarks/text_training.py [--quick] [--rounds 3] [--json] [--imitate avx512|avx2]
                                                                          speed, memory, loss curves, share of the floor
    python benchmarks/text_training.py --kinds | --real [--json]          dropout and DoRA; real bases without peers
    python benchmarks/text_training.py --banking77 DIR [--seeds 0,1] [--int8-seeds 0,1] [--peer-seeds 0] [--quick]

Each side is a process that prints one JSON object. Sides run one after another, in rounds, so that changes of
the machine's speed affect all sides. All sides start from the same adapter and use the same tokens.

For speed: SmolLM2-135M in bfloat16, rank 16 on all seven projections, steps of 4 rows of 512 tokens, loss on
the last quarter of each row, AdamW. The floor is the time that the arithmetic takes without anything else:
4 · parameters · tokens (2 for the forward pass, 2 for the gradient of the input; frozen weights get no
gradient), at the rate of products of the model's shapes in the fastest of float32, bfloat16 and float16,
measured in the same round. The first step of each side is not counted, which excludes compiling from the rate
of PEFT under torch.compile. With --quick, each side counts three steps in one round, without TRL, activation
checkpointing and the slower dtype of torch.compile.
"""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from _real import real
from _report import (
    ROOT,
    bar,
    fastest,
    options,
    parsed,
    peak_bytes,
    print_report,
    report,
    row,
    run_side,
    say,
    without_slow_dtypes,
)

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS, LENGTH, RANK, ALPHA = 4, 512, 16, 32
RATE = 2e-4
ENOUGH = 25.0
"""Seconds after which no further step begins, if two steps were counted."""


# -- the workload ------------------------------------------------------------------------------------------------------


KINDS: dict[str, dict[str, Any]] = {
    "plain": {}, "dropout 0.05": {"dropout": 0.05}, "DoRA": {"dora": True},
    "DoRA, dropout 0.05": {"dora": True, "dropout": 0.05},
}  # fmt: skip


def write_workload(work: Path, steps: int, kind: str = "plain") -> None:
    """Write the base, an initial adapter in PEFT's format, and the tokens of each step, for all sides."""
    import torch

    import veneer

    base = veneer.load_base("smollm2-135m", dtype="bfloat16", device="cpu")
    spec = veneer.LoraSpec(rank=RANK, alpha=ALPHA, targets=tuple(LINEARS), **KINDS[kind])
    veneer.save_adapter(veneer.create(base.model, spec, seed=0), work / "start", base)
    text = (ROOT / "examples" / "tickets" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(text)
    stream = [t for line in text for m in json.loads(line)["messages"] for t in base.tokenizer(m["content"]).input_ids]
    need = steps * ROWS * LENGTH
    stream = (stream * (need // len(stream) + 1))[:need]
    torch.save(torch.tensor(stream).view(steps, ROWS, LENGTH), work / "ids.pt")
    (work / "base").write_text(str(base.directory), encoding="utf-8")


def workload(work: Path) -> tuple[str, Any]:
    import torch

    return (work / "base").read_text(encoding="utf-8"), torch.load(work / "ids.pt")


def timed_steps(ids: Any, step: Callable[[Any], float]) -> dict[str, Any]:
    losses, seconds = [], []
    for rows in ids:
        if len(seconds) > 2 and sum(seconds[1:]) > ENOUGH:
            break
        start = time.perf_counter()
        losses.append(step(rows))
        seconds.append(time.perf_counter() - start)
    step_seconds = statistics.median(seconds[1:])  # the first step includes memory allocation and compiling
    rate = ROWS * LENGTH / step_seconds
    found = {"tokens_per_second": rate, "seconds": seconds, "losses": losses, "peak_bytes": peak_bytes()}
    return found | {"first_step_more_seconds": seconds[0] - step_seconds}


# -- the sides ---------------------------------------------------------------------------------------------------------


def side_veneer(work: Path, quantize: str | None = None, keep: int = 0, int8: bool = False) -> dict[str, Any]:
    """Measure veneer. `quantize` is passed to `load_text`, `keep` to `fast`. `int8`: products in 8 bits."""
    import torch

    import veneer
    from veneer.models.patching import recording_int8
    from veneer.models.text.fast import fast
    from veneer.models.text.loss import text_loss

    base_path, ids = workload(work)
    base = veneer.load_base(base_path, dtype="bfloat16", device="cpu", quantize=quantize)
    attachment = veneer.attach(base.model)
    attachment.add("a", veneer.load_adapter(base, work / "start"), trainable=True)
    attachment.use("a")
    parameters = list(attachment.parameters("a").values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)
    trained = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    trained[:, int(LENGTH * 0.75) :] = True

    def step(rows: Any) -> float:
        loss = text_loss(base.model, rows.flatten(), [LENGTH] * ROWS, trained.flatten()) / trained.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    base.model.train()
    with fast(base.model, keep=keep) as how:
        if int8:
            with recording_int8(how):
                text_loss(base.model, ids[0].flatten(), [LENGTH] * ROWS, trained.flatten())
        return timed_steps(ids, step) | {"how": how.summary(), "notes": base.notes}


def side_peft(work: Path, mode: str) -> dict[str, Any]:
    """Measure PEFT and transformers with a hand-written training loop.

    mode: fp32, bf16, fp32-autocast, bf16-checkpointing, fp32-compiled, bf16-compiled or nf4"""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base_path, ids = workload(work)
    dtype = torch.float32 if mode.startswith("fp32") else torch.bfloat16
    options: dict[str, Any] = {}
    if mode == "nf4":
        options["device_map"] = {"": "cpu"}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(base_path, dtype=dtype, attn_implementation="sdpa", **options)
    model = PeftModel.from_pretrained(model, str(work / "start"), is_trainable=True)
    if mode.endswith("checkpointing"):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    model.train()
    if mode.endswith("compiled"):
        model.compile()

    def step(rows: Any) -> float:
        labels = rows.clone()
        labels[:, : int(LENGTH * 0.75)] = -100
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "fp32-autocast"):
            loss = model(input_ids=rows, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return timed_steps(ids, step)


def side_trl(work: Path) -> dict[str, Any]:
    """Measure TRL's SFTTrainer with its defaults, except for the training recipe."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    base_path, ids = workload(work)
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    cut = int(LENGTH * 0.75)
    rows = [
        {"input_ids": r.tolist(), "completion_mask": [0] * cut + [1] * (LENGTH - cut)} for step in ids for r in step
    ]
    seconds: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

        def on_log(self, _args: Any, _state: Any, _control: Any, logs: Any = None, **__: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.bfloat16),
        args=SFTConfig(
            tempfile.mkdtemp(dir=work),
            max_steps=len(ids),
            per_device_train_batch_size=ROWS,
            max_length=LENGTH,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            learning_rate=RATE,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS),
        callbacks=[Clock()],
    )
    trainer.train()
    rate = ROWS * LENGTH / statistics.median(seconds[1:])
    return {"tokens_per_second": rate, "seconds": seconds, "losses": losses, "peak_bytes": peak_bytes()}


def side_floor(work: Path) -> dict[str, Any]:
    """Measure the rate of products of the model's shapes, forward and backward, in the fastest dtype.

    As in the model, each layer has its own weights."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(workload(work)[0])
    hidden, mlp = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    tokens, count = ROWS * LENGTH, config.num_hidden_layers
    shapes = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(mlp, hidden)] * 2 + [(hidden, mlp)]

    def prepare(dtype: Any) -> list[Callable[[], Any]]:
        inputs = {n: torch.randn(tokens, n).to(dtype) for n in (hidden, mlp, kv)}
        weights = [torch.randn(o, i).to(dtype) for o, i in count * shapes]
        both = (
            (partial(torch.matmul, inputs[W.shape[1]], W.t()), partial(torch.matmul, inputs[W.shape[0]], W))
            for W in weights
        )
        return [product for pair in both for product in pair]

    dtype, seconds = fastest(prepare, rounds=3)
    body, head = count * sum(o * i for o, i in shapes), config.vocab_size * hidden
    rate = 4 * body * tokens / statistics.median(seconds)
    return {
        "dtype": dtype,
        "gflops": rate / 1e9,
        "floor_all": rate / (4 * (body + head)),
        "floor_trained_head": rate / (4 * (body + head / 4)),
    }


SIDES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "floor": side_floor,
    "veneer": side_veneer,
    "veneer, int8 products": lambda work: side_veneer(work, int8=True),
    "veneer, torch's operations": side_veneer,
    "peft float32": lambda work: side_peft(work, "fp32"),
    "peft bf16": lambda work: side_peft(work, "bf16"),
    "peft fp32 under bf16 autocast": lambda work: side_peft(work, "fp32-autocast"),
    "peft float32, compiled": lambda work: side_peft(work, "fp32-compiled"),
    "peft bf16, compiled": lambda work: side_peft(work, "bf16-compiled"),
    "peft bf16, checkpointing": lambda work: side_peft(work, "bf16-checkpointing"),
    "trl as it comes": side_trl,
}


def run(name: str, work: Path, *arguments: Any, at: int = 0) -> dict[str, Any]:
    """Run a side. arguments: what else determines its result, for the record."""
    env = {"VENEER_NATIVE": "0"} if name == "veneer, torch's operations" else {}
    if "compiled" in name:
        env["TORCHINDUCTOR_CACHE_DIR"] = str(work / "compiled")  # otherwise, only the machine's first run would compile
    return run_side(__file__, name, *arguments, work=work, at=at, **env)


def speed(quick: bool, rounds: int) -> dict[str, Any]:
    names = [n for n in SIDES if not (quick and ("checkpointing" in n or "trl" in n or "compiled" in n))]
    if importlib.util.find_spec("trl") is None:
        say("trl is not installed: pip install -e '.[peers]'")
        names = [n for n in names if "trl" not in n]
    names = without_slow_dtypes(names)
    rounds, steps = (1, 4) if quick else (rounds, 8)
    results: dict[str, list[dict[str, Any]]] = {n: [] for n in names}

    def middle(name: str, key: str) -> float:
        return statistics.median(r[key] for r in results[name])

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_workload(work, steps)
        for at in range(rounds):
            for name in names:
                results[name].append(run(name, work, steps, at=at))
        if quick:
            eager = [n for n in ("peft float32", "peft bf16") if n in names]
            name = max(eager, key=lambda n: middle(n, "tokens_per_second")) + ", compiled"
            names.append(name)
            results[name] = [run(name, work, steps)]

    timed = [n for n in names if n != "floor"]
    rows = [row(n, "tokens_per_second", middle(n, "tokens_per_second"), "tokens/s") for n in timed]
    rows += [row(n, "peak_memory", middle(n, "peak_bytes") / 1e9, "GB") for n in timed]
    rows += [
        row("floor, head at every position", "tokens_per_second", middle("floor", "floor_all"), "tokens/s"),
        row("floor, head at trained ones", "tokens_per_second", middle("floor", "floor_trained_head"), "tokens/s"),
        row(f"floor, {results['floor'][0]['dtype']}", "products", middle("floor", "gflops"), "GFLOP/s"),
    ]
    compiled = [n for n in timed if n.endswith("compiled")]
    rows += [row(n, "compiling", results[n][0]["first_step_more_seconds"], "s") for n in compiled]
    curves = {n: results[n][0]["losses"] for n in timed}
    rows += [row(n, f"loss at step {i + 1}", loss, "nats") for n in timed for i, loss in enumerate(curves[n])]

    eager = [n for n in timed if n.startswith("peft") and n not in compiled]
    best, best_compiled = (max(of, key=lambda n: middle(n, "tokens_per_second")) for of in (eager, compiled))
    mine = middle("veneer", "tokens_per_second")
    bars = [
        bar(f"tokens/s over the best PEFT ({best})", 3.0, mine / middle(best, "tokens_per_second")),
        bar(f"its peak memory over {best}'s", 0.5, middle("veneer", "peak_bytes") / middle(best, "peak_bytes"), False),
        bar(f"tokens/s over {best_compiled}", 1.15, mine / middle(best_compiled, "tokens_per_second")),
        bar("share of the floor, head at every position", 0.7, mine / middle("floor", "floor_all")),
        bar("share of the floor, head at trained ones", 0.7, mine / middle("floor", "floor_trained_head")),
    ]
    if "trl as it comes" in timed:
        bars.append(bar("tokens/s over TRL as it comes", 3.0, mine / middle("trl as it comes", "tokens_per_second")))
    if "peft bf16" in timed:
        # For comparison: these two PEFT runs (bf16 base; fp32 base under autocast) differ only by rounding.
        apart, spread = (
            max(abs(a - b) for a, b in zip(curves[n], curves["peft bf16"], strict=False))  # a slow side does less
            for n in ("veneer", "peft fp32 under bf16 autocast")
        )
        bars.append(bar(f"furthest loss from PEFT bf16's (PEFT's own two modes: {spread:.4f})", 0.02, apart, False))
    return report(rows, bars, {"how": results["veneer"][0]["how"], "rounds": rounds, "steps": steps})


def kinds(rounds: int) -> dict[str, Any]:
    """Measure training with each kind of adapter in KINDS, with veneer and with PEFT."""
    rows, bars = [], []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            write_workload(Path(folder), 6, kind)
            found: dict[str, list[dict[str, Any]]] = {"veneer": [], "peft bf16": []}
            for at in range(rounds):
                for name, sides in found.items():
                    sides.append(run(name, Path(folder), kind, at=at))
        speeds = {n: statistics.median(r["tokens_per_second"] for r in sides) for n, sides in found.items()}
        for n, sides in found.items():
            peak = statistics.median(r["peak_bytes"] for r in sides)
            rows.append(row(f"{kind}: {n}", "tokens_per_second", speeds[n], "tokens/s"))
            rows.append(row(f"{kind}: {n}", "peak_memory", peak / 1e9, "GB"))
        bars.append(bar(f"{kind}: tokens/s over PEFT's", 1.5, speeds["veneer"] / speeds["peft bf16"]))
    return report(rows, bars, {"rounds": rounds})


# -- banking77 ---------------------------------------------------------------------------------------------------------


def banking_rows(folder: Path, name: str, count: int) -> list[list[dict[str, str]]]:
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["messages"] for line in lines]


def banking_veneer(folder: Path, seed: int, train_rows: int, test_rows: int, compute: str = "auto") -> dict[str, Any]:
    import veneer

    with tempfile.TemporaryDirectory() as scratch:
        for name, count in (("train", train_rows), ("test", test_rows)):
            text = "".join(json.dumps({"messages": m}) + "\n" for m in banking_rows(folder, name, count))
            (Path(scratch) / f"{name}.jsonl").write_text(text, encoding="utf-8")
        base = veneer.load_base("smollm2-135m", dtype="bfloat16", device="cpu")
        config = {
            "base": {"name": "smollm2-135m", "compute": compute},
            "seed": seed,
            "output": str(Path(scratch) / "run"),
            "adapter": {"rank": RANK, "alpha": ALPHA, "targets": LINEARS},
            "data": {"train": str(Path(scratch) / "train.jsonl"), "split": 0},
            "batching": {"rows": 16},
            "optimizer": {"learning_rate": 5e-4},
            "schedule": {"name": "linear", "epochs": 2, "warmup": 20},
        }
        start = time.perf_counter()
        run = veneer.train_text(config, base=base, on_event=lambda _: None)
        seconds = time.perf_counter() - start
        peak = peak_bytes()
        test = str(Path(scratch) / "test.jsonl")
        scores = veneer.evaluate(base, test, {"adapter": [run.adapter]}, max_new_tokens=14, batch_size=50)["adapter"]
        return {
            "exact_match": scores.exact_match,
            "whole_call_seconds": seconds,
            "train_seconds": run.tokens / run.tokens_per_second,
            "tokens": run.tokens,
            "peak_bytes": peak,
        }


def banking_peft(folder: Path, seed: int, train_rows: int, test_rows: int) -> dict[str, Any]:
    """Train the same recipe with PEFT and transformers in a hand-tuned loop that pads to the longest row."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import veneer

    path = str(veneer.load_base("smollm2-135m").directory)
    torch.manual_seed(seed)
    tok = AutoTokenizer.from_pretrained(path)

    def encode(messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        prompt = tok.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        whole = tok(prompt + messages[-1]["content"] + "<|im_end|>", add_special_tokens=False).input_ids
        given = len(tok(prompt, add_special_tokens=False).input_ids)
        return whole, [-100] * given + whole[given:]

    data = [encode(m) for m in banking_rows(folder, "train", train_rows)]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEARS))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, weight_decay=0.0)
    epochs, rows = 2, 16
    steps = epochs * (len(data) // rows)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / 20) * (1 - s / steps))
    tokens, start = 0, time.perf_counter()
    for epoch in range(epochs):
        order = list(range(len(data)))
        random.Random(seed * 1000 + epoch).shuffle(order)
        for i in range(0, len(order) - rows + 1, rows):
            batch = [data[j] for j in order[i : i + rows]]
            longest = max(len(x) for x, _ in batch)
            ids = torch.tensor([x + [2] * (longest - len(x)) for x, _ in batch])
            labels = torch.tensor([y + [-100] * (longest - len(y)) for _, y in batch])
            mask = torch.tensor([[1] * len(x) + [0] * (longest - len(x)) for x, _ in batch])
            model(input_ids=ids, labels=labels, attention_mask=mask).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            tokens += sum(len(x) for x, _ in batch)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    model.eval()
    tok.padding_side, tok.pad_token_id = "left", 2
    right, test = 0, banking_rows(folder, "test", test_rows)
    with torch.inference_mode():
        for i in range(0, len(test), 50):
            part = test[i : i + 50]
            prompts = [tok.apply_chat_template(m[:-1], add_generation_prompt=True, tokenize=False) for m in part]
            given = tok(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            out = model.generate(**given, max_new_tokens=14, do_sample=False, pad_token_id=2)
            answers = tok.batch_decode(out[:, given.input_ids.shape[1] :], skip_special_tokens=True)
            right += sum(a.strip() == m[-1]["content"] for a, m in zip(answers, part, strict=True))
    return {"exact_match": right / len(test), "train_seconds": seconds, "tokens": tokens, "peak_bytes": peak}


BANKING: dict[str, Callable[..., dict[str, Any]]] = {
    "banking77 veneer": banking_veneer,
    "banking77 veneer int8": partial(banking_veneer, compute="int8"),
    "banking77 peft": banking_peft,
}


def banking(
    folder: Path, seeds: list[int], int8_seeds: list[int], peer_seeds: list[int], quick: bool
) -> dict[str, Any]:
    if not (folder / "train.jsonl").exists():
        raise SystemExit(f"no train.jsonl in {folder}: this benchmark needs the banking77 rows")
    train_rows, test_rows = (320, 50) if quick else (5000, 500)
    results: dict[str, list[dict[str, Any]]] = {"veneer": [], "veneer int8": [], "peft": []}
    order = [(side, s) for side, of in zip(results, (seeds, int8_seeds, peer_seeds), strict=True) for s in of]
    for side, seed in sorted(order, key=lambda pair: (pair[1], pair[0])):
        found = run_side(__file__, f"banking77 {side}", seed, train_rows, test_rows, work=folder)
        results[side].append(found | {"seed": seed})
    rows = []
    for side, runs in results.items():
        for found in runs:
            name = f"{side}, seed {found['seed']}"
            rows += [
                row(name, "exact_match", 100 * found["exact_match"], "%"),
                row(name, "train_time", found["train_seconds"], "s"),
                row(name, "peak_memory", found["peak_bytes"] / 1e9, "GB"),
            ]
    bars = []

    def mean(side: str, key: str) -> float:
        return statistics.mean(r[key] for r in results[side])

    if results["veneer"] and results["veneer int8"]:
        lost = 100 * (mean("veneer", "exact_match") - mean("veneer int8", "exact_match"))
        bars.append(bar("points that int8 products lose", 0.5, lost, False))
    if results["veneer"] and results["peft"]:
        bars += [
            bar("points below PEFT", 1.0, 100 * (mean("peft", "exact_match") - mean("veneer", "exact_match")), False),
            bar(
                "train time over PEFT's", 1 / 3, mean("veneer", "train_seconds") / mean("peft", "train_seconds"), False
            ),
            bar("peak memory over PEFT's", 0.5, mean("veneer", "peak_bytes") / mean("peft", "peak_bytes"), False),
        ]
    return report(rows, bars, {"train_rows": train_rows, "test_rows": test_rows})


def main() -> None:
    parser = options(__doc__, "three steps in one round, fewer sides")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs; medians are reported")
    parser.add_argument("--kinds", action="store_true", help="dropout and DoRA beside plain adapters instead")
    parser.add_argument(
        "--real", action="store_true", help="loss and gradients of real bases against their own forward"
    )
    parser.add_argument("--banking77", type=Path, metavar="DIR", help="accuracy, time and memory on these rows instead")
    parser.add_argument("--seeds", default="0,1,2", help="veneer's seeds on banking77")
    parser.add_argument("--int8-seeds", default="0,1,2", help="seeds of veneer with base.compute: int8")
    parser.add_argument("--peer-seeds", default="0", help="PEFT's; each takes about half an hour on two cores")
    args = parsed(parser)
    if args.side:
        side, work, *rest = args.side
        print(json.dumps(BANKING[side](Path(work), *rest) if side in BANKING else SIDES[side](Path(work))))
        return
    if args.banking77:
        given = (args.seeds, args.int8_seeds, args.peer_seeds)
        seeds, eights, peers = ([int(s) for s in text.split(",") if s] for text in given)
        result = banking(args.banking77, seeds, eights, peers, args.quick)
    elif args.real:
        result = real(say)
    elif args.kinds:
        result = kinds(args.rounds)
    else:
        result = speed(args.quick, args.rounds)
    print_report(result, args.json)


if __name__ == "__main__":
    main()
