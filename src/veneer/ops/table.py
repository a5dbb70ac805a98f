"""Write docs/reference/ops.md, the reference page of all ops and their implementations.

    python -m veneer.ops.table > docs/reference/ops.md

The page lists the package's implementations for all machines; `veneer doctor --ops` shows the implementations
in use on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping

from veneer.ops.dispatch import OPS, RULES, Implementation, implementations
from veneer.ops.profile import WORTH

_HEAD = """# Ops and their implementations

<!-- written by `python -m veneer.ops.table` -->

The first implementation that supports the input runs; PyTorch runs everything else. `compiled` without a condition
needs contiguous bfloat16. If the faster choice depends on the processor, the machine's **profile** decides. It
contains GFLOP/s by dtype and shape, and the memory bandwidth. The profile is measured once, in under two seconds, and
stored with the compiled kernels. The next process measures it again if rounds differed by over 20% or other processes
ran. Equal profiles give equal bits. A checkpoint contains its machine's profile.

| to | use |
| --- | --- |
| see the profile | `veneer doctor` |
| see what runs, and why | `veneer doctor --ops` |
| measure the profile again | `veneer doctor --measure` |
| run PyTorch only | `VENEER_OPS=torch` |
| choose for some ops | `VENEER_OPS=rms_norm=torch,attend=torch` |
| use another profile | `VENEER_PROFILE=FILE` |
"""
_USUAL = "contiguous bfloat16"


def ops_page() -> str:
    """Return the page as Markdown."""
    cpu, cuda = implementations("cpu"), implementations("cuda")
    lines = [_HEAD, "| choice | rule, from the profile or the dtype |", "| --- | --- |"]
    lines += [
        "| products of 16-bit weights, and compiled kernels | "
        f"float32 if it is over {WORTH} times as fast as bfloat16, otherwise bfloat16 |",
        "| estimated time in `veneer plan` | the rate of the dtype that products run in, and the bandwidth |",
    ]
    lines += [f"| `{op}` | {_plain(rule.why)} |" for op, rule in RULES.items()]
    lines += ["", "| op | computes | CPU | CUDA |", "| --- | --- | --- | --- |"]
    for op, description in OPS.items():
        lines.append(f"| `{op}` | {_plain(description)} | {_cell(cpu, op)} | {_cell(cuda, op)} |")
    return "\n".join(lines) + "\n"


def _cell(implementations: Mapping[str, Implementation], op: str) -> str:
    """Return a table cell with an op's implementations and their supported inputs."""
    if op not in implementations:
        return ""
    names: dict[str, list[str]] = {}
    for implementation in (implementations[op], *implementations[op].alternatives):
        names.setdefault(implementation.wants, []).append(f"`{implementation.name}`")
    cells = [(", ".join(group), _plain(wants)) for wants, group in names.items()]
    return "; ".join(group if wants == _USUAL else f"{group}: {wants}" for group, wants in cells)


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(ops_page(), end="")
