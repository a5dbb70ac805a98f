"""The compiled kernels on disk: built once for a processor and a compiler, tried once, and loaded only from a folder
that nobody else can write to."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from veneer.files.atomic import replace_file

_FLAGS = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c11", "-fno-math-errno", "-fno-trapping-math"]
"""No -ffast-math: NaN and infinity keep their meaning, which the loop relies on to stop a diverged run."""


class BuiltKernels:
    """`library`: the file. `wrong`: of each kernel that is not to be used, why. `notes`: what a person should know."""

    def __init__(self, library: Path, wrong: dict[str, str], notes: list[str]) -> None:
        self.library, self.wrong, self.notes = library, wrong, notes


def build_kernels(compiler: str, sources: Sequence[Path], headers: Sequence[Path]) -> BuiltKernels:
    """The kernels, compiled and tried unless they have been. Raises OSError or subprocess.SubprocessError where they
    cannot be, or where there is no folder to trust."""
    texts = [path.read_text() for path in (*sources, *headers, Path(__file__).parent / "selftest.py")]
    key = hashlib.sha256("\0".join([*texts, *machine_of(compiler), *_FLAGS]).encode()).hexdigest()[:16]
    notes: list[str] = []
    folder = trusted_folder(notes)
    library = folder / f"native-{key}.so"
    record = folder / f"native-{key}-{torch.__version__}.json"  # some call libtorch
    for path in (library, record):
        if path.exists() and (why := distrusted(path)):
            notes.append(f"{path.name} was made anew: {why}")
            library.unlink(missing_ok=True)
            record.unlink(missing_ok=True)
    if not library.exists():
        record.unlink(missing_ok=True)
        compile_kernels(compiler, sources, library)
    wrong = _recorded(record)
    if wrong is None:
        wrong = left_out(library)
        replace_file(record, [json.dumps(wrong).encode()], mode=0o600)
    return BuiltKernels(library, wrong, notes)


def _recorded(record: Path) -> dict[str, str] | None:
    """What an earlier process left out; None where there is no whole record, so that all are tried again."""
    try:
        wrong = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    except (ValueError, RecursionError):
        return None
    whole = isinstance(wrong, dict) and all(isinstance(why, str) for why in wrong.values())
    return wrong if whole else None


def trusted_folder(notes: list[str]) -> Path:
    """The first folder for what is compiled that nobody else can write to; `notes` is told of those before it. Raises
    OSError where there is none."""
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            notes.append(f"{folder} cannot be used ({error.strerror})")
            continue
        if not (why := distrusted(folder)):
            return folder
        notes.append(f"{folder} is not used: {why}")
    raise OSError("; ".join(["there is no folder to keep them in that only you can write to", *notes]))


def distrusted(path: Path) -> str:
    """Why what lies there, or behind that link, may be another's work; "" where only we and root could have written it.
    What is loaded runs with all our rights."""
    if not hasattr(os, "geteuid"):  # Windows, where a profile's folders are its owner's
        return ""
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()):
        return "it belongs to another user"
    return "others may write to it" if found.st_mode & 0o022 else ""


def find_compiler(variable: str, names: Sequence[str]) -> tuple[str | None, str]:
    """(the first compiler on the path, what a person should know of it). `variable`: of the environment, which goes
    before `names`."""
    own = os.environ.get(variable, "")
    found = next((c for c in (own, *names) if c and shutil.which(c)), None)
    return found, f"{variable}={own} is not on the path" if own and found != own else ""


def why_not_compiled(compiler: str, error: Exception) -> str:
    """In a line: how the compiler ended, and the last lines that it printed. The command itself is pages long."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{compiler} was stopped after {error.timeout:.0f} s"
    if not isinstance(error, subprocess.CalledProcessError):
        return " ".join(str(error).split()) or repr(error)
    printed = [line.strip()[:_WIDE] for line in str(error.stderr or error.stdout or "").splitlines() if line.strip()]
    said = f"its last words: {' | '.join(printed[-_LAST:])}" if printed else "it printed nothing"
    return f"{compiler} ended with exit code {error.returncode}; {said}"


_LAST, _WIDE = 3, 200
"""Lines of a compiler that are told, and characters of each."""


def compile_kernels(compiler: str, sources: Sequence[Path], target: Path, more: Sequence[str] = ()) -> None:
    """Compile to `target`, which appears whole or not at all. `more`: further arguments."""
    compile_library([compiler, *_FLAGS, *more], sources, target, ["-lm"])


def compile_library(command: Sequence[str], sources: Sequence[Path], target: Path, links: Sequence[str]) -> None:
    """Compile to `target`, which appears whole or not at all. `command`: the compiler and its flags."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        subprocess.run(
            [*command, *map(str, sources), "-o", str(made), *links],
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        made.chmod(0o700)  # whatever the umask
        made.replace(target)


def left_out(library: Path) -> dict[str, str]:
    """Kernels that do not do here what their formulas say, each with the reason. A process tries them, and a kernel
    that ends it is left out of the next. Raises OSError where none could be tried."""
    wrong: dict[str, str] = {}
    code = "import sys; from veneer.ops.cpu.selftest import run_checks; run_checks(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "VENEER_NATIVE": "0"}
    while True:
        command = [sys.executable, "-c", code, str(library), *wrong]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        said = [json.loads(line) for line in done.stdout.splitlines()]
        wrong |= {name: line["wrong"] for line in said if line.get("wrong") for name in line["ended"]}
        if done.returncode == 0:
            return wrong
        if not said or "begins" not in said[-1]:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise OSError(f"they could not be tried: {last}")
        wrong |= dict.fromkeys(said[-1]["begins"], f"ends its process ({done.returncode})")


def _folders() -> list[Path]:
    home = Path(os.environ.get("VENEER_HOME") or Path.home() / ".veneer")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [home / "kernels", cache / "veneer" / "kernels"]


def machine_of(compiler: str) -> list[str]:
    """What decides which instructions are made: what the compiler itself takes -march=native for, and the processor's
    own list. On one with unlike cores, the lists of all of them."""
    resolve = [compiler, "-march=native"]
    macros = subprocess.run(
        [*resolve, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    options = subprocess.run([*resolve, "-Q", "--help=target"], capture_output=True, text=True, timeout=60).stdout
    return [platform.machine(), macros, options, *processor_features()]


def processor_features() -> list[str]:
    """The lines of /proc/cpuinfo that list the processor's instructions (x86, ARM and RISC-V); of all unlike cores."""
    features = ("flags", "features", "isa", "cpu implementer", "cpu part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    except OSError:
        lines = []
    return sorted({line for line in lines if line.partition(":")[0].strip().lower() in features})
