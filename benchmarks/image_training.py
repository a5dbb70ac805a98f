"""Training an image adapter: veneer against diffusers + PEFT on the same latents, noise and timesteps.

    python benchmarks/image_training.py [--quick] [--rounds 3] [--json] [--only NAME] [--imitate avx512|avx2]

The peer follows diffusers' train_dreambooth_lora scripts: a frozen denoiser, PEFT's layers on q, k, v and out
of every attention, rank 16, AdamW (weight decay 1e-4), gradients clipped at 1, latents and text cached. Both
modes of these scripts are measured, and the faster one counts: float32 (the default), and
mixed_precision="bf16" (base in bfloat16, adapter in float32, autocast). For the bases, see _image_bases.py.

Each side is a process with one thread; sides run one after another, in rounds. The shortest step counts, in
processor time, because other load can only make steps longer. Losses are compared with those in float32.
With --quick: the built-in bases, in one round.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from _image_bases import ATTENTION, adapter_tensors, as_adapter, denoiser, inputs, is_flux, predict
from _report import bar, options, parsed, peak_bytes, print_report, report, row, run_side, without_slow_dtypes

RANK, RATE = 16, 1e-4
ROWS = {
    "catalogue-sdxl": 16,
    "catalogue-flux": 16,
    "flux at width 3072": 2,
    "sdxl at width 640": 1,
    "tiny flux": 2,
    "tiny sdxl": 2,
}


def workload(name: str, steps: int, dtype: Any) -> list[tuple[Any, Any, Any]]:
    """Return (inputs with noisy latents, timesteps, target) for every step, computed in float32 and then cast.

    FLUX uses flow matching; SDXL predicts epsilon at ᾱ = cos²(πt/2)."""
    import torch

    g = torch.Generator().manual_seed(0)
    out = []
    for step in range(steps):
        given = inputs(name, ROWS[name], torch.float32, seed=10 + step)
        clean, noise = given["x"], torch.randn(given["x"].shape, generator=g)
        t = torch.rand(len(clean), generator=g)
        at = t.view(-1, *[1] * (clean.ndim - 1))
        if is_flux(name):
            given["x"], target = (1 - at) * clean + at * noise, noise - clean
        else:
            signal, amount = torch.cos(at * torch.pi / 2), torch.sin(at * torch.pi / 2)
            given["x"], target = signal * clean + amount * noise, noise
        out.append((_cast(given, dtype), t, target))
    return out


def _cast(tree: Any, dtype: Any) -> Any:
    return {k: _cast(v, dtype) for k, v in tree.items()} if isinstance(tree, dict) else tree.to(dtype)


def timed_steps(work: list[tuple[Any, Any, Any]], step: Callable[..., float]) -> dict[str, Any]:
    losses, seconds = [], []
    for given, t, target in work:
        start = time.process_time()
        losses.append(step(given, t, target))
        seconds.append(time.process_time() - start)
    return {"seconds": min(seconds[1:]), "losses": losses, "peak_bytes": peak_bytes()}


def side_veneer(name: str, steps: int, swap: bool = True) -> dict[str, Any]:
    import contextlib

    import torch

    import veneer
    from veneer.models.image.fast import fast_denoiser

    model = denoiser(name).bfloat16().train()
    attachment = veneer.attach(model)
    attachment.add("a", as_adapter(adapter_tensors(name, 0, RANK, ATTENTION)), trainable=True)
    attachment.use("a")
    parameters = list(attachment.parameters("a").values())
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-4, fused=True)

    def step(given: Any, t: Any, target: Any) -> float:
        loss = (predict(name, model, given, given["x"], t).float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    with fast_denoiser(model) if swap else contextlib.nullcontext() as how:
        result = timed_steps(workload(name, steps, torch.bfloat16), step)
    return result | {"how": how.summary() if how is not None else "nothing swapped"}


def side_peft(name: str, steps: int, mixed: bool) -> dict[str, Any]:
    import torch
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig, set_peft_model_state_dict

    dtype = torch.bfloat16 if mixed else torch.float32
    model = denoiser(name).to(dtype)
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=ATTENTION))
    loaded = set_peft_model_state_dict(model, adapter_tensors(name, 0, RANK, ATTENTION))
    assert not loaded.unexpected_keys
    if mixed:
        cast_training_params([model], dtype=torch.float32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    model.train()

    def step(given: Any, t: Any, target: Any) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            prediction = predict(name, model, given, given["x"], t)
        loss = torch.mean(((prediction.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return timed_steps(workload(name, steps, dtype), step)


SIDES: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "veneer": side_veneer,
    "veneer, nothing swapped": lambda name, steps: side_veneer(name, steps, swap=False),
    "diffusers + PEFT, bf16": lambda name, steps: side_peft(name, steps, mixed=True),
    "diffusers + PEFT, float32": lambda name, steps: side_peft(name, steps, mixed=False),
}


def run(bases: list[str], rounds: int, steps: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    bars: list[dict[str, Any]] = []
    sides = without_slow_dtypes(SIDES)
    for name in bases:
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for at in range(rounds):
            for side in sides:
                results[side].append(run_side(__file__, side, name, steps, at=at, OMP_NUM_THREADS="1"))
        best = {side: min(r["seconds"] for r in of) for side, of in results.items()}
        memory = {side: min(r["peak_bytes"] for r in of) for side, of in results.items()}
        rows += [row(f"{name}: {side}", "steps_per_second", 1 / s, "steps/s") for side, s in best.items()]
        rows += [row(f"{name}: {side}", "peak_memory", b / 1e9, "GB") for side, b in memory.items()]
        curves = {side: of[0]["losses"] for side, of in results.items()}
        rows += [row(f"{name}: {side}", f"loss at step {steps}", c[-1], "") for side, c in curves.items()]
        peers = [side for side in sides if side.startswith("diffusers")]
        peer = min(peers, key=lambda side: best[side])
        exact = curves["diffusers + PEFT, float32"]
        apart = {side: max(abs(a - b) for a, b in zip(c, exact, strict=True)) for side, c in curves.items()}
        allowed = max(2 * apart.get("diffusers + PEFT, bf16", 0.0), 0.005)
        bars += [
            bar(f"{name}: steps/s over {peer}", 1.5, best[peer] / best["veneer"]),
            bar(f"{name}: peak memory over {peer}'s", 1.0, memory["veneer"] / memory[peer], at_least=False),
            bar(f"{name}: furthest loss from float32's (twice PEFT bf16's)", allowed, apart["veneer"], at_least=False),
        ]
    return report(rows, bars, {"rounds": rounds, "steps": steps, "clock": "process seconds"})


def main() -> None:
    parser = options(__doc__, "the built-in bases, in one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=list(ROWS), help="one of the bases")
    args = parsed(parser)
    if args.side:
        side, name, steps = args.side
        print(json.dumps(SIDES[side](name, steps)))
        return
    bases = [n for n in ROWS if n.startswith("catalogue" if args.quick else ("catalogue", "flux", "sdxl"))]
    result = run([args.only] if args.only else bases, 1 if args.quick else args.rounds, 5)
    print_report(result, args.json)


if __name__ == "__main__":
    main()
