"""Build, test and load the compiled kernels.

The kernels are built once per processor and compiler, tested once, and loaded only from a folder that no
other user can write to.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from veneer.files.atomic import replace_file

_BUILD_SECONDS = 300
"""Timeout in seconds of the compiler, of the self-test, and of waiting for another process that builds."""
_MARCH = f"-march={os.environ.get('VENEER_MARCH', 'native')}"
"""Option for the processor to compile for. VENEER_MARCH selects an older processor, to imitate it."""
_FLAGS = ["-O3", _MARCH, "-fopenmp", "-shared", "-fPIC", "-std=c11", "-fno-math-errno", "-fno-trapping-math"]
"""Compiler flags, without -ffast-math.

NaN and infinity must keep their meaning, because training uses them to detect a diverged run."""


class BuiltKernels:
    """A compiled kernel library.

    library: path of the file.
    rejected: kernel -> the reason why it must not be used.
    notes: messages for the user."""

    def __init__(self, library: Path, rejected: dict[str, str], notes: list[str]) -> None:
        self.library, self.rejected, self.notes = library, rejected, notes


def build_kernels(
    compiler: str, sources: Sequence[Path], headers: Sequence[Path], more: Sequence[str] = ()
) -> BuiltKernels:
    """Compile and test the kernels, unless a build for this machine already exists.

    more: additional compiler arguments. Raises OSError or subprocess.SubprocessError if the kernels cannot be
    built, or if there is no trusted folder for them."""
    texts = [path.read_text() for path in (*sources, *headers, Path(__file__).parent / "selftest.py")]
    # A limit on oneDNN's instructions can change the self-test's results, so it has a record of its own.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    key = hashlib.sha256("\0".join([*texts, *machine_of(compiler), *_FLAGS, *more, limit]).encode()).hexdigest()[:16]
    notes: list[str] = []
    folder = trusted_folder(notes)
    library = folder / f"native-{key}.so"
    record = folder / f"native-{key}-{torch.__version__}.json"  # some kernels depend on libtorch
    for path in (library, record):
        if path.exists() and (why := distrust_reason(path)):
            notes.append(f"{path.name} was built again: {why}")
            library.unlink(missing_ok=True)
            record.unlink(missing_ok=True)
    wrong = _read_record(record) if library.exists() else None
    if wrong is None:
        with _lock(library):  # if several processes start at once, only one builds
            if not library.exists():
                record.unlink(missing_ok=True)
                print("veneer: compiling kernels for this processor (once, about 10 s)", file=sys.stderr, flush=True)
                compile_kernels(compiler, sources, library, more)
            wrong = _read_record(record)
            if wrong is None:
                wrong = failed_kernels(library)
                replace_file(record, [json.dumps(wrong).encode()], mode=0o600)
    return BuiltKernels(library, wrong, notes)


@contextmanager
def _lock(library: Path) -> Iterator[None]:
    """Hold the lock of a library that is being built.

    Continues without the lock after a timeout, or if the file system does not support locks."""
    from filelock import FileLock, Timeout

    with ExitStack() as stack:
        with suppress(Timeout, NotImplementedError):
            stack.enter_context(FileLock(f"{library}.lock", timeout=_BUILD_SECONDS, mode=0o600))
        yield


def _read_record(record: Path) -> dict[str, str] | None:
    """Return kernel -> reason for the kernels that an earlier process rejected.

    Returns None if the record is missing or invalid; all kernels must then be tested again."""
    try:
        wrong = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    except (ValueError, RecursionError):
        return None
    is_valid = isinstance(wrong, dict) and all(isinstance(why, str) for why in wrong.values())
    return wrong if is_valid else None


def trusted_folder(notes: list[str]) -> Path:
    """Return the first build folder that no other user can write to.

    Reasons for rejecting a folder are added to `notes`. Raises OSError if every folder is rejected."""
    for folder in _folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            notes.append(f"{folder} cannot be used ({error.strerror})")
            continue
        if not (why := distrust_reason(folder)):
            return folder
        notes.append(f"{folder} is not used: {why}")
    raise OSError("; ".join(["there is no folder for the kernels that only you can write to", *notes]))


def distrust_reason(path: Path) -> str:
    """Return why `path` is not safe, or "" if only this user and root can write to it.

    Follows links. The check is needed because a loaded library runs with all permissions of this process."""
    if not hasattr(os, "geteuid"):  # On Windows, only the user can write to the folders of the user's profile.
        return ""
    status = path.stat()
    if status.st_uid not in (0, os.geteuid()):
        return "it belongs to another user"
    return "other users can write to it" if status.st_mode & 0o022 else ""


def find_compiler(variable: str, names: Sequence[str]) -> tuple[str | None, str]:
    """Return the first compiler found on the path (or None), and a note for the user.

    variable: an environment variable that takes precedence over `names`."""
    requested = os.environ.get(variable, "")
    compiler = next((c for c in (requested, *names) if c and shutil.which(c)), None)
    return compiler, f"{variable}={requested} is not on the path" if requested and compiler != requested else ""


def why_not_compiled(compiler: str, error: Exception) -> str:
    """Return a one-line reason for a failed build.

    The line contains the exit code and the compiler's last lines of output, but not the compiler command,
    which is very long."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{compiler} was stopped after {error.timeout:.0f} s"
    if not isinstance(error, subprocess.CalledProcessError):
        return " ".join(str(error).split()) or repr(error)
    printed = [line.strip()[:_WIDE] for line in str(error.stderr or error.stdout or "").splitlines() if line.strip()]
    message = f"its last output: {' | '.join(printed[-_LAST:])}" if printed else "it printed nothing"
    return f"{compiler} ended with exit code {error.returncode}; {message}"


_LAST, _WIDE = 3, 200
"""Number of lines of compiler output to report, and maximum characters per line."""


def compile_kernels(compiler: str, sources: Sequence[Path], target: Path, more: Sequence[str] = ()) -> None:
    """Compile `sources` in parallel, link them to `target`, and replace `target` atomically.

    more: additional compiler arguments."""
    flags = [compiler, *_FLAGS, *more]
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, ThreadPoolExecutor(len(sources)) as pool:
        built, objects = Path(scratch) / target.name, [str(Path(scratch) / f"{source.stem}.o") for source in sources]

        def run(arguments: Sequence[str], result: str) -> None:
            command = [*flags, *arguments, "-o", result]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=_BUILD_SECONDS)

        list(pool.map(run, (["-c", str(source)] for source in sources), objects))
        run([*objects, "-lm"], str(built))
        built.chmod(0o700)  # Set the mode explicitly, so that it does not depend on the umask.
        built.replace(target)


def failed_kernels(library: Path) -> dict[str, str]:
    """Return kernel -> reason for each kernel that fails its self-test.

    The kernels are tested in a subprocess. If a kernel crashes the subprocess, a new subprocess tests the
    remaining kernels. Raises OSError if no kernel could be tested."""
    wrong: dict[str, str] = {}
    code = "import sys; from veneer.ops.cpu.selftest import run_checks; run_checks(sys.argv[1:])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "VENEER_NATIVE": "0"}
    while True:
        command = [sys.executable, "-c", code, str(library), *wrong]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_BUILD_SECONDS)
        records = [json.loads(line) for line in done.stdout.splitlines()]
        wrong |= {name: line["wrong"] for line in records if line.get("wrong") for name in line["ended"]}
        if done.returncode == 0:
            return wrong
        if not records or "begins" not in records[-1]:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise OSError(f"they could not be tested: {last}")
        wrong |= dict.fromkeys(records[-1]["begins"], f"crashes its process ({done.returncode})")


def _folders() -> list[Path]:
    home = Path(os.environ.get("VENEER_HOME") or Path.home() / ".veneer")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [home / "kernels", cache / "veneer" / "kernels"]


def machine_of(compiler: str) -> list[str]:
    """Return everything that determines which instructions the compiler generates.

    Includes the compiler's resolution of -march and the processor's feature lists (one list per kind
    of core)."""
    resolve = [compiler, _MARCH]
    macros = subprocess.run(
        [*resolve, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    options = subprocess.run([*resolve, "-Q", "--help=target"], capture_output=True, text=True, timeout=60).stdout
    return [platform.machine(), macros, options, *processor_features()]


def processor_features() -> list[str]:
    """Return the distinct lines of /proc/cpuinfo that list instruction sets.

    Supports x86, ARM and RISC-V. Different kinds of cores have different lines. Outside Linux, the list is
    empty."""
    features = ("flags", "features", "isa", "cpu implementer", "cpu part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    except OSError:
        lines = []
    return sorted({line for line in lines if line.partition(":")[0].strip().lower() in features})
