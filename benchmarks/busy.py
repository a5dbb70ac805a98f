"""Speed next to busy processes, as a share of the speed on a quiet machine.

Measures veneer's training, serving and generation, and PEFT and diffusers.

    python benchmarks/busy.py [--quick] [--only training,serving,pictures] [--rounds 2] [--seconds 4] [--json]

A neighbor is a process, started by the benchmark, that runs a Python loop. Each side is a process that loads
its base once. The side is measured in rounds, without a neighbor ("quiet"), with one and with two, while the
other sides sleep. Measuring starts after a side has worked next to its neighbors for a second. The report has
the median rate over all work items (a step, a batch of completions, or a batch of images) and its share of
the quiet median. Targets on two processors: 55% with one neighbor, 30% with two.

training   SmolLM2-135M, rank 16 on all seven projections, 4 rows of 64 tokens, loss on each row's last quarter,
           AdamW
serving    the embedded engine on SmolLM2-135M, 4 requests of 32 and 16 tokens, each with its own adapter of
           rank 16
pictures   catalogue-flux's denoiser, batches of 2, eight steps, three stacked adapters of rank 16

All parts use the precision that `auto` selects for this processor. Run on an otherwise idle machine: other
processes act as neighbors, and appear in the report as processors that are in use during quiet rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from _report import bar, lines_of, report, row

ROOT = Path(__file__).resolve().parents[1]
WANTED = {"beside one": 0.55, "beside two": 0.30}
STATES = {"quiet": 0, "beside one": 1, "beside two": 2}
ROWS, LENGTH, RANK = 4, 64, 16
PROMPT, NEW, PICTURES = 32, 16, 2
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARM = 1.0
LOOP = "import os, sys\nwhile os.getppid() == int(sys.argv[1]):\n    for i in range(100_000):\n        pass"
"""The program that a neighbor runs; it ends when its parent ends."""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    started = [subprocess.Popen([sys.executable, "-c", LOOP, str(os.getpid())]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


# -- the sides: each passes a function to `inside`, which calls it repeatedly; a call returns its amount of work -------

Inside = Callable[[Callable[[], float]], None]


def token_ids(base: Any, *shape: int) -> Any:
    import torch

    vocabulary = base.get_input_embeddings().weight.shape[0]
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(0))


def training_veneer(work: Path, inside: Inside) -> None:
    import torch

    import veneer
    from veneer.models.text.fast import fast
    from veneer.models.text.loss import text_loss
    from veneer.ops.cpu.sharing import shared

    base = veneer.load_base((work / "base").read_text(encoding="utf-8"), device="cpu")
    ids, trained = token_ids(base.model, ROWS * LENGTH), torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    trained[:, LENGTH * 3 // 4 :] = True
    with veneer.attach(base.model) as attachment:
        adapter = veneer.create(base.model, veneer.LoraSpec(rank=RANK, targets=LINEARS), seed=0)
        attachment.add("a", adapter, trainable=True)
        attachment.use("a")
        optimizer = torch.optim.AdamW(list(attachment.parameters("a").values()), lr=1e-4, fused=True)
        base.model.train()

        def step() -> float:
            with shared():  # as in train.loop
                loss = text_loss(base.model, ids, [LENGTH] * ROWS, trained.flatten()) / trained.sum()
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return ROWS * LENGTH

        with fast(base.model):
            inside(step)


def training_peft(work: Path, inside: Inside) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, (work / "dtype").read_text(encoding="utf-8"))
    folder = (work / "folder").read_text(encoding="utf-8")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LINEARS)))
    ids = token_ids(model, ROWS, LENGTH)
    labels = ids.clone()
    labels[:, : LENGTH * 3 // 4] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step() -> float:
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return ROWS * LENGTH

    inside(step)


def serving_veneer(work: Path, inside: Inside) -> None:
    import veneer
    from veneer.serve.engine.engine import TextEngine
    from veneer.serve.request import Finished, Request, Sampling
    from veneer.serve.settings import EngineSettings

    base = veneer.load_base((work / "base").read_text(encoding="utf-8"), device="cpu")
    shelf = {}
    for seed in range(ROWS):
        adapter = veneer.create(base.model, veneer.LoraSpec(rank=RANK, targets=LINEARS), seed=seed)
        for pair in adapter.pairs.values():
            pair.B = pair.A.new_ones(pair.B.shape) * 1e-4 * (seed + 1)
        shelf[adapter.digest()] = adapter.mapped(lambda t: t.to(base.dtype))
    prompts, sampling = token_ids(base.model, ROWS, PROMPT).tolist(), Sampling(NEW, temperature=0.0, ignore_eos=True)

    with TextEngine(base, lambda digest, _: shelf[digest], EngineSettings(cache_bytes=1 << 28)) as engine:

        async def answer(prompt: list[int], digest: str) -> None:
            async for event in engine.events(Request(tuple(prompt), sampling, ((digest, 1.0),))):
                if isinstance(event, Finished) and event.reason != "length":
                    raise SystemExit(f"a request ended with {event.reason}: {event.error}")

        async def all_of_them() -> None:
            await asyncio.gather(*(answer(p, d) for p, d in zip(prompts, shelf, strict=True)))

        def answers() -> float:
            engine.cache.forget()
            asyncio.run(all_of_them())
            return ROWS * NEW

        inside(answers)


def stacked(work: Path) -> tuple[str, Any, list[dict[str, Any]], Any, list[float]]:
    """Return (base name, dtype, tensors of each adapter, inputs of a call, strengths)."""
    import torch
    from _image_bases import ATTENTION, adapter_tensors, inputs

    name, dtype = (work / "pictures").read_text(encoding="utf-8"), (work / "dtype").read_text(encoding="utf-8")
    kind = getattr(torch, dtype)
    files = [{n: t.to(kind) for n, t in adapter_tensors(name, i, RANK, ATTENTION).items()} for i in range(3)]
    return name, kind, files, inputs(name, PICTURES, kind), [0.8, 0.6, 0.5]


def pictures_veneer(work: Path, inside: Inside) -> None:
    from _image_bases import as_adapter, denoiser
    from image_generation import sample

    import veneer
    from veneer.ops.cpu.sharing import forwards

    name, dtype, files, given, strengths = stacked(work)
    model = denoiser(name).to(dtype)
    with veneer.attach(model) as attachment, forwards(model):  # as in models.image.generate
        for i, tensors in enumerate(files):
            attachment.add(f"a{i}", as_adapter(tensors))
        attachment.use(*((f"a{i}", strength) for i, strength in enumerate(strengths)))
        inside(lambda: len(sample(name, model, given)))


def pictures_diffusers(work: Path, inside: Inside) -> None:
    from _image_bases import denoiser
    from image_generation import sample

    name, dtype, files, given, strengths = stacked(work)
    model = denoiser(name).to(dtype)
    for i, tensors in enumerate(files):
        model.load_lora_adapter(tensors, adapter_name=f"a{i}", prefix=None)
    model.set_adapters([f"a{i}" for i in range(3)], strengths)
    inside(lambda: len(sample(name, model, given)))


SIDES: dict[str, dict[str, Callable[[Path, Inside], None]]] = {
    "training": {"veneer": training_veneer, "PEFT": training_peft},
    "serving": {"veneer": serving_veneer},
    "pictures": {"veneer": pictures_veneer, "diffusers + PEFT": pictures_diffusers},
}
UNITS = {"training": "tokens/s", "serving": "tokens/s", "pictures": "pictures/s"}


def obey(piece: Callable[[], float], told: Any) -> None:
    """Read numbers of seconds from stdin; for each, run work items for that time (at least two).

    Prints the rate of each item and the number of processors that other processes used."""
    from veneer.ops.cpu.sharing import busy_seconds

    piece()
    print("{}", file=told, flush=True)
    processors = range(os.cpu_count() or 1)
    for line in sys.stdin:
        warm = time.perf_counter()
        while time.perf_counter() - warm < WARM:
            piece()
        rates: list[float] = []
        began, before, own = time.perf_counter(), sum(busy_seconds(processors)), time.process_time()
        while len(rates) < 2 or time.perf_counter() - began < float(line):
            start = time.perf_counter()
            done = piece()
            rates.append(done / (time.perf_counter() - start))
        others = sum(busy_seconds(processors)) - before - (time.process_time() - own)
        print(json.dumps({"rates": rates, "others": others / (time.perf_counter() - began)}), file=told, flush=True)


# -- running the sides -------------------------------------------------------------------------------------------------


class Side:
    """A side in its own process, which sleeps between its measurements."""

    def __init__(self, part: str, name: str, work: Path) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        self.name, self.errors = f"{part}: {name}", work / f"{part} {name}.log"
        command = [sys.executable, "-W", "ignore", __file__, "--side", json.dumps([part, name, str(work)])]
        with self.errors.open("w", encoding="utf-8") as errors:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=errors, text=True)
        self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise SystemExit(f"{self.name} failed:\n{self.errors.read_text(encoding='utf-8')[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found

    def measured(self, seconds: float) -> dict[str, Any]:
        print(seconds, file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def prepare(work: Path, quick: bool) -> dict[str, str]:
    """Write the files that the sides need.

    Returns the base's name ("base") and folder, the dtype, and the denoiser's name ("pictures")."""
    from serving_load import make_base

    import veneer

    name = make_base(work / "tiny", quick)
    base = veneer.load_base(name, device="cpu")
    dtype = str(base.dtype).removeprefix("torch.")
    said = {"base": name, "folder": str(base.directory), "dtype": dtype}
    said["pictures"] = "tiny flux" if quick else "catalogue-flux"
    for key, value in said.items():
        (work / key).write_text(value, encoding="utf-8")
    return said


def run(quick: bool, parts: Sequence[str], rounds: int, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    rows, bars = [], []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as started:
        work = Path(folder)
        said = prepare(work, quick)
        for part in parts:
            sides = {name: Side(part, name, work) for name in SIDES[part]}
            for side in sides.values():
                started.callback(side.end)
            found: dict[tuple[str, str], list[dict[str, Any]]] = {}
            for _ in range(rounds):
                for state, count in STATES.items():
                    with neighbours(count):
                        for name, side in sides.items():
                            found.setdefault((name, state), []).append(side.measured(seconds))
            for name, side in sides.items():
                side.end()
                rate = {state: statistics.median(r for f in found[name, state] for r in f["rates"]) for state in STATES}
                others = {state: statistics.median(f["others"] for f in found[name, state]) for state in STATES}
                shares = {state: rate[state] / rate["quiet"] for state in WANTED}
                rows += [row(side.name, state, rate[state], UNITS[part]) for state in STATES]
                rows += [row(side.name, f"{state}, of quiet", 100 * share, "%") for state, share in shares.items()]
                rows += [row(side.name, f"others, {state}", others[state], "processors") for state in STATES]
                if name == "veneer":
                    bars += [bar(f"{part}: {state}, of quiet", WANTED[state], share) for state, share in shares.items()]
                say(f"{side.name}: { {state: (round(rate[state], 1), round(others[state], 2)) for state in STATES} }")
    about = {"processors": os.cpu_count(), "base": "tiny" if quick else said["base"], "dtype": said["dtype"]}
    return report(rows, bars, {**about, "rounds": rounds, "seconds": seconds})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny bases, one short round: does it run, not how fast")
    parser.add_argument("--only", default=",".join(SIDES), help="which parts, with commas between")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement; two pieces of work at least")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    if given.side:
        part, name, work = json.loads(given.side)
        told, sys.stdout = sys.stdout, sys.stderr  # libraries print to stderr, not into the results
        SIDES[part][name](Path(work), lambda piece: obey(piece, told))
        return
    parts = given.only.split(",")
    if unknown := set(parts) - set(SIDES):
        parser.error(f"--only has no {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    rounds, seconds = (1, 0.5) if given.quick else (given.rounds, given.seconds)
    result = run(given.quick, parts, rounds, seconds, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(result) if given.json else "\n".join(lines_of(result)))


if __name__ == "__main__":
    main()
