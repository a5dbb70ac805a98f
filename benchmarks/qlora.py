"""QLoRA: training on a 4-bit base, veneer against bitsandbytes with PEFT, in one run.

    python benchmarks/qlora.py [--quick] [--rounds 3] [--json]       speed and memory on SmolLM2-135M, loss curves
    python benchmarks/qlora.py --large [SIZE ...] [--json]           random Llamas of up to 7B: memory peaks by part
    python benchmarks/qlora.py --quality [--quick] [--json]          perplexity of nf4, fp4, int8 (QLoRA's table 2)
    python benchmarks/qlora.py --banking77 DIR [--seeds 0] [--json]  adapters trained on nf4 and on bf16

Each side is a process; sides run one after another. For speed: rank 16 on all seven projections, steps of 4
rows of 512 random tokens, loss on the last quarter of each row, AdamW, the same initial adapter for every
side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _large import LARGE, write_large
from _report import bar, lines_of, peak_bytes, report, row
from text_training import ALPHA, LINEARS, RANK, RATE, banking_rows, side_peft, side_veneer, write_workload

ROOT = Path(__file__).resolve().parents[1]


# -- speed -------------------------------------------------------------------------------------------------------------


SPEED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "veneer nf4": lambda work: side_veneer(work, "nf4"),
    "bitsandbytes nf4 + peft": lambda work: side_peft(work, "nf4"),
    "veneer nf4, all kept dequantized": lambda work: side_veneer(work, "nf4", 1 << 40),
    "veneer int8": lambda work: side_veneer(work, "int8"),
    "veneer bf16": lambda work: side_veneer(work, None),
    "peft bf16": lambda work: side_peft(work, "bf16"),
}


def speed(quick: bool, rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    names = list(SPEED)[:2] if quick else list(SPEED)
    rounds, steps = (1, 3) if quick else (rounds, 6)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_workload(work, steps)
        for at in range(rounds):
            for name in names:
                results[name].append(_side("speed", name, work))
                said = {k: round(v, 1) for k, v in results[name][-1].items() if isinstance(v, float)}
                say(f"round {at + 1}: {name}: {said}")

    def middle(name: str, key: str) -> float:
        return statistics.median(r[key] for r in results[name])

    rows = [row(n, "tokens_per_second", middle(n, "tokens_per_second"), "tokens/s") for n in names]
    rows += [row(n, "peak_memory", middle(n, "peak_bytes") / 1e9, "GB") for n in names]
    rows += [
        row(n, f"loss at step {i + 1}", loss, "nats") for n in names for i, loss in enumerate(results[n][0]["losses"])
    ]
    mine, peer = "veneer nf4", "bitsandbytes nf4 + peft"
    apart = max(abs(a - b) for a, b in zip(results[mine][0]["losses"], results[peer][0]["losses"], strict=False))
    bars = [
        bar(f"tokens/s over {peer}", 3.0, middle(mine, "tokens_per_second") / middle(peer, "tokens_per_second")),
        bar(f"peak memory over {peer}'s", 0.5, middle(mine, "peak_bytes") / middle(peer, "peak_bytes"), False),
        bar("furthest loss from bitsandbytes'", 0.02, apart, False),
    ]
    about = {"how": results[mine][0]["how"], "base": results[mine][0]["notes"][0], "rounds": rounds}
    return report(rows, bars, about)


# -- large bases -------------------------------------------------------------------------------------------------------

TOKENS = 512


def side_large(folder: Path, quantize: str, checkpointing: bool) -> dict[str, Any]:
    """Measure loading and one step of 512 tokens: the peak memory of both, and the size of each part."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import veneer
    from veneer.files.weights import tensor_table
    from veneer.models.quantize import load_quantized
    from veneer.models.text.fast import fast
    from veneer.models.text.loss import text_loss
    from veneer.ops.quantized import Quantized

    config = AutoConfig.from_pretrained(folder)
    before, start = peak_bytes(), time.perf_counter()
    if quantize:
        model, _ = load_quantized(folder, config, tensor_table(folder), quantize, torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.requires_grad_(False)
    loaded, seconds = peak_bytes(), time.perf_counter() - start
    weights = sum(p.bytes if isinstance(p, Quantized) else p.nbytes for p in model.parameters())
    codes = [p for p in model.parameters() if isinstance(p, Quantized)]
    attachment = veneer.attach(model)
    spec = veneer.LoraSpec(rank=RANK, alpha=ALPHA, targets="all-linear")
    attachment.add("a", veneer.create(model, spec, seed=0), trainable=True)
    attachment.use("a")
    parameters = list(attachment.parameters("a").values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    trained = torch.ones(TOKENS, dtype=torch.bool)
    trained[: TOKENS * 3 // 4] = False
    with fast(model):
        times = []
        for _ in range(2):
            start = time.perf_counter()
            nll = text_loss(model, ids, [TOKENS], trained) / trained.sum()
            nll.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - start)
            loss = float(nll.detach())
            del nll  # its graph keeps the fused weights alive
        peak = peak_bytes()
    adapter = sum(p.nbytes for p in parameters)
    return {
        "parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "weights_bytes": weights,
        "quantized": sum(p.numel() for p in codes),
        "bits": 8 * sum(p.bytes for p in codes) / max(1, sum(p.numel() for p in codes)),
        "adapter_bytes": adapter,
        "gradient_bytes": adapter,
        "optimizer_bytes": 2 * adapter,
        "before_bytes": before,
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "load_seconds": seconds,
        "step_seconds": times[-1],
        "loss": loss,
    }


def _parts(size: str, kind: str) -> Any:
    """Return the parts of memory that `veneer plan` predicts for this step."""
    from veneer.plan.memory import Load, text_memory
    from veneer.plan.shape import text_shape
    from veneer.plan.tables import Device

    load = Load(
        (TOKENS,),
        0.25,
        rank=RANK,
        dtype="bfloat16",
        quantize="nf4" if kind.startswith("nf4") else None,
        checkpointing=kind.endswith("checkpointing"),
    )
    shape = text_shape({"model_type": "llama", **LARGE[size]})
    return text_memory(shape, load, Device("cpu", "cpu", 0, 0.0, 0.0))


def large(sizes: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    rows, bars = [], []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            write_large(size, Path(name))
            found: dict[str, dict[str, Any]] = {}
            for kind, options in {
                "nf4": ("nf4", False),
                "bf16": ("", False),
                "nf4, checkpointing": ("nf4", True),
            }.items():
                found[kind] = _side("large", json.dumps(options), Path(name))
                say(f"{size} {kind}: {found[kind]}")
            shard = max(f.stat().st_size for f in Path(name).glob("*.safetensors"))
        for kind, got in found.items():
            label = f"{size} {kind}"
            rows += [
                row(label, metric, got[key] / 1e9, "GB")
                for metric, key in {
                    "weights": "weights_bytes",
                    "adapter": "adapter_bytes",
                    "gradients": "gradient_bytes",
                    "optimizer": "optimizer_bytes",
                    "peak after loading": "loaded_bytes",
                    "peak": "peak_bytes",
                }.items()
            ]
            parts = _parts(size, kind)
            rows += [row(label, f"part: {part}", value / 1e9, "GB") for part, value in parts.parts.items() if value]
            rows.append(row(label, "sum of the parts", parts.peak / 1e9, "GB"))
            rows.append(row(label, "a step", got["step_seconds"], "s"))
            off = abs(got["peak_bytes"] / parts.peak - 1)
            bars.append(bar(f"{label}: peak off the sum of its parts, as a plan counts them", 0.1, off, False))
        nf4, bf16 = found["nf4"], found["bf16"]
        rows.append(row(f"{size} nf4", "parameters", nf4["parameters"] / 1e9, "billions"))
        rows.append(row(f"{size} nf4", "bits a quantized parameter", nf4["bits"], "bits"))
        loading = nf4["loaded_bytes"] - nf4["before_bytes"] - nf4["weights_bytes"]
        bars += [
            bar(f"{size}: bits a quantized parameter", 4.128, nf4["bits"], False),
            bar(f"{size}: peak of loading beyond the weights, over the largest shard", 1.0, loading / shard, False),
            bar(f"{size}: peak over bf16 LoRA's", 1.0, nf4["peak_bytes"] / bf16["peak_bytes"], False),
            bar(f"{size}: step time over bf16's", 1.15, nf4["step_seconds"] / bf16["step_seconds"], False),
        ]
    return report(rows, bars, {"tokens": TOKENS, "rank": RANK})


# -- quality -----------------------------------------------------------------------------------------------------------


def held_out_text() -> str:
    """Return the text of this project's docs; SmolLM2 is older, so it was not trained on them."""
    files = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"])
    return "\n\n".join(f.read_text(encoding="utf-8") for f in files)


def side_quality(kind: str, tokens: int) -> dict[str, Any]:
    """Measure perplexity with the weights of `kind`, in float32 and in windows of 1,024 tokens."""
    import torch

    import veneer
    from veneer.models.quantize import quantized_weights
    from veneer.models.text.fast import fast
    from veneer.models.text.loss import text_loss
    from veneer.ops.quantized import quantize

    base = veneer.load_base("smollm2-135m", dtype="float32")
    for name in quantized_weights(base.model) if kind != "as stored" else ():
        weight = base.model.get_parameter(name)
        weight.data = quantize(weight.data, kind.split()[0], double=kind.endswith("dq")).dense().clone()
    ids = torch.tensor(base.tokenizer(held_out_text()).input_ids[:tokens])
    total, count = 0.0, 0
    with torch.no_grad(), fast(base.model):
        for part in ids.split(1024):
            trained = torch.ones(len(part), dtype=torch.bool)
            trained[0] = False
            total += float(text_loss(base.model, part, [len(part)], trained))
            count += len(part) - 1
    return {"nll": total / count, "tokens": count}


def quality(quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    import math

    kinds = ["as stored", "nf4 dq", "nf4", "fp4", "int8"]
    found = {}
    for kind in kinds:
        found[kind] = _side("quality", json.dumps([kind, 8192 if quick else 32768]), Path())
        say(f"{kind}: {found[kind]}")
    rows = [row(k, "perplexity", math.exp(f["nll"]), "") for k, f in found.items()]
    nll = {k: f["nll"] for k, f in found.items()}
    bars = [
        bar(
            "nats by which nf4 with double quantization is better than bitsandbytes' fp4",
            0.0,
            nll["fp4"] - nll["nf4 dq"],
        ),
        bar("nats that double quantization costs", 0.005, nll["nf4 dq"] - nll["nf4"], False),
    ]
    return report(rows, bars, {"tokens": found["nf4"]["tokens"]})


def side_banking(folder: Path, quantize: str | None, seed: int, train_rows: int, test_rows: int) -> dict[str, Any]:
    import veneer

    with tempfile.TemporaryDirectory() as scratch:
        for name, count in (("train", train_rows), ("test", test_rows)):
            text = "".join(json.dumps({"messages": m}) + "\n" for m in banking_rows(folder, name, count))
            (Path(scratch) / f"{name}.jsonl").write_text(text, encoding="utf-8")
        base = veneer.load_base("smollm2-135m", dtype="bfloat16", device="cpu", quantize=quantize)
        config = {
            "base": {"name": "smollm2-135m", "quantize": quantize},
            "seed": seed,
            "output": str(Path(scratch) / "run"),
            "adapter": {"rank": RANK, "alpha": ALPHA, "targets": LINEARS},
            "data": {"train": str(Path(scratch) / "train.jsonl"), "split": 0},
            "batching": {"rows": 16},
            "optimizer": {"learning_rate": 5e-4},
            "schedule": {"name": "linear", "epochs": 2, "warmup": 20},
        }
        run = veneer.train_text(config, base=base, on_event=lambda _: None)
        test = str(Path(scratch) / "test.jsonl")
        scores = veneer.evaluate(base, test, {"adapter": [run.adapter]}, max_new_tokens=14, batch_size=50)["adapter"]
        return {
            "exact_match": scores.exact_match,
            "seconds": run.tokens / run.tokens_per_second,
            "peak_bytes": run.peak_memory_bytes,
        }


def banking(folder: Path, seeds: list[int], quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    counts = (320, 50) if quick else (5000, 500)
    rows, exact = [], {}
    for seed in seeds:
        for kind in ("nf4", None):
            got = _side("banking", json.dumps([str(folder), kind, seed, *counts]), Path())
            label = f"{kind or 'bf16'}, seed {seed}"
            exact.setdefault(kind or "bf16", []).append(100 * got["exact_match"])
            rows += [
                row(label, "exact match", 100 * got["exact_match"], "%"),
                row(label, "training", got["seconds"], "s"),
                row(label, "peak memory", got["peak_bytes"] / 1e9, "GB"),
            ]
            say(f"{label}: {got}")
    gap = statistics.mean(exact["bf16"]) - statistics.mean(exact["nf4"])
    return report(rows, [bar("points below bf16", 1.0, gap, False)], {"rows": counts[0], "seeds": seeds})


# -- running -----------------------------------------------------------------------------------------------------------


def _run_side(part: str, name: str, work: Path) -> dict[str, Any]:
    if part == "speed":
        return SPEED[name](work)
    values = json.loads(name)
    if part == "large":
        return side_large(work, *values)
    if part == "quality":
        return side_quality(*values)
    return side_banking(Path(values[0]), *values[1:])


def _side(part: str, name: str, work: Path) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, "-W", "ignore", __file__, "--side", part, name, str(work)]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    if ran.returncode != 0:
        raise SystemExit(f"{part} {name} failed:\n{ran.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="QLoRA against its peers")
    parser.add_argument("--quick", action="store_true", help="fewer sides, steps and rows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", nargs="*", choices=list(LARGE), metavar="SIZE", help=f"all of {', '.join(LARGE)}")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--banking77", type=Path, metavar="DIR")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(_run_side(args.side[0], args.side[1], Path(args.side[2]))))
        return

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if args.large is not None:
        result = large(["1B"] if args.quick else args.large or list(LARGE), say)
    elif args.quality:
        result = quality(args.quick, say)
    elif args.banking77:
        result = banking(args.banking77, [int(s) for s in args.seeds.split(",")], args.quick, say)
    else:
        result = speed(args.quick, args.rounds, say)
    print(json.dumps(result) if args.json else "\n".join(lines_of(result)))


if __name__ == "__main__":
    main()
