"""Distillation: compress a rank-64 adapter to rank 4, compared with training rank 4 on examples only.

All adapters are for the tickets of examples/tickets.

    python benchmarks/distillation.py [--folder runs/distillation] [--tickets 200] [--only cut,taught] [--seed 0]

    teacher    rank 64, examples/tickets/config.yaml
    cut        the teacher's best rank-4 approximation, without training (veneer adapter resize --rank 4)
    taught     `cut`, distilled from the teacher on its own completions: examples/distillation/smaller.yaml
    fresh      the settings of `taught`, but starting from a fresh adapter of rank 4
    examples   rank 4 on the examples, with as many steps on the same rows as the teacher

Each adapter is evaluated on held-out tickets: exact match, agreement with the teacher's answers, and loss.
For distilled adapters, the report also has the divergence from the teacher on held-out prompts, before the
first step and at the end. Existing results in the folder are reused.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import veneer
from veneer.adapters.mix import resize
from veneer.train.report.log import read_log

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SUPERVISED, TAUGHT = EXAMPLES / "tickets" / "config.yaml", EXAMPLES / "distillation" / "smaller.yaml"


def made(side: str, folder: Path, base: Any, seed: int) -> None:
    """Create the adapter of a side in its subfolder of `folder`."""
    out, teacher = folder / side, f"distillation.teacher={folder / 'teacher'}"
    if side == "cut":
        resize(str(folder / "teacher"), out, rank=4)
        return
    config, own = {
        "teacher": (SUPERVISED, ["adapter.rank=64"]),
        "examples": (SUPERVISED, ["adapter.rank=4"]),
        "fresh": (TAUGHT, [teacher, "adapter.start=null", "adapter.rank=4"]),
        "taught": (TAUGHT, [teacher, f"adapter.start={folder / 'cut'}"]),
    }[side]
    resume = (out / "checkpoints").is_dir()
    veneer.train_text(config, *own, f"seed={seed}", f"output={out}", base=base, resume=resume)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--tickets", type=int, default=200)
    parser.add_argument("--only", default="teacher,cut,taught,examples")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = given.folder.resolve()
    base = veneer.load_base("smollm2-135m", device="cpu")
    print(f"{os.cpu_count()} processors, {base.dtype}; {given.tickets} held-out tickets")
    for side in given.only.split(","):
        kept, out = folder / f"{side}.json", folder / side
        if not kept.exists():
            began = time.perf_counter()
            if not (out / "adapter_config.json").exists():
                made(side, folder, base, given.seed)
            seconds = time.perf_counter() - began
            tickets = EXAMPLES / "tickets" / "test.jsonl"
            (scores,) = veneer.evaluate(
                base, tickets, {side: [str(out)]}, limit=given.tickets, max_new_tokens=32
            ).values()
            found: dict[str, Any] = {"exact_match": scores.exact_match, "loss": scores.loss, "seconds": seconds}
            found |= {"bytes": (out / "adapter_model.safetensors").stat().st_size, "answers": scores.answers}
            if side in ("taught", "fresh"):
                log = read_log(out / "log.jsonl")
                found["divergences"] = [r["loss"] for r in log if r["event"] == "evaluated"]
            kept.write_text(json.dumps(found))
        found = json.loads(kept.read_text())
        taught_by = json.loads((folder / "teacher.json").read_text())["answers"]
        alike = sum(a == b for a, b in zip(found["answers"], taught_by, strict=True)) / len(taught_by)
        apart = found.get("divergences")
        told = f", KL from the teacher {apart[0]:.4f}, kept {min(apart):.4f}" if apart else ""
        print(
            f"{side:<10} {found['bytes'] / 1e6:5.1f} MB   exact match {found['exact_match']:.1%}, as the teacher "
            f"{alike:.1%}, loss {found['loss']:.4f}{told}   {found['seconds']:,.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
