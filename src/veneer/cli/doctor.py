"""`veneer doctor`: what this machine has for veneer, what runs on it and why, in about ten lines."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections import Counter
from typing import Annotated, Any

import typer


def command(
    quick: Annotated[bool, typer.Option("--quick", help="Without the two-second probe; nothing is measured.")] = False,
    measured: Annotated[bool, typer.Option("--measured", help="Every measurement, with what each took.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """The processor or card, what was compiled, which implementation of each op runs and why, and how far from its
    floor a short probe gets."""
    found = _findings(quick)
    print(json.dumps(found, indent=1) if as_json else "\n".join(_lines(found, measured)))


def _findings(quick: bool) -> dict[str, Any]:
    import torch

    from veneer import __version__
    from veneer.models.device import settle_threads
    from veneer.ops.choice import choices, measured_here
    from veneer.ops.cpu import compiled, sharing
    from veneer.ops.measuring import this_machine
    from veneer.ops.probe import probe_layer
    from veneer.serve.forward.graphs import graph_problem

    settle_threads()  # as training does: what is measured is kept by the number of threads
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    with sharing.shared() as neighbours:
        layer = None if quick else probe_layer(_dtype())
    return {
        "veneer": __version__,
        "torch": torch.__version__,
        "processor": this_machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cards": cards,
        "graphs": graph_problem() if cards else None,
        "compiled": compiled.status(),
        "neighbours": neighbours,
        "measured": {key: {"runs": one.runs, "ms": dict(one.ms)} for key, one in measured_here().items()},
        "ops": {
            device: {op: one._asdict() for op, one in choices(device).items()}
            for device in ("cpu", *(["cuda"] if cards else []))
        },
        "probe": None if layer is None else {
            "dtype": layer.dtype, "tokens": layer.tokens, "operations": layer.rate, "ms": 1e3 * layer.seconds,
            "floor_ms": 1e3 * layer.floor, "share": layer.share,
        },
    }  # fmt: skip


def _dtype() -> Any:
    """That in which a base would be trained on this processor."""
    import torch

    from veneer.models.device import choose_dtype

    return choose_dtype("auto", torch.device("cpu"), "BF16")[0]


_WIDEST, _INDENT = 100, 12


def _wrapped(line: str) -> str:
    """A line as wide as the terminal and no wider than is pleasant to read; it goes on below its text."""
    width = max(2 * _INDENT, min(_WIDEST, shutil.get_terminal_size().columns))
    return textwrap.fill(
        line, width, subsequent_indent=" " * _INDENT, break_long_words=False, break_on_hyphens=False
    )  # fmt: skip


def _lines(found: dict[str, Any], measured: bool) -> list[str]:
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    lines = [
        f"veneer      {found['veneer']}, torch {found['torch']}",
        f"processor   {found['processor']}; {threads}; torch's kernels for {found['instructions']}",
        f"card        {', '.join(found['cards']) or 'none that torch can use'}",
        f"compiled    {found['compiled']}",
    ]
    if (problem := found["graphs"]) is not None:
        lines.append(f"graphs      {f'decoding runs without: {problem}' if problem else 'decoding steps are recorded'}")
    for device, ops in found["ops"].items():
        groups: dict[str, list[str]] = {}
        for op, one in ops.items():
            groups.setdefault(_how(one["name"], one["reason"]), []).append(op)
        lines += [f"{f'ops {device}':<{_INDENT}}{how}: {', '.join(names)}" for how, names in sorted(groups.items())]
    lines += _measured(found["measured"], measured)
    if (probe := found["probe"]) is not None:
        busy = "; other processes were busy" if found["neighbours"] else ""
        lines.append(
            f"probe       a layer with adapters, {probe['tokens']:,} tokens of {probe['dtype']}: {probe['ms']:.0f} ms, "
            f"{probe['share']:.0%} of its floor of {probe['floor_ms']:.0f} ms at {probe['operations'] / 1e9:,.0f} "
            f"GFLOP/s{busy}"
        )
    return [_wrapped(line) for line in lines]


def _measured(found: dict[str, Any], each: bool) -> list[str]:
    """What measuring chose: of each op how often what, or `each` measurement with its times."""
    from veneer.ops.measuring import Measured

    if not found:
        return ["measured    nothing yet: the first run measures what it needs, and keeps it"]
    if each:
        return [f"measured    {key}: {Measured(one['runs'], one['ms']).line()}" for key, one in found.items()]
    counts: dict[str, Counter[str]] = {}
    for key, one in found.items():
        counts.setdefault(key.partition(" ")[0], Counter())[one["runs"]] += 1
    said = "; ".join(
        f"{op} {', '.join(f'{name} ({n})' for name, n in runs.most_common())}" for op, runs in sorted(counts.items())
    )
    return [f"measured    {said}; in as many classes of sizes: --measured shows each"]


def _how(name: str, reason: str) -> str:
    """What runs and why. `name`: of several that are measured, all."""
    *others, last = name.split(", ")
    if reason.startswith("measured") and others:
        return f"by the fastest of {', '.join(others)} and {last} (measured at first use)"
    return f"by {name} ({reason})"
