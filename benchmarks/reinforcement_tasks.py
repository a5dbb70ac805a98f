"""Gains of reinforcement for SmolLM2-135M: the runs of examples/reinforcement, with several seeds each.

    python benchmarks/reinforcement_tasks.py [TASK …] [--seeds 0,1,2] [--folder runs/reinforcement]
                                             [--charts docs/images] [--set KEY=VALUE …] [--json]

    tickets          correct answers, from the supervised adapter (examples/tickets/config.yaml, trained first)
    tickets-format   JSON with exactly the three keys, from the base
    chain-sum, products two tasks of reasoning-gym, from the base (pip install -e '.[reasoning-gym]')

Prints the mean rewards of greedy completions for held-out prompts, before the first step and at the last
evaluation. For tickets, also prints the share of test.jsonl with all three fields right. For the first seed,
prints the completions for two held-out prompts at each evaluated step. `--charts` writes an SVG per task: the
rewards of each step's samples and of held-out prompts. Existing results in the folder are reused, and
interrupted runs resume.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _report import lines_of, report, row

import veneer
from veneer.jobs.checkpoints import publish_checkpoints
from veneer.library.library import open_library
from veneer.train.report.log import read_log
from veneer.train.report.page import Series, chart

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SUPERVISED = EXAMPLES / "tickets" / "config.yaml"
TICKETS, FORM = EXAMPLES / "tickets" / "test.jsonl", EXAMPLES / "reinforcement" / "form-test.jsonl"
TASKS = ("tickets", "tickets-format", "chain-sum", "products")
STYLE = (
    ".grid{stroke:#d8d4cc;stroke-width:1}.tick{font:11px system-ui,sans-serif;fill:#6b665e}"
    ".line{fill:none;stroke-width:2}.line.a{stroke:#b5632c}.line.b{stroke:#2f6f73}.line.faint{stroke-width:1;opacity:.45}"
    ".dot.a{fill:#b5632c}.dot.b{fill:#2f6f73}"
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("tasks", nargs="*", default=TASKS, help="some of them")
    options.add_argument("--seeds", default="0,1,2")
    options.add_argument("--folder", type=Path, default=Path("runs/reinforcement"))
    options.add_argument("--charts", type=Path)
    options.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the trainings")
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    folder, seeds = given.folder.resolve(), [int(s) for s in given.seeds.split(",")]
    base = veneer.load_base("smollm2-135m", device="cpu")
    if "tickets" in given.tasks and not (folder / "supervised" / "adapter_config.json").is_file():
        veneer.train_text(SUPERVISED, f"output={folder / 'supervised'}", base=base)
    rows: list[dict[str, Any]] = []
    for task in given.tasks:
        runs = [_trained(task, seed, folder, base, given.set) for seed in seeds]
        rows += _figures(task, runs, base)
        if given.charts:
            given.charts.mkdir(parents=True, exist_ok=True)
            (given.charts / f"reinforcement-{task}.svg").write_text(_curves(task, runs), encoding="utf-8")
        for said in _answers(task, runs[0], base):
            print(said, file=sys.stderr)
    result = report(rows, [], {"seeds": len(seeds)})
    print(json.dumps(result) if given.json else "\n".join(lines_of(result)))


def _trained(task: str, seed: int, folder: Path, base: Any, settings: list[str]) -> Path:
    """Train a run unless it is finished; return its folder. For `_answers`, all checkpoints are kept."""
    out = folder / f"{task}-{seed}"
    if not (out / "adapter_config.json").is_file():
        start = [f"adapter.start={place}" for place in _begins(task, folder)]
        keep = ["checkpoint.every=20", "checkpoint.keep=99", "evaluation.keep=last"]
        veneer.train_text(
            EXAMPLES / "reinforcement" / f"{task}.yaml",
            f"seed={seed}",
            f"output={out}",
            *start,
            *keep,
            *settings,
            base=base,
            resume=(out / "checkpoints").is_dir(),
        )
    return out


def _begins(task: str, folder: Path) -> list[str]:
    """Return the adapter from which a task's runs start, as a list with at most one path."""
    return [str(folder / "supervised")] if task == "tickets" else []


def _figures(task: str, runs: list[Path], base: Any) -> Iterator[dict[str, Any]]:
    evaluations = [[r for r in read_log(run / "log.jsonl") if r["event"] == "evaluated"] for run in runs]
    for metric in sorted(evaluations[0][0]["extra"]):
        if metric.startswith("reward") and metric != "reward_failed":
            for name, at in (("before", 0), ("after", -1)):
                values = [each[at]["extra"][metric] for each in evaluations]
                yield from _spread(f"{task}: {name}", metric, values)
    if task == "tickets":
        mixes: dict[str, Any] = {"supervised": _begins(task, runs[0].parent)}
        mixes |= {run.name: [str(run)] for run in runs}
        scores = veneer.evaluate(base, TICKETS, mixes)
        right = {name: float(score.exact_match or 0) for name, score in scores.items()}
        yield row("tickets: before", "test tickets right", right.pop("supervised"), "")
        yield from _spread("tickets: after", "test tickets right", list(right.values()))


def _spread(name: str, metric: str, values: list[float]) -> Iterator[dict[str, Any]]:
    yield row(name, metric, statistics.mean(values), "")
    if len(values) > 1:
        yield row(name, f"{metric}, least", min(values), "")
        yield row(name, f"{metric}, most", max(values), "")


def _curves(task: str, runs: list[Path]) -> str:
    """Draw the rewards by step as an SVG.

    Thin lines: samples of each seed. Thick line: mean of the seeds. Dots: greedy completions of held-out
    prompts."""
    logs = [read_log(run / "log.jsonl") for run in runs]
    drawn = [{r["step"]: r["extra"]["reward"] for r in log if r["event"] == "stepped"} for log in logs]
    asked = [{r["step"]: r["extra"]["reward"] for r in log if r["event"] == "evaluated"} for log in logs]
    lines = [Series(f"seed {i}", sorted(each.items()), kind="faint") for i, each in enumerate(drawn)]
    lines += [Series("draws", _mean(drawn)), Series("held out", _mean(asked), kind="dots", colour="b")]
    drawing = chart(lines, label=f"{task}: reward by step", from_zero=True)
    head, _, rest = drawing.partition(">")
    title = '<text class="tick" x="62" y="24">reward by step; dots: held-out prompts, greedily</text>'
    return f'{head} xmlns="http://www.w3.org/2000/svg" style="background:#fff"><style>{STYLE}</style>{title}{rest}\n'


def _mean(curves: list[dict[int, float]]) -> list[tuple[float, float]]:
    steps = sorted(set.intersection(*(set(c) for c in curves)))
    return [(step, statistics.mean(c[step] for c in curves)) for step in steps]


def _answers(task: str, run: Path, base: Any) -> Iterator[str]:
    """Yield table lines with the completions of two prompts at each checkpoint.

    For reasoning-gym, the prompts are generated with another seed."""
    source = json.loads((run / "log.jsonl").read_text(encoding="utf-8").partition("\n")[0])["settings"]["data.train"]
    own = str(FORM if task == "tickets-format" else TICKETS)
    data = f"{source}&seed=99" if source.startswith("reasoning-gym:") else own
    with tempfile.TemporaryDirectory() as place, open_library(place) as library:
        published = publish_checkpoints(library, task, run, run)
        kept = {str(n): [str(library.resolve(r))] for n, r in published.items()}
        mixes = {"0": _begins(task, run.parent)} | kept
        found = veneer.evaluate(base, data, mixes, limit=2)
    for step, scores in found.items():
        yield f"| {step} | " + " | ".join(f"`{_line(answer)[:80]}`" for answer in scores.answers) + " |"


def _line(answer: str) -> str:
    """Return a completion as the text of a table cell."""
    return answer.replace("\n", "↵").replace("|", "¦")


if __name__ == "__main__":
    main()
