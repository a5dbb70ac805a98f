"""`veneer doctor`: check this machine and show which implementation each op uses."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from veneer.ops.profile import Profile

app = typer.Typer(add_completion=False)


@app.command("doctor", epilog="Example: veneer doctor --ops")
def command(
    ops: Annotated[bool, typer.Option("--ops", help="Also show which implementation of each op runs.")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine's profile again.")] = False,
    install_vllm: Annotated[
        bool, typer.Option("--install-vllm", help="Install vLLM in a separate environment, for veneer serve.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check the home folder, disk, compiler, extras and Hub, and show this machine's profile.

    The profile holds the processor's FLOP/s by dtype and shape, and its memory bandwidth. With --ops: also show
    which implementation of each op runs and why. The exit code is 1 if there is a problem, otherwise 0."""
    from veneer.models.device import limit_threads
    from veneer.ops.profile import profile, renew

    if install_vllm:
        from veneer.cli.output import say
        from veneer.serve import engines

        say(f"veneer serve now finds vLLM at {engines.install_vllm(say)}")
        return
    limit_threads()  # use the same number of threads as training, because the profile depends on it
    found = renew() if measure else profile()
    checks = list(_checks())
    bad = [check for check in checks if check.ok is False]
    report: dict[str, Any] = {"checks": [asdict(check) for check in checks], "profile": asdict(found)}
    lines = [*_check_lines(checks, bad), "", *_profile_lines(found)]
    if ops:
        report |= _ops_report()
        lines += ["", *_ops_lines(report)]
    print(json.dumps({"well": not bad, **report}, indent=1) if as_json else "\n".join(lines))
    raise SystemExit(1 if bad else 0)


@dataclass(frozen=True)
class _Check:
    """The result of one check.

    ok: None for a check that only gives information.
    fix: how to solve the problem; "" without a problem."""

    name: str
    ok: bool | None
    text: str
    fix: str = ""


_FOR_DEVELOPERS = {"dev", "browser", "peers", "drawings", "cpu", "cu13"}
_LEAST_DISK = 2e9


def _checks() -> Iterator[_Check]:
    from veneer.errors import gigabytes
    from veneer.files.locks import POSIX
    from veneer.models.home import veneer_home
    from veneer.ops.cpu import compiled

    home = veneer_home()
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    writable = there.is_dir() and os.access(there, os.W_OK)
    fix = "" if writable else "make it writable, or set VENEER_HOME to another folder"
    yield _Check("home", writable, f"{home}{'' if home.exists() else ', created when first needed'}", fix)
    free = shutil.disk_usage(there).free
    fix = "" if free >= _LEAST_DISK else "a base and its runs need a few GB: free some disk space, or set VENEER_HOME"
    yield _Check("disk", free >= _LEAST_DISK, f"{gigabytes(free)} free", fix)
    compiled_kernels = compiled.kernels() is not None
    fix = "without a compiler, training on the CPU is several times slower: apt install gcc, or a clang with OpenMP"
    here = compiled_kernels if POSIX else None  # Windows has none to install
    yield _Check("compiler", here, compiled.status(), fix if here is False else "")
    yield _Check("card", None, ", ".join(_cards()) or "none that torch can use; veneer uses the CPU")
    yield _extras()
    yield _hub()


def _cards() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _extras() -> _Check:
    """Report which extras have all their packages installed."""
    from veneer.errors import install_command

    try:
        package = metadata.metadata("veneer")
    except metadata.PackageNotFoundError:
        return _Check("extras", None, "unknown: veneer was not installed as a package")
    requirements = metadata.requires("veneer") or []
    here, missing = list[str](), list[str]()
    for extra in {*(package.get_all("Provides-Extra") or [])} - _FOR_DEVELOPERS:
        lines = [line for line in requirements if f"extra == '{extra}'" in line.replace('"', "'")]
        names = [re.split(r"[^\w.-]", line)[0] for line in lines if not line.startswith("veneer[")]
        (here if all(map(_installed, names)) else missing).append(extra)
    text = f"installed: {', '.join(sorted(here)) or 'none'}"
    text += f"; missing: {', '.join(sorted(missing))} ({install_command('NAME')})" if missing else ""
    return _Check("extras", None, text)


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _hub() -> _Check:
    """Report whether the Hub can be reached within two seconds.

    An unreachable Hub is not a problem, because built-in and cached bases work without it."""
    if util.find_spec("huggingface_hub") is None:
        return _Check("hub", None, "huggingface_hub is not installed")
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _Check("hub", None, "not checked: HF_HUB_OFFLINE is set")
    endpoint = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((endpoint.hostname or "", endpoint.port or 443), timeout=2):
            return _Check("hub", True, f"{constants.ENDPOINT} is reachable")
    except OSError as error:
        text = f"{constants.ENDPOINT} is unreachable ({error.strerror or error}); built-in bases and folders work"
        return _Check("hub", None, text)


def _check_lines(checks: list[_Check], bad: list[_Check]) -> list[str]:
    from veneer.errors import counted

    lines = ["no problems found" if not bad else f"{counted(len(bad), 'problem')}: {', '.join(c.name for c in bad)}"]
    for check in checks:
        mark = "PROBLEM " if check.ok is False else ""
        lines.append(f"{check.name:<{_INDENT}}{mark}{check.text}{f'; {check.fix}' if check.fix else ''}")
    return [_wrapped(line) for line in lines]


def _profile_lines(profile: Profile) -> list[str]:
    """Return the profile as a table of GFLOP/s, dtypes by shapes."""
    from veneer.errors import counted
    from veneer.ops.profile import IDLE

    text = f"profile     measured {profile.date[:10]} with {counted(profile.threads, 'thread')}: memory is read at "
    text += f"{profile.bandwidth:,.0f} GB/s; bfloat16 weights are multiplied in {profile.arithmetic}"
    if profile.share < IDLE:
        text += f"; other processes used {1 - profile.share:.0%} of the processors, so the rates can be too low"
    if profile.provisional:
        text += f"; rounds differ by {profile.spread:.0%}; the next command that needs the profile measures it again"
    shapes = list(dict.fromkeys(shape for rates in profile.gflops.values() for shape in rates))
    rows = [("GFLOP/s", [f"{shape.split('x')[0]} rows" for shape in shapes])]
    for dtype, rates in profile.gflops.items():
        rows.append((dtype, [f"{rates[shape]:,.0f}" if shape in rates else "–" for shape in shapes]))
    indent = " " * _INDENT
    return [_wrapped(text), *(f"{indent}{name:<9}{''.join(f'{cell:>16}' for cell in row)}" for name, row in rows)]


def _ops_report() -> dict[str, Any]:
    import torch

    from veneer import __version__
    from veneer.ops.cpu import compiled
    from veneer.ops.dispatch import choices
    from veneer.ops.profile import processor_name

    cards = _cards()
    return {
        "veneer": __version__,
        "torch": torch.__version__,
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cards": cards,
        "compiled": compiled.status(),
        "ops": {
            device: {op: choice._asdict() for op, choice in choices(device).items()}
            for device in ("cpu", *(["cuda"] if cards else []))
        },
    }


_WIDEST, _INDENT = 100, 12


def _wrapped(line: str) -> str:
    """Wrap a line at the terminal's width (at most _WIDEST), with a hanging indent."""
    width = max(2 * _INDENT, min(_WIDEST, shutil.get_terminal_size().columns))
    return textwrap.fill(line, width, subsequent_indent=" " * _INDENT, break_long_words=False, break_on_hyphens=False)


def _ops_lines(report: dict[str, Any]) -> list[str]:
    from veneer.errors import counted

    threads = counted(report["threads"], "thread")
    lines = [
        f"veneer      {report['veneer']}, torch {report['torch']}",
        f"processor   {report['processor']}; {threads}; torch's kernels for {report['instructions']}",
    ]
    for device, ops in report["ops"].items():
        groups: dict[str, list[str]] = {}
        for op, choice in ops.items():
            groups.setdefault(f"by {choice['name']} ({choice['reason']})", []).append(op)
        lines += [f"{f'ops {device}':<{_INDENT}}{how}: {', '.join(names)}" for how, names in sorted(groups.items())]
    return [_wrapped(line) for line in lines]
