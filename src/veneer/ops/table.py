"""Every op with its implementations, as the page docs/reference/ops.md: `python -m veneer.ops.table > …`.

The page shows what the package has, on any machine; `veneer doctor --ops` shows what runs on one machine.
"""

from __future__ import annotations

from collections.abc import Mapping

from veneer.ops.dispatch import OPS, REFERENCE, RULES, Implementation, implementations

_HEAD = """# Ops and their implementations

<!-- written by `python -m veneer.ops.table`; a test holds it -->

What a step multiplies goes through an op. Each op has a reference in torch, which runs on anything. Some devices have
faster implementations, each for the input that it takes: the first that takes the input runs. Where the fastest one
depends on the machine or the dtype, a rule names it, from the **profile** of the machine: product rates by dtype and
the bandwidth of its memory, measured once in about two seconds and kept beside the compiled kernels
(`profile-….json`, named by the processor, its flags, the number of threads and torch's version). The same profile gives
the same bits.

`VENEER_OPS` overrides the choice: `torch` (references only) or `op=name` of the columns below (`rms_norm=torch`),
several separated by commas. `VENEER_PROFILE` names a profile's file to use instead of this machine's.
`veneer doctor --ops` shows the profile, and which implementation runs on this machine and why.
"""


def ops_page() -> str:
    """Return the page."""
    cpu, cuda = implementations("cpu"), implementations("cuda")
    lines = [_HEAD, "| op | computes | on a CPU | on CUDA | rule |", "| --- | --- | --- | --- | --- |"]
    for op, what in OPS.items():
        rule = RULES[op].why if op in RULES else ""
        lines.append(f"| `{op}` | {_plain(what)} | {_cell(cpu, op)} | {_cell(cuda, op)} | {rule} |")
    return "\n".join(lines) + "\n"


def _cell(own: Mapping[str, Implementation], op: str) -> str:
    """The implementations of an op in their order, and what each takes."""
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
