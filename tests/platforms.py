"""Fakes another operating system in a process of its own.

    ran = run_as("win32", "import veneer; …")       a subprocess, in which Python looks like Python on Windows

The fakes take away what the system does not have (modules, functions, constants), and behave as the system does
where code could rely on Linux: Windows opens no folders, renames and deletes no open files, and writes files as
text unless O_BINARY is given. Other libraries are imported before, so only veneer's code sees the fakes.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import importlib
import io
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "veneer"
LINUX = {
    os: "sched_getaffinity sched_setaffinity memfd_create pidfd_open O_TMPFILE posix_fadvise copy_file_range",
    signal: "pidfd_send_signal",
    socket: "SO_PASSCRED SO_PEERCRED",
}
POSIX = {
    os: "fork forkpty fchmod fchown chown lchown pread pwrite preadv pwritev getuid geteuid getgid getegid getpgrp "
    "getpgid setpgid setsid killpg nice sysconf statvfs uname getloadavg mkfifo sched_yield register_at_fork waitid "
    "wait4 O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC",
    signal: "SIGKILL SIGSTOP SIGCONT SIGHUP SIGALRM SIGUSR1 SIGUSR2 SIGCHLD SIGPIPE SIGQUIT alarm setitimer "
    "pthread_kill pthread_sigmask sigwait",
    select: "poll epoll",
    socket: "AF_UNIX",
}
"""What only Linux has, and what Windows does not have either."""
POSIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "pty")
_BINARY = 1 << 27
"""The fake's O_BINARY, which Linux does not know."""


def run_as(platform: str, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that looks like `platform`: win32 or darwin."""
    paths = os.pathsep.join([str(PACKAGE.parent), str(ROOT)])
    settings = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **env}
    settings |= {"PATH": ""} if platform == "darwin" else {}  # Apple's clang has no OpenMP
    program = f"from tests.platforms import become\nbecome({platform!r})\n{code}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=settings, timeout=300)


def modules() -> list[str]:
    """Return the names of all modules of the package."""
    parts = [path.relative_to(PACKAGE.parent).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))]
    return [".".join(each).removesuffix(".__init__") for each in parts if each[-1] != "__main__"]


def become(platform: str) -> None:
    """Make this process look like `platform` to veneer. Call this before the first import of veneer."""
    assert not any(name.split(".")[0] == "veneer" for name in sys.modules)
    _import_others()
    windows = platform == "win32"
    changed: dict[ModuleType, dict[str, Any]] = {sys: {"platform": platform}, ctypes: {"CDLL": _library(windows)}}
    if windows:
        changed[os] = {"name": "nt", "O_BINARY": _BINARY, "open": _open_on_windows}
    for module in (os, signal, select, socket, sys, ctypes):
        absent = f"{LINUX.get(module, '')} {POSIX.get(module, '') if windows else ''}".split()
        sys.modules[module.__name__] = _Faked(module, absent, changed.get(module, {}))
    builtins.open = io.open = _without_proc(open)  # type: ignore[assignment]
    os.stat = _without_proc(os.stat)
    if windows:
        builtins.__import__ = _import_on_windows(builtins.__import__)
        for name in ("rename", "replace", "unlink", "remove", "mkdir"):
            setattr(os, name, _closed_only(name, getattr(os, name)))


class _Faked(ModuleType):
    """A module without some names, and with changed ones, for the modules that import it from now on."""

    def __init__(self, real: ModuleType, absent: list[str], changed: dict[str, Any]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(changed, _real=real, _absent=frozenset(absent))

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__["_absent"]:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self.__dict__["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_real"], name, value)


def _import_others() -> None:
    """Import every library that a module of the package names."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [node.module] if isinstance(node, ast.ImportFrom) else []
            named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in named:
                if name and name.split(".")[0] not in ("veneer", "vllm", "liger_kernel", "triton", "ray"):
                    with contextlib.suppress(ImportError):
                        importlib.import_module(name)


def _veneer_asks() -> bool:
    """Return whether veneer's own code makes this call; other libraries have other means on other systems."""
    frame = sys._getframe(2)
    while str(frame.f_globals.get("__name__")).partition(".")[0] in ("pathlib", "tests", "io", "genericpath", "shutil"):
        assert frame.f_back is not None
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).startswith("veneer")


def _without_proc(own: Any) -> Any:
    """Hide the files of Linux's kernel."""

    def call(path: Any, *more: Any, **options: Any) -> Any:
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(("/proc/", "/sys/")) and _veneer_asks():
            raise FileNotFoundError(2, "No such file or directory", os.fspath(path))
        return own(path, *more, **options)

    return call


def _library(windows: bool) -> type[ctypes.CDLL]:
    class Library(ctypes.CDLL):
        """A library of C, without what only glibc and Linux have."""

        def __init__(self, name: Any, *more: Any, **options: Any) -> None:
            if name is None and windows:
                raise TypeError("argument of type 'NoneType' is not iterable")  # as ctypes raises on Windows
            super().__init__(name, *more, **options)

        def __getattr__(self, name: str) -> Any:
            if name in ("malloc_trim", "mallopt", "prctl"):
                raise AttributeError(f"function {name!r} not found")
            return super().__getattr__(name)

    return Library


def _import_on_windows(own: Any) -> Any:
    def load(name: str, globals: Any = None, *more: Any, **options: Any) -> Any:
        if name in POSIX_MODULES and str((globals or {}).get("__name__")).startswith("veneer"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return own(name, globals, *more, **options)

    return load


def _open_on_windows(path: Any, flags: int, mode: int = 0o777) -> int:
    _check_name(path)
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", os.fspath(path))
    if flags & (os.O_WRONLY | os.O_RDWR) and not flags & _BINARY and str(path) != os.devnull:
        raise AssertionError(f"{path} is opened as text, which changes every line's end")
    return os.open(path, flags & ~_BINARY, mode)


def _closed_only(name: str, own: Any) -> Any:
    """Refuse to move or delete open files, to delete read-only files, to rename onto a file, and some names."""

    def change(path: Any, *more: Any, **options: Any) -> Any:
        if _veneer_asks() and not options.get("dir_fd"):
            _check_name(more[0] if name in ("rename", "replace") else path)
            used = {_link(fd) for fd in os.listdir("/proc/self/fd")}
            for each in (path, *more) if name != "mkdir" else ():
                if os.path.realpath(each) in used:
                    raise PermissionError(13, "The file is being used by another process", os.fspath(each))
            if name == "rename" and os.path.lexists(more[0]):
                raise FileExistsError(17, "The file already exists", os.fspath(more[0]))
            if name in ("unlink", "remove") and not os.lstat(path).st_mode & 0o200:
                raise PermissionError(13, "Access is denied", os.fspath(path))
        return own(path, *more, **options)

    return change


def _check_name(path: Any) -> None:
    if set(os.path.basename(path)) & set('<>:"|?*'):
        raise OSError(22, "The filename is incorrect", os.fspath(path))


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # the descriptor of the listing itself
        return ""
