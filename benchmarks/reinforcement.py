"""Reinforcement: veneer against TRL's GRPOTrainer, with the same base, rewards, settings and seeds.

    OMP_NUM_THREADS=1 python benchmarks/reinforcement.py [--steps 15] [--seeds 0,1,2] [--dtype bfloat16]
                                                         [--only veneer] [--json]

Each combination of side and seed is a process; processes run one after another. Each prints one JSON object:
mean reward per step, sampled tokens per second after the first step (by wall clock and by processor time,
which depends less on other load), and peak memory. The task needs no data: prompts ask for a question about a
topic, and the reward is whether the completion contains a question within MOST tokens. At the start, one
completion in four gets the reward.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import peak_bytes

PROMPTS, GROUP, MOST, RATE, RANK = 4, 8, 16, 3e-4, 16
ASKED = r"\?"
THINGS = """
bees bread bridges clocks clouds coins deserts dogs doors engines fire flags forests gardens glass gold grass hills
horses islands keys lakes lamps maps mills moons music oceans owls paper pianos plants rain rivers roads rocks ropes
sand schools sheep ships shoes silk snow stars stones streets sugar tea tents tides tigers tools towns trains trees
valleys walls water wheels whales wind windows wool
"""


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def speeds(tokens: list[float], ends: list[tuple[float, float]]) -> dict[str, float]:
    """Return the rates of all steps after the first.

    tokens: sampled in each step. ends: (wall clock, processor time) at the end of each step."""
    clock, processor = (last - first for first, last in zip(ends[0], ends[-1], strict=True))
    drawn = sum(tokens[1:])
    return {
        "tokens_per_second": drawn / clock,
        "tokens_per_processor_second": drawn / processor,
        "processor_seconds_a_step": processor / (len(ends) - 1),
    }


def rows() -> list[dict[str, str]]:
    return [{"prompt": f"Ask one question about {thing}.", "answer": ""} for thing in THINGS.split()]


def of_veneer(folder: Path, steps: int, seed: int, dtype: str) -> dict[str, Any]:
    import veneer
    from veneer.train.events import Stepped

    found: list[Stepped] = []
    ends: list[tuple[float, float]] = []

    def stepped(event: object) -> None:
        if isinstance(event, Stepped):
            found.append(event)
            ends.append(now())

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    base = veneer.load_base("smollm2-135m", dtype=dtype, device="cpu")
    config = {
        "base": {"name": "smollm2-135m", "dtype": dtype},
        "data": {"train": str(folder / "rows.jsonl"), "split": 0},
        "adapter": {"rank": RANK, "alpha": 2 * RANK},
        "batching": {"rows": PROMPTS},
        "seed": seed,
        "optimizer": {"learning_rate": RATE},
        "schedule": {"name": "constant", "warmup": 0, "steps": steps},
        "evaluation": {"keep": "last"},
        "output": str(folder / "run"),
        "reinforcement": {
            "loss": "dr-grpo",
            "group": GROUP,
            "max_tokens": MOST,
            "rows": PROMPTS * GROUP,
            "rewards": [{"kind": "regex", "name": "question", "pattern": ASKED}],
        },
    }
    veneer.train_text(config, base=base, on_event=stepped)
    speed = speeds([e.extra["drawn_tokens"] for e in found], ends)
    return speed | {"rewards": [e.extra["reward"] for e in found], "gap": max(e.extra["gap_max"] for e in found)}


def of_trl(folder: Path, steps: int, seed: int, dtype: str) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import veneer

    directory = str(veneer.load_base("smollm2-135m", device="cpu").directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    tokens: list[float] = []
    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(now())

    def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        return [float(re.search(ASKED, c[0]["content"]) is not None) for c in completions]

    data = Dataset.from_list([{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows()])
    settings = GRPOConfig(
        output_dir=str(folder / "trl"),
        loss_type="dr_grpo",
        scale_rewards="none",
        num_generations=GROUP,
        beta=0.0,
        per_device_train_batch_size=PROMPTS * GROUP,
        max_completion_length=MOST,
        learning_rate=RATE,
        max_steps=steps,
        lr_scheduler_type="constant",
        warmup_steps=0,
        temperature=1.0,
        seed=seed,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        max_grad_norm=1.0,
        adam_beta2=0.999,
    )
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=settings,
        train_dataset=data,
        peft_config=lora,
        processing_class=AutoTokenizer.from_pretrained(directory),
        callbacks=[Clock()],
    )
    trainer.train()
    curve = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return speeds(tokens, ends) | {"rewards": curve}


SIDES = {"veneer": of_veneer, "trl": of_trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--only", choices=list(SIDES))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        with tempfile.TemporaryDirectory() as folder:
            found = SIDES[given.side](Path(folder), given.steps, int(given.seeds), given.dtype)
        print(json.dumps(found | {"peak_bytes": peak_bytes()}))
        return
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in given.seeds.split(","):
        for side in [given.only] if given.only else SIDES:
            own = ["--side", side, "--seeds", seed, "--steps", str(given.steps), "--dtype", given.dtype]
            ran = subprocess.run([sys.executable, __file__, *own], stdout=subprocess.PIPE, text=True, check=True)
            results.setdefault(side, []).append(json.loads(ran.stdout.splitlines()[-1]))
    if given.json:
        print(json.dumps(results))
        return
    for side, runs in results.items():
        first, last = ([statistics.mean(run["rewards"][part]) for run in runs] for part in (slice(5), slice(-5, None)))
        clock, processor, peak = (
            statistics.median(run[key] for run in runs)
            for key in ("tokens_per_second", "tokens_per_processor_second", "peak_bytes")
        )
        print(
            f"{side}: reward {statistics.mean(first):.3f} in the first five steps, {statistics.mean(last):.3f} in the "
            f"last ({min(last):.3f} to {max(last):.3f}); tokens drawn a second {clock:,.1f}, of the processor's "
            f"{processor:,.1f}; peak {peak / 1e6:,.0f} MB"
        )


if __name__ == "__main__":
    main()
