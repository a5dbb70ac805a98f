"""Published memory figures, compared with `veneer plan` for a comparable veneer run.

    python benchmarks/plan_published.py [--markdown] [--json]

Nothing is trained: each row is arithmetic. If the source leaves something open, the row states an assumption.
A plan describes veneer's own training step. If a source keeps full logits, 16-bit adapters or 8-bit optimizer
states, its figure differs for this reason, and the row says so. "Agrees" means within 20%, or below a stated
limit.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from _report import bar, lines_of, report, row

from veneer.core.adapter import LoraSpec
from veneer.plan.image import ImageLoad, image_counts
from veneer.plan.memory import Load, run_memory, text_memory, weight_bytes
from veneer.plan.shape import text_shape
from veneer.plan.tables import base_config, device_named

GIB = (1 << 30) / 1e9
QV = ("q_proj", "v_proj")
CARD = device_named("a100-80gb")


@dataclass(frozen=True)
class Figure:
    """A published figure and the planned one, in GB (10^9 bytes).

    `limit`: whether the published figure is only the size of a memory in which the run fits."""

    source: str
    what: str
    published: float
    planned: float
    assumed: str
    remark: str = ""
    limit: bool = False

    @property
    def agrees(self) -> bool:
        return self.planned <= self.published if self.limit else abs(self.planned / self.published - 1) <= 0.2


def text(base: str, lengths: tuple[int, ...], rank: int, targets: Any = "all-linear", **more: Any) -> float:
    spec = None if targets == "all-linear" else LoraSpec(rank=rank, targets=targets)
    load = Load(lengths, rank=rank, spec=spec, **more)
    return text_memory(text_shape(base_config(base)), load, CARD).peak / 1e9


def weights(base: str) -> float:
    return sum(weight_bytes(text_shape(base_config(base)), "bfloat16", "nf4")) / 1e9


def image(base: str, height: int, width: int, rank: int, **more: Any) -> float:
    load = ImageLoad(1, height, width, rank=rank, **more)
    return run_memory(image_counts(base_config(base), load), load, CARD).peak / 1e9


def figures() -> list[Figure]:
    qlora, tune = "QLoRA (arXiv 2305.14314)", "torchtune README"
    again = {"checkpointing": True}
    nf4 = {"quantize": "nf4", **again}
    mlp = ("q_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    seventy, eight = "meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-8B"
    return [
        Figure(
            qlora,
            "65B fine-tuned on one card of 48 GiB",
            48 * GIB,
            text("huggyllama/llama-65b", (528,), 64, **nf4),
            "1 × 528 tokens, rank 64 on all linears, recomputing",
            limit=True,
        ),
        *(
            Figure(
                qlora,
                f"Guanaco {size}, 4-bit model",
                gb,
                weights(f"huggyllama/llama-{name}" if size != "7B" else "meta-llama/Llama-2-7b-hf"),
                "weights and constants alone",
                "the paper's table gives no account of its parts; 4.127 bits a parameter, which the same paper "
                "derives, come to less",
            )
            for size, name, gb in (("65B", "65b", 41), ("33B", "30b", 21), ("13B", "13b", 10), ("7B", "7b", 5))
        ),
        Figure(
            tune,
            "Llama 3.1 8B LoRA",
            16.2 * GIB,
            text(eight, (512, 512), 8, mlp, **again),
            "2 × 512 tokens, rank 8, recomputing",
            "its adapter and optimizer are bfloat16",
        ),
        Figure(
            tune,
            "Llama 3.1 8B QLoRA",
            7.4 * GIB,
            text(eight, (512, 512), 8, mlp, **nf4),
            "2 × 512 tokens, rank 8, recomputing",
        ),
        Figure(
            tune,
            "Llama 3.2 3B LoRA",
            8.5 * GIB,
            text("meta-llama/Llama-3.2-3B", (4096,), 8, mlp, **again),
            "4,096 packed tokens, rank 8, recomputing",
        ),
        Figure(
            tune,
            "Llama 3.2 3B QLoRA",
            4.6 * GIB,
            text("meta-llama/Llama-3.2-3B", (4096,), 8, mlp, **nf4),
            "4,096 packed tokens, rank 8, recomputing",
        ),
        Figure(
            "LitGPT",
            "Llama 2 7B LoRA, batch 1",
            21.3,
            text("meta-llama/Llama-2-7b-hf", (1024,), 8, QV),
            "1,024 tokens, rank 8 on q and v, all activations kept",
            "its longest row is not stated; it keeps float32 logits of every position and what each norm, "
            "rotation and activation function saves apart",
        ),
        Figure(
            "LitGPT",
            "the same, NF4",
            14.1,
            text("meta-llama/Llama-2-7b-hf", (1024,), 8, QV, quantize="nf4", double=False),
            "1,024 tokens, rank 8 on q and v, all activations kept",
            "as above",
        ),
        Figure(
            "LitGPT",
            "the same, NF4 and double quantization",
            13.8,
            text("meta-llama/Llama-2-7b-hf", (1024,), 8, QV, quantize="nf4"),
            "1,024 tokens, rank 8 on q and v, all activations kept",
            "as above",
        ),
        Figure(
            "PEFT's suite",
            "Llama 3.2 3B, rank 32, batch 4",
            22.3,
            text("meta-llama/Llama-3.2-3B", (768,) * 4, 32, QV),
            "4 × 768 tokens, rank 32 on q and v, activations kept",
            "whole logits there, in 16 and 32 bits: 4 · 768 · 128,256 · 6 bytes = 2.4 GB, and gradients",
        ),
        Figure(
            "LLaMA-Factory's table",
            "70B QLoRA, 4 bits",
            48,
            text(seventy, (1024,), 8, **nf4),
            "1,024 tokens, rank 8, recomputing",
            "an estimate there",
            limit=True,
        ),
        Figure(
            "LLaMA-Factory's table",
            "7B LoRA, 16 bits",
            16,
            text("mistralai/Mistral-7B-v0.3", (1024,), 8, **again),
            "1,024 tokens, rank 8, recomputing",
            "an estimate there",
        ),
        Figure(
            "LLaMA-Factory's table",
            "7B QLoRA, 4 bits",
            6,
            text("mistralai/Mistral-7B-v0.3", (1024,), 8, **nf4),
            "1,024 tokens, rank 8, recomputing",
            "an estimate there",
        ),
        Figure(
            "Hugging Face blog, FLUX QLoRA",
            "FLUX.1 NF4, 512 × 768, rank 4",
            9,
            image("flux.1-dev", 768, 512, 4, **nf4),
            "batch 1, recomputing",
        ),
        Figure(
            "Hugging Face blog, FLUX QLoRA",
            "FLUX.1 bfloat16, 512 × 768, rank 4",
            26,
            image("flux.1-dev", 768, 512, 4, **again),
            "batch 1, recomputing",
        ),
        Figure(
            "SimpleTuner's quick start",
            "FLUX.1 bfloat16, 512",
            30,
            image("flux.1-dev", 512, 512, 16, **again),
            "batch 1, rank 16, recomputing",
            "what it does while it samples and encodes is not in a plan",
        ),
        Figure(
            "SimpleTuner's quick start",
            "FLUX.1 int8, 512",
            18,
            image("flux.1-dev", 512, 512, 16, quantize="int8", **again),
            "batch 1, rank 16, recomputing",
            "as above",
        ),
        Figure(
            "SimpleTuner's quick start",
            "FLUX.1 NF4, 512",
            9.09,
            image("flux.1-dev", 512, 512, 16, **nf4),
            "batch 1, rank 16, recomputing",
        ),
        Figure(
            "SimpleTuner's quick start",
            "FLUX.2 klein 4B",
            12,
            image("black-forest-labs/FLUX.2-klein-4B", 1024, 1024, 16, **again),
            "batch 1, 1024 × 1024, rank 16",
        ),
        Figure(
            "SimpleTuner's quick start",
            "FLUX.2 klein 9B",
            22,
            image("black-forest-labs/FLUX.2-klein-9B", 1024, 1024, 16, **again),
            "batch 1, 1024 × 1024, rank 16",
        ),
        Figure(
            "kohya's docs",
            "SDXL, rank 32, 1024",
            10,
            image("sdxl", 1024, 1024, 32, **again),
            "batch 1, recomputing",
            "10 GB are recommended, 8 the least",
            limit=True,
        ),
        Figure(
            "diffusers' README",
            "SDXL DreamBooth LoRA",
            16,
            image("sdxl", 1024, 1024, 4, **again),
            "batch 1, rank 4, recomputing",
            "with an 8-bit optimizer there",
            limit=True,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="a table for the documentation")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--quick", action="store_true", help="the same: nothing runs")
    given = parser.parse_args()
    found = figures()
    if given.markdown:
        print("| published by | what | published | plan | | assumed; remark |")
        print("| --- | --- | --- | --- | --- | --- |")
        for f in found:
            said = "agrees" if f.agrees else f"differs ({f.planned / f.published - 1:+.0%})"
            limit = "fits " if f.limit else ""
            why = f.assumed + (f"; {f.remark}" if f.remark else "")
            print(f"| {f.source} | {f.what} | {limit}{f.published:.1f} GB | {f.planned:.1f} GB | {said} | {why} |")
        return
    rows = [
        row(f"{f.source}: {f.what}", m, v, "GB")
        for f in found
        for m, v in (("published", f.published), ("plan", f.planned))
    ]
    bars = [bar("figures that agree within a fifth", 0.5, sum(f.agrees for f in found) / len(found))]
    result = report(rows, bars, {"figures": len(found)})
    print(json.dumps(result) if given.json else "\n".join(lines_of(result)))


if __name__ == "__main__":
    main()
