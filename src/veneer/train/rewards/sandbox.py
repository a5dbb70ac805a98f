"""A sandbox for Python code from clients: bubblewrap, a system call filter, and a limit on total memory.

    sandbox = bubblewrap(Path("child.py"))
    process = sandbox.start([sys.executable, "child.py"], channel, errors)

`limited` runs functions in a sandbox, and `limited.working_sandbox` tests the sandbox of this machine before
its first use. Inside the sandbox:

| what | how |
| --- | --- |
| files | system libraries and Python's packages, read-only; an empty 64 MiB /tmp in RAM; no /proc, no home |
| network | none: an empty network namespace, and `socket` is refused |
| processes | a separate process namespace: outside processes are invisible, and no process outlives the sandbox |
| user | not the server's (see `Sandbox.arguments`), with no capabilities and no way to gain any |
| kernel | the system calls in `_REFUSED` fail (attack surface, or memory that is charged to no process) |
| memory | `sandbox_memory` adds up all processes and files; `limited` ends a sandbox that exceeds its limit |
"""

from __future__ import annotations

import functools
import os
import platform
import secrets
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from veneer.errors import ResourceError
from veneer.models.home import veneer_home

_TMP = 64 << 20
"""Maximum bytes of files in the sandbox's /tmp."""
_INODE = 1 << 10
"""Approximate bytes of kernel memory for an empty file in /tmp."""
NOBODY = 65534
SANDBOX_VARIABLES = {
    "PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "PWD": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
}  # fmt: skip
"""The environment variables of a sandbox; it has no others."""
_USERS = range(61184, 65520)
"""User ids without accounts, which systemd reserves for temporary users."""
_FIX = (
    "install bubblewrap (apt install bubblewrap) and allow user namespaces, which most container runtimes forbid; "
    "or leave Python graders off"
)


def sandbox_error(reason: str) -> ResourceError:
    """Return the error for a machine where no sandbox works."""
    return ResourceError(f"Python from clients cannot run here: {reason}", where="the sandbox", fix=_FIX)


@dataclass(frozen=True)
class Sandbox:
    """A bubblewrap sandbox.

    command: bubblewrap's path. paths: visible paths, read-only. hidden: folders below `paths` that appear
    empty."""

    command: str
    paths: tuple[str, ...]
    hidden: tuple[str, ...] = ()

    def arguments(self) -> tuple[list[str], list[str]]:
        """Return the arguments of bubblewrap and of the child script.

        The child script uses its arguments to drop its remaining rights. If the server runs as root, no user
        namespace is needed, and each child switches to a random user id without an account. An ordinary user
        cannot switch users, so the sandbox is a user namespace with the user `nobody`. To the kernel, the
        sandbox then still belongs to the server's user, but the namespaces isolate it from the server."""
        if os.geteuid() == 0:
            user = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            inside = ["--user", str(secrets.choice(_USERS))]
        else:
            user, inside = ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY), "--cap-drop", "ALL"], []
        arguments = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try", *user]
        arguments += ["--die-with-parent", "--new-session", "--hostname", "sandbox"]
        arguments += ["--perms", "1777", "--size", str(_TMP), "--tmpfs", "/tmp", "--perms", "0755", "--dir", "/dev"]
        arguments += _mounts(self.paths, self.hidden)
        for device in ("null", "zero", "full", "random", "urandom"):
            arguments += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
        arguments += ["--symlink", "/tmp", "/dev/shm", "--remount-ro", "/", "--chdir", "/tmp"]
        return arguments, [*inside, "--confined"]

    def start(self, command: Sequence[str], channel: socket.socket, errors: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a command in a new sandbox with `channel` as standard input.

        bubblewrap writes its messages to `errors`. bubblewrap ends when the thread that started it ends, so
        all sandboxes are started by one thread that lives as long as this process."""
        outside, inside = self.arguments()
        filters = os.memfd_create("seccomp")
        try:
            os.write(filters, _syscall_filter())
            os.lseek(filters, 0, os.SEEK_SET)
            full = [self.command, *outside, "--seccomp", str(filters), "--", *command, *inside]
            options = {"env": SANDBOX_VARIABLES, "cwd": "/", "pass_fds": [filters]}
            return _starter(os.getpid()).submit(start_child, full, channel, errors, **options).result()
        finally:
            os.close(filters)


def start_child(
    command: Sequence[str], channel: socket.socket, errors: IO[bytes], **options: Any
) -> subprocess.Popen[bytes]:
    """Start a command in its own session, with `channel` as standard input and without standard output."""
    return subprocess.Popen(
        command, stdin=channel.fileno(), stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True, **options
    )


def bubblewrap(script: Path) -> Sandbox:
    """Return this machine's sandbox without testing it.

    script: file to make visible inside the sandbox.

    Raises ResourceError, with the reason, if this machine has no sandbox."""
    if sys.platform != "linux" or platform.machine() not in _MACHINES:
        raise sandbox_error(f"the sandbox needs Linux on {' or '.join(_MACHINES)}")
    command = shutil.which("bwrap")
    if command is None:
        raise sandbox_error("bubblewrap (bwrap) is not installed")
    paths = ["/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/local/lib", "/lib", "/lib32", "/lib64"]
    paths += ["/etc/ld.so.cache", str(Path(sys.executable).resolve().parent), sys.prefix, sys.base_prefix, str(script)]
    paths += [each for each in sys.path if Path(each).name in ("site-packages", "dist-packages")]
    visible = {os.path.abspath(path) for path in paths if os.path.exists(path)} - {"/usr", "/usr/local"}
    private = {os.path.expanduser("~"), str(veneer_home()), str(veneer_home().resolve())} - {"/"}
    folders = [each for each in private if os.path.isdir(each)]
    hidden = [each for each in folders if any(Path(each).is_relative_to(path) for path in visible)]
    if exposed := sorted(visible & private | visible & {"/"}):
        raise sandbox_error(f"Python is installed in {exposed[0]}, which also contains other files")
    return Sandbox(command, tuple(sorted(visible)), tuple(sorted(hidden)))


def _mounts(paths: Sequence[str], hidden: Sequence[str]) -> list[str]:
    """Return bubblewrap's arguments for the mounts.

    Outer folders come first, so that inner mounts are visible. Parent folders of mounts are created
    explicitly, because bubblewrap would make them readable by their owner only."""
    above = {str(folder) for path in paths for folder in Path(path).parents} - {"/", "/tmp"}
    arguments = [word for folder in sorted(above) for word in ("--perms", "0755", "--dir", folder)]
    for path in sorted({*paths, *hidden}, key=lambda each: (each.count("/"), each)):
        if path in hidden:
            arguments += ["--perms", "0555", "--size", "4096", "--tmpfs", path]
        elif os.path.islink(path) and path.count("/") == 1:  # such as /lib, on most systems a link to usr/lib
            arguments += ["--symlink", os.readlink(path), path]
        else:
            arguments += ["--ro-bind", path, path]
    return arguments


@functools.cache
def _starter(process: int) -> ThreadPoolExecutor:
    """Return the thread that starts sandboxes.

    process: id of this process. A forked process inherits no threads and has another id, so it creates its
    own thread."""
    return ThreadPoolExecutor(1, "sandbox")


# -- the processes and memory of a sandbox -----------------------------------------------------------------------------


def descendants(process: int) -> list[int]:
    """Return the ids of all descendants of a process, parents first.

    In a sandbox, no process can leave this list: if the parent of a process ends, the process becomes a child
    of the sandbox's init."""
    processes: list[int] = []
    waiting = [process]
    while waiting:
        parent = waiting.pop(0)
        try:
            threads = os.listdir(f"/proc/{parent}/task")
            children = " ".join(Path(f"/proc/{parent}/task/{thread}/children").read_text() for thread in threads)
        except OSError:  # the process has already ended
            continue
        waiting += [int(child) for child in children.split()]
        processes += [int(child) for child in children.split()]
    return processes


def sandbox_memory(processes: Sequence[int], inside: int) -> int:
    """Return the bytes that a sandbox uses.

    The total includes the private and shared memory of its processes, in RAM or swapped, their page tables,
    and the files in the sandbox's /tmp. A page that a forked process shares with its parent counts twice.

    inside: id of a process that sees the sandbox's files."""
    total = 0
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.partition(":")[0] in _HELD)
    try:
        files = os.statvfs(f"/proc/{inside}/root/tmp")
    except OSError:
        return total
    return total + (files.f_blocks - files.f_bfree) * files.f_frsize + (files.f_files - files.f_ffree) * _INODE


_HELD = frozenset({"RssAnon", "RssShmem", "VmSwap", "VmPTE", "HugetlbPages"})


# -- the system call filter --------------------------------------------------------------------------------------------

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""Machine -> architecture number in the kernel's audit interface (linux/audit.h)."""
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_NAMESPACES = 0x7E020000
"""Flags of clone that create namespaces (linux/sched.h).

They are NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET."""
# fmt: off
_REFUSED = {  # name: (x86_64, aarch64); -1: the architecture has no such system call
    # access to other processes and their descriptors
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # memory that belongs neither to a process nor to a file in /tmp
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180), "vmsplice": (278, 75),
    # network: some socket families ignore namespaces (vsock), others are attack surface (netlink, alg)
    "socket": (41, 198), "setsockopt": (54, 208),  # setsockopt could enlarge the buffers of socket pairs
    # other parts of the kernel that no grader needs
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "kexec_load": (246, 104),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "quotactl": (179, 60),
    "syslog": (103, 116), "acct": (163, 89), "personality": (135, 92), "modify_ldt": (154, -1),
    "fanotify_init": (300, 262),
}
# fmt: on
_EPERM, _ENOSYS = 1, 38
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""Classic BPF instructions (linux/bpf_common.h).

They load a word of the system call's data into register A, jump depending on A, and return the result."""


def _syscall_filter() -> bytes:
    """Return the filter in the format of `bwrap --seccomp`.

    An instruction has 8 bytes (code: u16, jumps if true and if false: u8 each, operand: u32). The filter's
    input (struct seccomp_data) has the system call number at offset 0, the architecture at offset 4, and the
    low half of the first argument at offset 16."""
    machine = platform.machine()
    column = list(_MACHINES).index(machine)

    def instruction(code: int, operand: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("<HBBI", code, true, false, operand)

    program = instruction(_LOAD, 4) + instruction(_EQUAL, _MACHINES[machine], 1, 0) + instruction(_RETURN, _KILL)
    program += instruction(_LOAD, 0)
    if machine == "x86_64":  # refuse the x32 ABI, which has other numbers for the same calls
        program += instruction(_AT_LEAST, 0x40000000, 0, 1) + instruction(_RETURN, _ERROR | _ENOSYS)
    for numbers in _REFUSED.values():
        if numbers[column] >= 0:
            program += instruction(_EQUAL, numbers[column], 0, 1) + instruction(_RETURN, _ERROR | _EPERM)
    # The filter cannot read the flags of clone3; libc falls back to clone.
    program += instruction(_EQUAL, _CLONE3, 0, 1) + instruction(_RETURN, _ERROR | _ENOSYS)
    program += instruction(_EQUAL, _CLONE[machine], 0, 3)
    program += instruction(_LOAD, 16) + instruction(_ANY_BIT, _NAMESPACES, 0, 1) + instruction(_RETURN, _ERROR | _EPERM)
    return program + instruction(_RETURN, _ALLOW)
