"""Predictions of `veneer plan` compared with real runs: peak memory and seconds per step, for a grid of runs.

    python benchmarks/plan.py [--quick] [--json] [--only PART] [--memory]

Each run is a process; runs are executed one after another. A run has random weights of a real architecture
and takes real training steps with AdamW on the fast paths. The benchmark measures the process's peak resident
memory and the shortest step after the first. With `--memory`, which is meant for a busy machine, only memory
has targets.

The text bases are Llamas of several widths and depths, and SmolLM2-135M's shape. In the names of runs,
`about` precedes a mean length: rows have different lengths, which change in each of sixteen steps. The image
bases are catalogue-sdxl and catalogue-flux, at several batch and image sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _report import bar, lines_of, peak_bytes, report, row

ROOT = Path(__file__).resolve().parents[1]
MEMORY, TIME = 0.10, 0.70
SCALE = 8
"""Width in pixels of one latent position, for the VAE of both catalogue bases."""

WIDTHS = {
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                     "num_key_value_heads": 3, "vocab_size": 49152},
    "llama-12m": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "vocab_size": 8192},
    "llama-50m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "num_attention_heads": 8,
                  "num_key_value_heads": 4, "vocab_size": 32000},
    "llama-110m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
                   "num_key_value_heads": 12, "vocab_size": 32000},
    "llama-100m": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "num_attention_heads": 16,
                   "num_key_value_heads": 4, "vocab_size": 32000},
}  # fmt: skip


def text(base: str, rows: int, length: int, rank: int = 16, trained: float = 0.25, **more: Any) -> dict[str, Any]:
    """Return the settings of a text run. `more`: dtype, checkpointing, quantize, dora, dropout, init, unlike.

    `unlike`: rows have different lengths around the mean `length`, and new ones in each step."""
    return {"kind": "text", "base": base, "rows": rows, "length": length, "rank": rank, "trained": trained, **more}


def image(base: str, pictures: int, size: int, rank: int = 16, **more: Any) -> dict[str, Any]:
    return {"kind": "image", "base": base, "pictures": pictures, "size": size, "rank": rank, **more}


GRID: list[dict[str, Any]] = [
    text("smollm2-135m", 4, 512), text("smollm2-135m", 4, 512, checkpointing=True), text("smollm2-135m", 4, 128, 64),
    text("smollm2-135m", 1, 2048, 4), text("smollm2-135m", 2, 256, 32, 1.0), text("smollm2-135m", 8, 128, 8),
    text("smollm2-135m", 2, 512, dtype="float32"), text("smollm2-135m", 1, 2048, 16, checkpointing=True),
    text("llama-12m", 8, 512, 8), text("llama-12m", 16, 128, 16), text("llama-12m", 2, 2048, 16, 1.0),
    text("llama-50m", 4, 512), text("llama-50m", 2, 512, dtype="float32"), text("llama-50m", 8, 256, 64),
    text("llama-50m", 4, 1024, 16, checkpointing=True), text("llama-110m", 2, 512, 16, 1.0),
    text("llama-110m", 1, 1024, 64), text("llama-110m", 4, 256, 4), text("llama-110m", 4, 256, 16, dtype="float32"),
    text("llama-100m", 4, 256), text("llama-100m", 2, 1024, 32, checkpointing=True),
    text("llama-100m", 2, 512, 16, 1.0, dtype="float32"), text("llama-100m", 1, 2048, 16),
    text("smollm2-135m", 4, 512, quantize="nf4"), text("smollm2-135m", 1, 2048, 8, quantize="nf4"),
    text("smollm2-135m", 4, 256, 16, checkpointing=True, quantize="nf4"),
    text("llama-110m", 2, 512, 16, 1.0, quantize="nf4"), text("llama-100m", 2, 1024, 32, quantize="nf4"),
    text("llama-100m", 4, 256, 16, quantize="int8"),
    text("smollm2-135m", 4, 512, dropout=0.05), text("smollm2-135m", 4, 512, dora=True),
    text("llama-100m", 2, 1024, 32, dora=True), text("llama-110m", 2, 512, 16, 1.0, quantize="nf4", dora=True),
    text("smollm2-135m", 4, 256, dora=True, dropout=0.05), text("llama-50m", 4, 512, dora=True, dropout=0.05),
    text("llama-50m", 4, 512, 64, init="pissa"),
    text("smollm2-135m", 6, 100, unlike=True), text("smollm2-135m", 6, 100, dtype="float32", unlike=True),
    text("llama-50m", 8, 200, unlike=True), text("llama-50m", 8, 200, dtype="float32", unlike=True),
    image("catalogue-sdxl", 32, 128), image("catalogue-sdxl", 16, 256), image("catalogue-sdxl", 64, 256),
    image("catalogue-flux", 32, 128), image("catalogue-flux", 16, 256), image("catalogue-flux", 64, 256),
    image("catalogue-flux", 32, 256, 64, checkpointing=True),
]  # fmt: skip


def name_of(run: dict[str, Any]) -> str:
    if run["kind"] == "image":
        shape = f"{run['pictures']} × {run['size']} px"
    else:
        about = "about " if run.get("unlike") else ""
        shape = f"{run['rows']} × {about}{run['length']}, {run['trained']:.0%} learned"
    more = [run.get(key) for key in ("quantize", "dtype", "init")]
    more += [key for key in ("checkpointing", "dora", "dropout") if run.get(key)]
    return ", ".join([run["base"], shape, f"rank {run['rank']}", *(m for m in more if m)])


def lengths_of(run: dict[str, Any], step: int = 0) -> list[int]:
    """Return the number of tokens in each row.

    Different lengths come in pairs with the same sum, and are furthest apart in the first step."""
    rows, length = run["rows"], run["length"]
    if not run.get("unlike"):
        return [length] * rows
    dice = random.Random(step)
    apart = [length // 2 if step == 0 else dice.randint(0, length // 2) for _ in range(rows // 2)]
    return [length + sign * d for d in apart for sign in (-1, 1)]


def spec_of(run: dict[str, Any]) -> Any:
    from veneer.core.adapter import LoraSpec

    return LoraSpec(**{key: run[key] for key in ("rank", "dora", "dropout", "init") if key in run})


# -- a run, in its own process -----------------------------------------------------------------------------------------


def measure(run: dict[str, Any]) -> dict[str, Any]:
    return (_text if run["kind"] == "text" else _image)(run)


def _text(run: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import veneer
    from veneer.models.text.fast import fast
    from veneer.models.text.loss import text_loss

    config = LlamaConfig(**WIDTHS[run["base"]], tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    dtype = getattr(torch, run.get("dtype", "bfloat16"))
    if "quantize" in run:
        model: Any = _quantized(config, run["quantize"])
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    attachment = veneer.attach(model)
    attachment.add("a", veneer.create(model, spec_of(run), seed=0), trainable=True)
    attachment.use("a")
    model.train()
    if run.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    steps = iter(range(1_000))

    def loss() -> Any:
        lengths = lengths_of(run, next(steps))
        trained = torch.cat([torch.arange(n) >= max(1, n - max(1, round(run["trained"] * n))) for n in lengths])
        ids = torch.randint(3, config.vocab_size, (sum(lengths),))
        return text_loss(model, ids, lengths, trained) / trained.sum()

    with fast(model):
        return _steps(attachment, loss, 16 if run.get("unlike") else 4)


def _quantized(config: Any, kind: str) -> Any:
    """Load a quantized model from a checkpoint written by another process.

    So this process's peak memory does not include the full weights."""
    import torch

    from veneer.files.weights import tensor_table
    from veneer.models.quantize import load_quantized

    folder = Path("base").absolute()
    config.save_pretrained(folder)
    code = (
        "import sys, torch; from transformers import AutoConfig, AutoModelForCausalLM as M; "
        "M.from_config(AutoConfig.from_pretrained(sys.argv[1]), dtype=torch.bfloat16).save_pretrained(sys.argv[1])"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(folder)], check=True, capture_output=True)
    model, _ = load_quantized(folder, config, tensor_table(folder), kind, torch.bfloat16)
    return model.eval().requires_grad_(False)


def _image(run: dict[str, Any]) -> dict[str, Any]:
    import torch
    from _image_bases import ATTENTION, SHAPES, TEXT_TOKENS, adapter_tensors, as_adapter, denoiser, is_flux, predict

    import veneer
    from veneer.models.image.fast import fast_denoiser

    name, n = run["base"], run["pictures"]
    model = denoiser(name).bfloat16().train()
    attachment = veneer.attach(model)
    targets = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    attachment.add("a", as_adapter(adapter_tensors(name, 0, run["rank"], targets)), trainable=True)
    attachment.use("a")
    if run.get("checkpointing"):
        model.enable_gradient_checkpointing()
    shape = SHAPES[name]
    if is_flux(name):
        side = run["size"] // (2 * SCALE)
        ids = torch.zeros(side, side, 3)
        ids[..., 1], ids[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
        x = torch.randn(n, side * side, model.config.in_channels).bfloat16()
        given = {
            "encoder_hidden_states": torch.randn(n, TEXT_TOKENS, shape["joint"]).bfloat16(),
            "pooled_projections": torch.randn(n, shape["pooled"]).bfloat16(),
            "img_ids": ids.view(-1, 3).bfloat16(),
            "txt_ids": torch.zeros(TEXT_TOKENS, 3).bfloat16(),
            "guidance": torch.ones(n).bfloat16(),
        }
    else:
        x = torch.randn(n, model.config.in_channels, run["size"] // SCALE, run["size"] // SCALE).bfloat16()
        cond = {"text_embeds": torch.randn(n, shape["pooled"]).bfloat16(), "time_ids": torch.zeros(n, 6).bfloat16()}
        given = {
            "encoder_hidden_states": torch.randn(n, TEXT_TOKENS, shape["cross"]).bfloat16(),
            "added_cond_kwargs": cond,
        }

    def loss() -> Any:
        out = predict(name, model, given, x, torch.rand(n))
        return (out.float() - torch.randn_like(out, dtype=torch.float32)).square().mean()

    with fast_denoiser(model):
        return _steps(attachment, loss)


def _steps(attachment: Any, loss: Callable[[], Any], count: int = 4) -> dict[str, Any]:
    import torch

    parameters = list(attachment.parameters("a").values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return {"peak": peak_bytes(), "seconds": min(seconds[1:])}


def in_process(argument: list[str]) -> dict[str, Any]:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        ran = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, *argument], env=env, capture_output=True, text=True, cwd=scratch
        )
    if ran.returncode != 0:
        raise SystemExit(f"{argument} failed:\n{ran.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(ran.stdout.strip().splitlines()[-1])
    return found


# -- prediction --------------------------------------------------------------------------------------------------------


def predicted(run: dict[str, Any]) -> tuple[int, float]:
    """Return the predicted (peak bytes, seconds per step)."""
    from veneer.plan.image import ImageLoad, image_counts
    from veneer.plan.memory import Load, run_memory, text_counts
    from veneer.plan.shape import text_shape
    from veneer.plan.tables import cpu_device
    from veneer.plan.time import rates_of, run_work

    device = cpu_device()
    load: Any
    if run["kind"] == "image":
        part = "transformer" if run["base"] == "catalogue-flux" else "unet"
        file = ROOT / "src" / "veneer_bases" / run["base"] / part / "config.json"
        config = {**json.loads(file.read_text(encoding="utf-8")), "vae_scale": SCALE}
        checkpointing = run.get("checkpointing", False)
        size = run["size"], run["size"]
        load = ImageLoad(run["pictures"], *size, rank=run["rank"], text_tokens=32, checkpointing=checkpointing)
        counts = image_counts(config, load)
    else:
        load = Load(
            tuple(lengths_of(run)),
            run["trained"],
            rank=run["rank"],
            dtype=run.get("dtype", "bfloat16"),
            quantize=run.get("quantize"),
            checkpointing=run.get("checkpointing", False),
            spec=spec_of(run),
        )
        shape = text_shape({"model_type": "llama", "tie_word_embeddings": True, **WIDTHS[run["base"]]})
        counts = text_counts(shape, load, device)
    seconds = rates_of(device, load.dtype, counts.kind).seconds(run_work(counts, load))
    return run_memory(counts, load, device).peak, seconds


def compare(runs: list[dict[str, Any]], say: Callable[[str], None], memory_alone: bool) -> dict[str, Any]:
    rows, worst = [], {"peak": 0.0, "time": 0.0}
    inside = {"peak": 0, "time": 0}
    for run in runs:
        name = name_of(run)
        found = in_process(["--run", json.dumps(run)])
        peak, seconds = predicted(run)
        off = {"peak": peak / found["peak"] - 1, "time": seconds / found["seconds"] - 1}
        rows += [
            row(name, "peak, predicted", peak / 1e9, "GB"),
            row(name, "peak, measured", found["peak"] / 1e9, "GB"),
            row(name, "peak, off by", 100 * off["peak"], "%"),
            row(name, "step, predicted", seconds, "s"),
            row(name, "step, measured", found["seconds"], "s"),
            row(name, "step, off by", 100 * off["time"], "%"),
        ]
        worst = {k: max(worst[k], abs(v)) for k, v in off.items()}
        inside = {k: inside[k] + (abs(off[k]) <= limit) for k, limit in (("peak", MEMORY), ("time", TIME))}
        say(
            f"{name}: {peak / 1e9:.2f} GB, {found['peak'] / 1e9:.2f} measured ({off['peak']:+.1%}); "
            f"{seconds:.2f} s, {found['seconds']:.2f} measured ({off['time']:+.0%})"
        )
    count = len(runs)
    bars = [bar(f"runs of {count} whose peak is within {MEMORY:.0%}", count, inside["peak"])]
    bars.append(bar("furthest peak", MEMORY, worst["peak"], False))
    if not memory_alone:
        bars.append(bar(f"runs of {count} whose step is within {TIME:.0%}", count, inside["time"]))
        bars.append(bar("furthest step", TIME, worst["time"], False))
    return report(rows, bars, {"runs": count})


def table(result: dict[str, Any]) -> Iterator[str]:
    """Yield the grid as a Markdown table, one line per run, for docs/reference/plan-accuracy.md."""
    by_name: dict[str, dict[str, float]] = {}
    for r in result["rows"]:
        by_name.setdefault(r["name"], {})[r["metric"]] = r["value"]
    yield "| run | peak, predicted | measured | off | step, predicted | measured | off |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name, m in by_name.items():
        yield (
            f"| {name} | {m['peak, predicted']:.2f} GB | {m['peak, measured']:.2f} GB | {m['peak, off by']:+.1f}% "
            f"| {m['step, predicted']:.2f} s | {m['step, measured']:.2f} s | {m['step, off by']:+.0f}% |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every sixth run")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--markdown", action="store_true", help="the grid as a table for the documentation")
    parser.add_argument("--memory", action="store_true", help="judge memory alone")
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    if given.run:
        print(json.dumps(measure(json.loads(given.run))))
        return
    runs = [run for run in GRID if given.only in name_of(run)]
    result = compare(
        runs[::6] if given.quick else runs, lambda line: print(line, file=sys.stderr, flush=True), given.memory
    )
    if given.json:
        print(json.dumps(result))
    else:
        print("\n".join(table(result) if given.markdown else lines_of(result)))


if __name__ == "__main__":
    main()
