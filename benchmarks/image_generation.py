"""Image generation with three stacked adapters: cost relative to the base, and cost of switching.

    python benchmarks/image_generation.py [--quick] [--rounds 5] [--json] [--base NAME] [--imitate avx512|avx2]

Only the denoiser calls of a sampling run with eight Euler steps are measured. Adapters do not change the text
encoders and the VAE, so the adapters' share of a complete run is lower. Uses the built-in bases in bfloat16
with one thread, and three rank-16 adapters on q, k, v and out of every attention, at 0.8, 0.6 and 0.5.

Each side is a process that alternates between base and mix. The shortest run counts, in processor time,
because other load can only make runs longer. A call with guidance is a batch of two. The latents of both
sides are compared with those of diffusers + PEFT in float32, which is also timed. With --quick: one round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from _image_bases import ATTENTION, SHAPES, adapter_tensors, as_adapter, denoiser, inputs, predict
from _report import bar, options, parsed, peak_bytes, print_report, report, row, run_side, without_slow_dtypes

RANK, MIX, STEPS = 16, (0.8, 0.6, 0.5), 8
KNOWN = (3, 60)
"""Numbers of loaded adapters for which switching to the mix is measured."""


def sample(name: str, model: Any, given: dict[str, Any], steps: int = STEPS) -> Any:
    """Return latents after Euler steps along the predicted direction; between calls, latents are float32."""
    import torch

    x = given["x"].float()
    with torch.no_grad():
        for step in range(steps):
            t = torch.full((len(x),), 1 - step / steps)
            x = x - predict(name, model, given, x.to(given["x"].dtype), t).float() / steps
    return x


def timed(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def side_veneer(name: str, rows: int, rounds: int, targets: list[str]) -> dict[str, Any]:
    import torch

    import veneer
    from veneer.models.patching import widen_products

    model = denoiser(name).bfloat16()
    widen_products(model)  # as in load_image
    given = inputs(name, rows, torch.bfloat16)
    adapters = [as_adapter(adapter_tensors(name, i, RANK, targets)).mapped(lambda t: t.bfloat16()) for i in range(3)]
    mix = [(f"a{i}", s) for i, s in enumerate(MIX)]
    seconds: dict[str, list[float]] = {}
    kept = 0
    latents = torch.empty(0)
    for _ in range(rounds):
        sample(name, model, given, 1)
        seconds.setdefault("base", []).append(timed(lambda: sample(name, model, given)))
        with veneer.attach(model) as attachment:
            for i, adapter in enumerate(adapters):
                attachment.add(f"a{i}", adapter)
            for known in KNOWN:
                for i in range(len(attachment.adapters), known):
                    attachment.add(f"a{i}", adapters[i % 3])
                attachment.cache.clear()
                attachment.use()
                switch = timed(lambda: attachment.use(*mix))
                first = timed(lambda: sample(name, model, given, 1))
                seconds.setdefault("mix", []).append(timed(lambda: sample(name, model, given)))
                again = min(timed(lambda: sample(name, model, given, 1)) for _ in range(3))
                seconds.setdefault(f"switch with {known}", []).append(switch)
                seconds.setdefault(f"first call with {known}", []).append(max(0.0, first - again))
            kept = attachment.cache.bytes
            latents = sample(name, model, given)
    shortest = {k: min(v) for k, v in seconds.items()}
    return {"seconds": shortest, "kept_bytes": kept, "peak_bytes": peak_bytes(), "latents": latents.flatten().tolist()}


def side_peft(name: str, rows: int, rounds: int, targets: list[str], dtype: str) -> dict[str, Any]:
    """Measure diffusers' load_lora_adapter and set_adapters, which use PEFT's layers."""
    import torch

    kind = getattr(torch, dtype)
    model, bare = (denoiser(name).to(kind) for _ in range(2))
    given = inputs(name, rows, kind)
    files = [{n: t.to(kind) for n, t in adapter_tensors(name, i, RANK, targets).items()} for i in range(3)]
    names = [f"a{i}" for i in range(3)]
    seconds: dict[str, list[float]] = {}
    for known in KNOWN if dtype == "bfloat16" else KNOWN[:1]:
        for i in range(len(getattr(model, "peft_config", {})), known):
            model.load_lora_adapter(files[i % 3], adapter_name=f"a{i}", prefix=None)
        for _ in range(rounds):
            model.set_adapters(names[:1])
            seconds.setdefault(f"switch with {known}", []).append(timed(lambda: model.set_adapters(names, list(MIX))))
            if known == KNOWN[0]:
                seconds.setdefault("base", []).append(timed(lambda: sample(name, bare, given)))
                seconds.setdefault("mix", []).append(timed(lambda: sample(name, model, given)))
    shortest, latents = {k: min(v) for k, v in seconds.items()}, sample(name, model, given).flatten().tolist()
    return {"seconds": shortest, "peak_bytes": peak_bytes(), "latents": latents}


SIDES: dict[str, Callable[..., dict[str, Any]]] = {
    "veneer": side_veneer,
    "diffusers + PEFT, bf16": lambda *rest: side_peft(*rest, "bfloat16"),
    "diffusers + PEFT, float32": lambda *rest: side_peft(*rest, "float32"),
}


def run(bases: list[str], rounds: int) -> dict[str, Any]:
    import torch

    rows, bars = [], []
    sides = without_slow_dtypes(SIDES)
    for name in bases:
        batch = 1 if "flux" in name else 2  # FLUX takes guidance as an input, so one row is enough
        results = {
            side: run_side(__file__, side, name, batch, rounds, ATTENTION, OMP_NUM_THREADS="1") for side in sides
        }
        latents = {side: torch.tensor(found["latents"]) for side, found in results.items()}
        shares = {}
        for side in sides:
            s = results[side]["seconds"]
            shares[side] = s["mix"] / s["base"] - 1
            rows += [row(f"{name}: {side}", f"{k}, a call", s[k] / STEPS * 1e3, "ms") for k in ("base", "mix")]
            rows.append(row(f"{name}: {side}", "mix over base", 100 * shares[side], "%"))
            rows += [row(f"{name}: {side}", k, v * 1e3, "ms") for k, v in s.items() if "with" in k]
            rows.append(row(f"{name}: {side}", "peak_memory", results[side]["peak_bytes"] / 1e9, "GB"))
        rows.append(row(f"{name}: veneer", "kept beside the base", results["veneer"]["kept_bytes"] / 1e6, "MB"))
        truth = latents.pop("diffusers + PEFT, float32")
        error = {k: float((v - truth).norm() / truth.norm()) for k, v in latents.items()}
        rows += [row(f"{name}: {k}", "latents from float32's", 100 * v, "%") for k, v in error.items()]
        mine = results["veneer"]["seconds"]
        peer = min(sides[1:], key=lambda side: results[side]["seconds"]["mix"])
        switch, first = (max(mine[f"{k} with {n}"] for n in KNOWN) for k in ("switch", "first call"))
        bars += [
            bar(f"{name}: three adapters over the base, %", 8, 100 * shares["veneer"], at_least=False),
            bar(f"{name}: calls/s with three, over {peer}", 1.0, results[peer]["seconds"]["mix"] / mine["mix"]),
            bar(f"{name}: switching, ms", 10, switch * 1e3, at_least=False),
            bar(f"{name}: what the first call after it takes more, ms", 10, first * 1e3, at_least=False),
        ]
        if peers_error := error.get("diffusers + PEFT, bf16"):
            bars.append(bar(f"{name}: latents' error over PEFT's", 1.25, error["veneer"] / peers_error, at_least=False))
    return report(rows, bars, {"rounds": rounds, "steps": STEPS, "clock": "process seconds"})


def main() -> None:
    parser = options(__doc__, "one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--base", action="append", choices=list(SHAPES), help="instead of the built-in bases")
    args = parsed(parser)
    if args.side:
        side, *rest = args.side
        print(json.dumps(SIDES[side](*rest)))
        return
    result = run(args.base or ["catalogue-sdxl", "catalogue-flux"], 1 if args.quick else args.rounds)
    print_report(result, args.json)


if __name__ == "__main__":
    main()
