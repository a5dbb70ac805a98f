"""Adapters as files and arithmetic on the module shapes of SDXL and FLUX: veneer against its peers.

    python benchmarks/adapters.py [--quick] [--rounds 3] [--json] [--imitate avx512|avx2]

resize, mix    truncate every module through its low-rank factors, compared with `torch.linalg.svd` of the dense
               change, as in kohya's resize and merge scripts. The dense side is timed once per shape (with
               --quick only for the cheapest shapes) and multiplied by the number of modules with this shape.
               The error is the largest ‖ours − best of the same rank‖/‖ΔW‖ of any shape; "best" comes from the
               dense change in float64.
load           read and attach an adapter file of about 300 MB (30 MB with --quick) for FLUX's 494 block
               linears, compared with reading its bytes and with PEFT's and diffusers' loaders on the same
               tensors. The base has no values, so no side spends time on them. Each side is a process and
               reads the file from the page cache.
switch         call `use` on an attached base with 1 and with 300 loaded adapters.

Run on one core of an otherwise idle machine: OMP_NUM_THREADS=1 taskset -c 1. Quote ratios, not seconds.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _report import bar, options, parsed, part, print_report, report, row, run_side, say

RANK, KEEP = 32, 8

Shape = tuple[int, ...]


# -- shapes ------------------------------------------------------------------------------------------------------------


def sdxl_shapes() -> Counter[Shape]:
    """Return the shapes of the 722 modules in the U-Net's Transformer2DModels.

    These have 10 blocks at width 640 and 60 at width 1280."""
    out: Counter[Shape] = Counter()
    for width, models, blocks in ((640, 5, 10), (1280, 6, 60)):
        out[(width, width)] += 2 * models + blocks * 6  # proj_in, proj_out; attn1 q k v out, attn2 q out
        out[(width, 2048)] += blocks * 2  # attn2 k v
        out[(8 * width, width)] += blocks
        out[(width, 4 * width)] += blocks
    return out


def flux_shapes() -> Counter[Shape]:
    """Return the shapes of kohya's 304 modules of FLUX.1: 19 double blocks of 10, 38 single blocks of 3."""
    h = 3072
    out: Counter[Shape] = Counter()
    for shape, count in (((3 * h, h), 2), ((h, h), 2), ((4 * h, h), 2), ((h, 4 * h), 2), ((6 * h, h), 2)):
        out[shape] += 19 * count
    for shape in ((7 * h, h), (h, 5 * h), (3 * h, h)):
        out[shape] += 38
    return out


# -- resize and mix ----------------------------------------------------------------------------------------------------


def pair_of(shape: Shape, seed: int, rank: int = RANK) -> Any:
    import torch

    from veneer.core.adapter import Pair

    g = torch.Generator().manual_seed(seed)
    fall = 0.9 ** torch.arange(rank, dtype=torch.float32)
    A = torch.randn(rank, shape[1], generator=g) * fall[:, None]
    return Pair(A, torch.randn(shape[0], rank, generator=g) * 0.02, 0.5)


def seconds_of(call: Callable[[], Any], rounds: int) -> float:
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def arithmetic(quick: bool, rounds: int) -> dict[str, Any]:
    import torch

    from veneer.core.mix import mix_pairs
    from veneer.core.truncate import Bound, factors, truncated

    rows, bars = [], []
    for family, shapes in (("SDXL", sdxl_shapes()), ("FLUX", flux_shapes())):
        order = sorted(shapes, key=lambda s: min(s) ** 2 * max(s))
        chosen = order[: {"SDXL": 3, "FLUX": 0}[family]] if quick else order[: {"SDXL": 8, "FLUX": 2}[family]]
        if not chosen:
            continue
        ours = {"resize": 0.0, "mix": 0.0}
        dense = {"resize": 0.0, "mix": 0.0}
        worst = {"resize": 0.0, "mix": 0.0}
        for shape in chosen:
            a, b = pair_of(shape, 0), pair_of(shape, 1)
            for name, parts in (("resize", [(a, 1.0)]), ("mix", [(a, 0.8), (b, 0.5)])):
                bound = Bound(rank=KEEP if name == "resize" else RANK)

                def ours_now(parts: Any = parts, bound: Any = bound) -> Any:
                    if len(parts) > 1:
                        return mix_pairs(parts, "svd", bound)[0]
                    return truncated(*factors(parts[0][0]), parts[0][0], bound, torch.float32)[0]

                delta = sum(w * p.scale * (p.B @ p.A) for p, w in parts)
                start = time.perf_counter()
                torch.linalg.svd(delta, full_matrices=False)
                theirs = time.perf_counter() - start
                mine = seconds_of(ours_now, rounds)
                got = ours_now()
                ours[name] += mine * shapes[shape]
                dense[name] += theirs * shapes[shape]
                if min(shape) <= 1280:
                    exact = sum(w * p.scale * (p.B.double() @ p.A.double()) for p, w in parts)
                    U, S, V = torch.linalg.svd(exact, full_matrices=False)
                    best = (U[:, : bound.rank] * S[: bound.rank]) @ V[: bound.rank]
                    off = torch.linalg.vector_norm(got.B.double() @ got.A.double() - best) / S.norm()
                    worst[name] = max(worst[name], float(off))
                part(f"{family} {name} {shape}", seconds=mine, dense=theirs)
        count = sum(shapes[s] for s in chosen)
        for name in ours:
            label = f"{family} {name}, {count} of {shapes.total()} modules"
            rows.append(row(label, "veneer", ours[name], "s"))
            rows.append(row(label, "dense svd, scaled", dense[name], "s"))
            bars.append(bar(f"{label}: times faster than the dense svd", 20, dense[name] / ours[name]))
            if worst[name]:
                rows.append(row(label, "error, log10", float(torch.tensor(worst[name]).log10()), ""))
                bars.append(bar(f"{label}: error in units of 1e-7", 10, worst[name] / 1e-7, False))
    return {"rows": rows, "bars": bars}


# -- loading -----------------------------------------------------------------------------------------------------------


def write_file(work: Path, megabytes: int) -> None:
    """Write the same tensors twice: as a PEFT folder and as a diffusers file."""
    import torch
    from safetensors.torch import load_file, save_file

    from veneer.core.adapter import Adapter, Card, Pair
    from veneer.formats import peft

    modules = {n: m for n, m in flux().named_modules() if isinstance(m, torch.nn.Linear) and "blocks" in n}
    each = sum(m.in_features + m.out_features for m in modules.values())
    rank = max(1, round(megabytes * 1e6 / 2 / each))
    g = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Any:
        return torch.randn(*shape, generator=g).bfloat16()

    pairs = {n: Pair(noise(rank, m.in_features), noise(m.out_features, rank), 1.0) for n, m in modules.items()}
    peft.write_folder(Adapter(pairs, card=Card(kind="image")), work / "adapter")
    tensors = load_file(work / "adapter" / "adapter_model.safetensors")
    save_file(
        {n.replace("base_model.model.", "transformer."): t for n, t in tensors.items()}, work / "diffusers.safetensors"
    )


def flux() -> Any:
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True).to(torch.bfloat16)


def side_bytes(work: Path) -> float:
    """Measure reading the file into memory."""
    file = work / "adapter" / "adapter_model.safetensors"
    return timed(lambda: file.read_bytes())


def side_veneer(work: Path) -> float:
    import torch

    from veneer.core.attach import attach
    from veneer.formats import peft

    net = flux()

    def load() -> None:
        adapter = peft.read_folder(work / "adapter")
        with attach(net) as attached:
            attached.add("a", adapter)
            attached.use("a")

    for module in net.modules():  # not meta: on that device, the adapter would lose its values
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(torch.empty(()).bfloat16().expand(p.shape), False)
    return timed(load)


def side_peft(work: Path) -> float:
    from peft import PeftModel

    nets = [flux() for _ in range(3)]
    return timed(lambda: PeftModel.from_pretrained(nets.pop(), str(work / "adapter"), low_cpu_mem_usage=True), 3)


def side_diffusers(work: Path) -> float:
    nets = [flux() for _ in range(3)]
    return timed(
        lambda: nets.pop().load_lora_adapter(
            str(work / "diffusers.safetensors"), prefix="transformer", low_cpu_mem_usage=True
        ),
        3,
    )


LOADS = {"read of the bytes": side_bytes, "veneer": side_veneer, "PEFT": side_peft, "diffusers": side_diffusers}


def timed(call: Callable[[], Any], rounds: int = 5) -> float:
    """Return the median time of several calls in one process, excluding the first."""
    took = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return statistics.median(took[1:])


def loading(quick: bool) -> tuple[list[Any], list[Any]]:
    with tempfile.TemporaryDirectory() as folder:
        work, megabytes = Path(folder), 30 if quick else 300
        say(f"adapters: writing a file of {megabytes} MB")
        write_file(work, megabytes)
        size = (work / "adapter" / "adapter_model.safetensors").stat().st_size
        took = {name: run_side(__file__, name, megabytes, work=work)["seconds"] for name in LOADS}
    rows = [row(f"load and attach {size / 1e6:.0f} MB: {n}", "seconds", t, "s") for n, t in took.items()]
    base = took["read of the bytes"]
    rows += [row(f"load and attach: {n}", "over reading", t / base, "×") for n, t in took.items()]
    return rows, [bar("load and attach over reading the bytes", 1.5, took["veneer"] / base, False)]


# -- switching ---------------------------------------------------------------------------------------------------------


def switching() -> dict[str, Any]:
    import torch

    from veneer.core.adapter import LoraSpec
    from veneer.core.attach import attach
    from veneer.core.init import create

    net = torch.nn.Sequential(*[torch.nn.Linear(16, 16) for _ in range(64)])
    adapter = create(net, LoraSpec(rank=2, targets="all-linear"), seed=0)
    took = {}
    for count in (1, 300):
        with attach(net) as attached:
            for i in range(count):
                attached.add(str(i), adapter)

            def many(attached: Any = attached, last: str = str(count - 1)) -> None:
                for _ in range(2000):
                    attached.use(last)
                    attached.use()

            took[count] = seconds_of(many, 9) / 4000
    rows = [row(f"switch, {n} adapters loaded", "time", t * 1e6, "µs") for n, t in took.items()]
    return {"rows": rows, "bars": [bar("switching with 300 loaded over 1", 1.2, took[300] / took[1], False)]}


def main() -> None:
    parser = options(__doc__, "the cheapest shapes, and a file of 30 MB")
    parser.add_argument("--rounds", type=int, default=3)
    args = parsed(parser)
    if args.side:
        side, *rest = args.side
        found = {"seconds": LOADS[side](Path(rest[0]))} if side in LOADS else {
            "resize and mix": arithmetic, "switch": switching
        }[side](*rest)  # fmt: skip
        print(json.dumps(found))
        return
    loads = loading(args.quick)
    parts = [run_side(__file__, "resize and mix", args.quick, args.rounds), run_side(__file__, "switch")]
    rows, bars = (loads[i] + [found for p in parts for found in p[key]] for i, key in enumerate(("rows", "bars")))
    print_report(report(rows, bars, {"quick": args.quick}), args.json)


if __name__ == "__main__":
    main()
