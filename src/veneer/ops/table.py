"""Every op with its implementations, as the page docs/reference/ops.md: `python -m veneer.ops.table > …`.

What is on the page is what the registry has, on any machine; what runs on one is for `veneer doctor` to say.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from veneer.ops.choice import HOMES, OPS, REFERENCE, Implementation, trial_of

_HEAD = """# Ops and their implementations

<!-- written by `python -m veneer.ops.table`; a test holds it -->

What a step multiplies goes through an op. Each has a reference in torch, which runs on anything, and on some devices
implementations of its own, each for what it takes. Which one runs:

- the reference, where no other takes what the op was given;
- the first in the list that takes it, where the op is not measured;
- where it is, on a CPU, the first as well, unless another (the reference among them) was clearly faster here: more than
  1.1 times (`frozen_product`, `weight_order`: 1.3), in a few milliseconds at first use, for a class of shapes, a dtype
  and a number of threads. It is kept beside the compiled kernels and measured once. A run's checkpoint holds what ran,
  and a resumed run goes on with that; serving measures two (`packed_product`, `weight_order`) as it lays weights out.

`VENEER_OPS` decides instead: `listed` (nothing is measured), `torch` (references alone), `op=name` of the columns below
(`rms_norm=torch`), several separated by commas. `veneer doctor --ops` shows which implementation runs on this machine,
and why; a run reports its implementations at its end, and `veneer plan --calibrate` after measuring.
"""


def ops_page() -> str:
    """The page."""
    homes = {device: importlib.import_module(home).IMPLEMENTATIONS for device, home in HOMES.items()}
    lines = [_HEAD, "| op | computes | on a CPU | on CUDA | measured on a CPU |", "| --- | --- | --- | --- | --- |"]
    for op, what in OPS.items():
        cells = [_cell(homes[device], op) for device in ("cpu", "cuda")]
        tried = "" if trial_of(op) is None else "yes"
        lines.append(f"| `{op}` | {_plain(what)} | {cells[0]} | {cells[1]} | {tried} |")
    return "\n".join(lines) + "\n"


def _cell(own: Mapping[str, Implementation], op: str) -> str:
    """Its implementations in the order in which they are tried, and what each takes."""
    if op not in own:
        return f"`{REFERENCE}`"
    names: dict[str, list[str]] = {}
    for one in (own[op], *own[op].others):
        names.setdefault(one.wants, []).append(f"`{one.name}`")
    taken = [f"{', '.join(of)}: {_plain(wants)}" for wants, of in names.items()]
    return "; ".join([*taken, f"`{REFERENCE}`: all else"])


def _plain(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(ops_page(), end="")
