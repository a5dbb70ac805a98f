"""Python code from clients: what a hostile grader can reach, and the errors if no sandbox works."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.sandboxes import sandbox_or_skip
from veneer.cli import worker
from veneer.errors import ConfigError, ResourceError
from veneer.files import rights
from veneer.jobs import process
from veneer.serve import server
from veneer.serve.settings import ServeSettings
from veneer.train.config.rewards import GraderReward
from veneer.train.rewards import sandbox as sandboxes
from veneer.train.rewards.build import build_rewards
from veneer.train.rewards.limited import LimitedFunction, working_sandbox
from veneer.train.rewards.reward import Answer, RewardScore
from veneer.train.rewards.sandbox import Sandbox

linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
ATTACKS = """
import ctypes, mmap, os, resource, signal, socket, struct, subprocess, sys, tempfile, time, json

libc = ctypes.CDLL(None, use_errno=True)

def works(do, *given):
    try:
        return do(*given) is not None or True
    except (OSError, ValueError):
        return False

def forked(do):
    if os.fork() == 0:
        try:
            do()
        finally:
            os._exit(0)

def score(sample, item):
    return globals()[sample["attack"]](item)

def well(item):
    return item.get("n", 1)

def reads(item):
    return sum(works(lambda path=path: open(path, "rb").read(1)) for path in item["paths"])

def variables(item):
    return sum(key not in item["known"] for key in os.environ)

def proc(item):
    return os.path.exists("/proc/self") + os.path.exists(f"/proc/{os.getppid()}/environ")

def listed(item):
    return sum(os.path.lexists(path) for path in item["paths"])

def linked(item):
    os.symlink(item["paths"][0], "/tmp/link")
    return works(lambda: open("/tmp/link").read())

def connects(item):
    families = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, 16, 38, 40)  # netlink, the kernel's ciphers, vsock
    made = [family for family in families if works(socket.socket, family)]
    return len(made) + works(socket.create_connection, ("127.0.0.1", item["port"]))

def user(item):
    return os.getuid()

def gains(item):
    done = [os.setuid, os.setgid]
    return sum(works(do, 0) for do in done) + (libc.unshare(0x10000000) == 0) + (libc.unshare(0x40000000) == 0)

def namespaces(item):
    return sum(
        libc.syscall(number, *arguments) >= 0
        for number, arguments in ((56, (0x10000011, 0, 0, 0, 0)), (435, (0, 0)), (101, (16, 1, 0, 0)), (165, (0,) * 5))
    )

def hidden_memory(item):
    calls = ((319, (b"x", 0)), (29, (0, 4096, 0o1600)))  # memfd_create, shmget
    return sum(libc.syscall(number, *arguments) >= 0 for number, arguments in calls)

def writes(item):
    places = ("/", "/usr/lib", "/dev", os.path.dirname(os.__file__), os.path.dirname(sys.executable))
    return sum(works(lambda place=place: os.mkdir(place + "/mine")) for place in places)

def kills(item):
    return sum(works(os.kill, process, signal.SIGKILL) for process in item["processes"])

def stops_the_init(item):
    os.kill(1, signal.SIGKILL)
    return 1

def raises_limits(item):
    most = resource.RLIM_INFINITY
    return sum(
        works(resource.setrlimit, each, (most, most))
        for each in (resource.RLIMIT_DATA, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE)
    )

def bomb(item):
    count = 0
    while count < 10_000:
        try:
            if os.fork() == 0:
                time.sleep(60)
        except OSError:
            break
        count += 1
    return count

def outlives(item):
    def away():
        os.setsid()
        if os.fork() == 0:
            libc.prctl(15, item["called"].encode())  # PR_SET_NAME
            time.sleep(600)
    forked(away)
    os.wait()
    return 1

def together(item):
    for _ in range(3):
        forked(lambda: (bytearray(40_000_000), time.sleep(30)))
    time.sleep(30)

def shared(item):
    kept = mmap.mmap(-1, 150_000_000)
    for at in range(0, len(kept), 4096):
        kept[at] = 1
    time.sleep(30)

def files(item):
    for n in range(1_000_000):
        os.close(os.open(f"/tmp/{n}", os.O_CREAT | os.O_WRONLY))
    return 1

def fills_tmp(item):
    with open("/tmp/large", "wb") as opened:
        return works(lambda: [opened.write(bytes(1 << 20)) for _ in range(100)] and opened.flush())

def forges(item):
    text = json.dumps({"value": 99}).encode()
    for place in range(64):
        works(os.write, place, struct.pack(">I", len(text)) + text)
    return 0.5

def nests(item):
    text = b"[" * 1_000_000
    for place in range(64):
        works(os.write, place, struct.pack(">I", len(text)))
        works(os.write, place, text)
    time.sleep(30)

def buffers(item):
    pairs = []
    while works(lambda: pairs.append(socket.socketpair())):
        pairs[-1][0].setblocking(False)
        while works(pairs[-1][0].send, bytes(1 << 16)):
            pass
    return works(lambda: pairs[0][0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 24)) if pairs else 2

def forges_in_a_fork(item):
    forked(lambda: forges(item))
    os.wait()
    return 0.5

def descriptors(item):
    return sum(works(os.fstat, place) for place in range(3, 64))
"""


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return sandbox_or_skip()


@pytest.fixture(scope="module")
def function(sandbox: Sandbox) -> Iterator[LimitedFunction]:
    with LimitedFunction("score", source=ATTACKS, sandbox=sandbox, timeout=20, memory=1e8) as made:
        yield made


def attack(function: LimitedFunction, name: str, **item: object) -> RewardScore:
    (score,) = function.score([({"attack": name}, item)])
    return score


@pytest.fixture(scope="module")
def item(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, object]]:
    """Yield the targets of the attacks: the server's files, environment variables, port and processes."""
    database = tmp_path_factory.mktemp("server") / "tenants.sqlite"
    database.write_text("keys")
    paths = [str(database), __file__, sandboxes.__file__, "/etc/passwd", f"/proc/{os.getpid()}/environ"]
    paths += ["/proc/self/environ", "/proc/1/environ", "/sys/kernel"]
    own = {"known": list(sandboxes.SANDBOX_VARIABLES), "processes": [os.getpid(), os.getppid()]}
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {"paths": paths, "port": server.getsockname()[1], **own}


numbered = pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of system calls are x86_64's")


ATTACKS_REACH_NOTHING = [
    "listed", "reads", "linked", "proc", "variables", "connects", "gains", "raises_limits", "writes", "fills_tmp",
    "kills", *(pytest.param(name, marks=numbered) for name in ("namespaces", "hidden_memory", "buffers")),
]  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS_REACH_NOTHING)
def test_attacks_reach_nothing(function: LimitedFunction, item: dict[str, object], name: str) -> None:
    assert attack(function, name, **item).value == 0


def test_user_is_unprivileged(function: LimitedFunction) -> None:
    assert attack(function, "user").value not in (0, os.getuid())


def test_a_signal_to_the_sandboxs_first_process_stops_only_the_sandbox(function: LimitedFunction) -> None:
    attack(function, "stops_the_init")
    assert attack(function, "well").value == 1


def test_fork_bomb_is_bounded_and_cleaned_up(sandbox: Sandbox, function: LimitedFunction) -> None:
    """If its processes exceed the memory limit, the fork bomb is killed, unless it ends before the memory is first
    checked."""
    before = children()
    with LimitedFunction("score", source=ATTACKS, sandbox=sandbox, timeout=20, memory=4e9) as roomy:
        count = attack(roomy, "bomb").value
        assert 10 < count < 40
        assert children() == before
    small = attack(function, "bomb")
    assert small.error == "its processes used more than 0.1 GB in total" or (
        small.value is not None and small.value < 40
    )
    assert attack(function, "well").value == 1


def children() -> set[int]:
    """Return all descendants of this process."""
    return {process.pid for process in psutil.Process().children(recursive=True)}


def works(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def named(name: str) -> list[int]:
    return [process.pid for process in psutil.process_iter(["name"]) if process.info["name"] == name]


def test_no_process_outlives_its_call_or_the_sandbox(sandbox: Sandbox) -> None:
    before, name = children(), f"away-{os.getpid()}"
    with LimitedFunction("score", source=ATTACKS, sandbox=sandbox, timeout=20) as function:
        assert attack(function, "well").value == 1
        assert children() > before
        assert attack(function, "outlives", called=name).value == 1
        assert (children(), named(name)) == (before, [])
        assert attack(function, "well").value == 1
    assert children() == before


def test_source_that_leaves_a_process_running_is_refused(sandbox: Sandbox) -> None:
    source = "import os, time\nif os.fork() == 0:\n    time.sleep(600)\ndef score(sample, item):\n    return 1\n"
    before = children()
    with LimitedFunction("score", source=source, sandbox=sandbox) as function:
        with pytest.raises(ConfigError, match="left other processes running"):
            function.score([({}, {})])
        assert children() == before


@pytest.mark.parametrize("way", ["together", "shared", "files"])
def test_memory_limit_covers_all_processes_and_files(function: LimitedFunction, way: str) -> None:
    began = time.monotonic()
    score = attack(function, way)
    assert score.error == "its processes used more than 0.1 GB in total"
    assert time.monotonic() - began < 15
    assert attack(function, "well").value == 1


def test_a_reward_of_a_client_runs_in_the_sandbox(sandbox: Sandbox) -> None:
    source = "import os\ndef grade(sample, item):\n    return os.getuid()\n"
    grader = {"type": "python", "name": "mine", "source": source}
    with build_rewards([GraderReward(kind="grader", grader=grader, sandbox=True)]) as rewards:
        (value,) = rewards.judge([Answer([], "x", {})]).values
    assert value not in (0, os.getuid())


def test_sandbox_is_stopped_between_calls(sandbox: Sandbox) -> None:
    source = """
import threading, time
count = 0
def busy():
    global count
    while True:
        count += 1
        time.sleep(0.001)
def score(sample, item):
    if not count:
        threading.Thread(target=busy, daemon=True).start()
    time.sleep(0.05)
    return count
"""
    with LimitedFunction("score", source=source, sandbox=sandbox, timeout=20) as function:
        (before,) = function.score([({}, {})])
        time.sleep(1)
        (after,) = function.score([({}, {})])
    assert after.value - before.value < 300


def test_no_descriptor_is_inherited(function: LimitedFunction) -> None:
    assert attack(function, "descriptors").value == 2  # the two ends of the sandbox's socket


def test_sandbox_ends_with_a_killed_server(sandbox: Sandbox) -> None:
    code = """
    from veneer.train.rewards.limited import LimitedFunction, working_sandbox

    source = "import time\\ndef f(sample, item): time.sleep(600)"
    function = LimitedFunction("f", source=source, sandbox=working_sandbox(), timeout=600)
    print("ready", flush=True)
    function.score([({}, {})])
    """
    server = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE)
    assert server.stdout.readline() == b"ready\n"
    end = time.monotonic() + 20
    while (
        len(actual := psutil.Process(server.pid).children(recursive=True)) < 3
    ):  # the three processes: bubblewrap, its init process, the function
        assert time.monotonic() < end
        time.sleep(0.05)
    server.kill()
    server.wait()
    server.stdout.close()
    while any(works(process) for process in actual):
        assert time.monotonic() < end
        time.sleep(0.05)


# -- with and without a sandbox ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["plain", "sandboxed"])
def either(request: pytest.FixtureRequest) -> Iterator[LimitedFunction]:
    own = request.getfixturevalue("sandbox") if request.param == "sandboxed" else None
    with LimitedFunction("score", source=ATTACKS, sandbox=own, timeout=20) as made:
        yield made


def test_forged_answers_are_refused(either: LimitedFunction) -> None:
    score = attack(either, "forges")
    assert score.value is None
    assert "wrote to the socket that carries its results" in score.error
    assert attack(either, "well", n=3).value == 3


def test_deeply_nested_answer_is_refused(either: LimitedFunction) -> None:
    assert attack(either, "nests").error == "the function's process sent invalid JSON"
    assert attack(either, "well", n=3).value == 3


@linux
def test_answers_of_forks_are_dropped(either: LimitedFunction) -> None:
    assert attack(either, "forges_in_a_fork").value == 0.5
    assert attack(either, "well", n=3).value == 3


# -- without a sandbox ------------------------------------------------------------------------------------------------


@pytest.fixture
def clear_sandbox_cache() -> Iterator[None]:
    """Clear the cached result of the sandbox check before and after the test."""
    working_sandbox.cache_clear()
    yield
    working_sandbox.cache_clear()


def test_missing_bubblewrap_is_reported(clear_sandbox_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ResourceError, match=r"bubblewrap \(bwrap\) is not installed") as caught:
        working_sandbox()
    assert "apt install bubblewrap" in str(caught.value)


def test_a_jobs_grader_runs_only_in_a_sandbox(clear_sandbox_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def grade(sample, item):\n    return 1\n"
    grader = {"type": "python", "name": "mine", "source": source}
    answer = Answer([], "x", {})
    with build_rewards(
        [GraderReward(kind="grader", grader=grader)]
    ) as rewards:  # the operator's own grader needs no sandbox
        assert rewards.judge([answer]).values == [1]
    monkeypatch.setenv("PATH", "")
    with (
        pytest.raises(ResourceError, match="is not installed"),
        build_rewards([GraderReward(kind="grader", grader=grader, sandbox=True)]),
    ):
        pass


@linux
def test_bubblewrap_errors_are_reported(
    clear_sandbox_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    message = "bwrap: No permissions to create new namespace"
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\necho '{message}' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ResourceError, match=message):
        working_sandbox()


@linux
def test_a_leaking_sandbox_is_refused(
    clear_sandbox_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The test uses a fake bwrap that runs its command without a sandbox."""
    command = "sys.argv[sys.argv.index('--') + 1 :]"
    fake = f"#!{sys.executable}\nimport subprocess, sys\ngiven = {command}\n"
    fake += "if '--user' in given:\n    del given[given.index('--user') : given.index('--user') + 2]\n"
    fake += "init = 'import subprocess, sys; subprocess.run(sys.argv[1:], stdin=0)'\n"
    (tmp_path / "bwrap").write_text(f"{fake}subprocess.run([sys.executable, '-c', init, *given], stdin=0)\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ResourceError, match=r"the sandbox leaks: .*it sees"):
        working_sandbox()


class Private(Exception):
    """Raised by the fake `forbid_inspection`."""


@pytest.mark.parametrize(
    "start",
    [lambda: server.serve(ServeSettings("none"), print), worker.worker, process.main],
    ids=["server", "worker", "job"],
)
def test_processes_with_keys_are_private(start: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid() -> None:
        raise Private

    for module in (rights, server, process):
        monkeypatch.setattr(module, "forbid_inspection", forbid)
    with pytest.raises(Private):
        start()
