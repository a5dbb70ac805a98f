"""The command line in general: lazy imports, and the exit code and message of every outcome."""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psycopg
import pytest
import torch
from sqlalchemy.exc import OperationalError

import veneer
from tests.cli.run import run
from veneer.cli import main as module
from veneer.errors import Interrupted, NoGain, VeneerError
from veneer.ops.cpu import compiled

REFUSED = OperationalError("SELECT 1", {}, psycopg.OperationalError("connection refused"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Add the command `veneer probe`, which raises `error` if the test sets it on the fixture."""
    probe: Any = ModuleType("probe")
    probe.error = None

    def act() -> None:
        """Probe."""
        if probe.error is not None:
            raise probe.error
        print("done")

    probe.command = act
    monkeypatch.setitem(sys.modules, "probe", probe)
    monkeypatch.setitem(module.COMMANDS, "probe", ("probe", "Probe."))
    return probe


class OutOfMemoryError(RuntimeError):
    """An error with the same class name as torch's."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (None, 0, ""),
        (VeneerError("it broke", where="line 3", fix="mend it"), 2, "error: it broke|where: line 3|fix: mend it"),
        (Interrupted("stopped at step 7", fix="resume with --resume"), 130, "stopped at step 7|--resume"),
        (KeyboardInterrupt(), 130, "stopped"),
        (OSError(errno.ENOSPC, "No space left on device", "/big/file"), 2, "the disk is full|/big/file"),
        (RuntimeError("IoError: No space left on device (os error 28)"), 2, "the disk is full"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), 2, "name is too long|" + "x" * 100 + "…"),
        (
            UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"),
            2,
            "not valid Unicode|type the text again",
        ),
        (RuntimeError("Could not determine home directory."), 2, "begins with ~|write out the path"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 2, "no permission|/root/x"),
        (MemoryError(), 2, "memory is exhausted"),
        (REFUSED, 2, "a database does not answer: connection refused|try again"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "memory is exhausted"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), 2, "GPU's memory"),
    ],
)
def test_every_outcome_has_an_exit_code_and_message(
    capsys: Any, command: Any, error: Any, code: int, words: str
) -> None:
    command.error = error
    ran = run(capsys, "probe", code=code)
    assert ran.out == ("" if error else "done\n")
    assert all(each in ran.err for each in words.split("|"))
    assert "Traceback" not in ran.err
    assert ran.err.count("stopped") <= 1


def test_unexpected_error_is_reported_as_a_bug(capsys: Any, command: Any) -> None:
    command.error = ZeroDivisionError("oh \x1b[2J")
    ran = run(capsys, "probe", code=70)
    assert "ZeroDivisionError: oh \\u001b[2J" in ran.err
    assert "in act" in ran.err  # the message names the innermost frame
    assert "a bug in veneer" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["trian"], "train"), (["generate", "--temprature", "1"], "--temperature"), (["base", "get"], "name")],
)
def test_misspelled_command_or_option_gets_a_suggestion(capsys: Any, arguments: list[str], words: str) -> None:
    ran = run(capsys, *arguments, code=2)
    assert words in ran.err
    assert "Traceback" not in ran.err


def test_help_lists_every_command(capsys: Any) -> None:
    unwrapped = " ".join(re.sub(r"[│╭╮╰╯─]", " ", run(capsys, "--help").out).split())
    for name, (_, line) in module.COMMANDS.items():
        assert f" {name} {line}" in unwrapped


def test_help_shows_every_command_in_one_group(capsys: Any) -> None:
    assert Counter(name for names in module.PANELS.values() for name in names) == Counter(list(module.COMMANDS))
    lines = run(capsys, "--help").out.splitlines()
    heads = [line.split()[1] for line in lines if line.startswith("╭")]
    assert heads == ["Options", *module.PANELS]


def test_version_is_printed(capsys: Any) -> None:
    assert run(capsys, "--version").out == f"veneer {veneer.__version__}\n"


@pytest.mark.parametrize("arguments", [("--version", "--json"), ("--json", "--version")])
def test_version_as_json_is_what_a_bug_report_needs(capsys: Any, arguments: tuple[str, ...]) -> None:
    found = json.loads(run(capsys, *arguments).out)
    root = Path(module.__file__).resolve().parents[3]
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert found == {
        "veneer": veneer.__version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "commit": head or None,
    }
    assert "belongs to --version" in " ".join(run(capsys, "--json", "base", "list", code=2).err.split())


def leaves(words: tuple[str, ...], command: Any) -> Iterator[tuple[str, ...]]:
    """Yield the words of `command` if it runs without a subcommand, and of all its subcommands."""
    below = getattr(command, "commands", {})
    if not below or command.invoke_without_command:
        yield words
    for name, each in below.items():
        yield from leaves((*words, name), each)


def test_help_of_every_command_has_an_example(capsys: Any) -> None:
    group = module.program()
    context = group.make_context("veneer", [], resilient_parsing=True)
    every = [words for name in group.commands for words in leaves((name,), group.resolve_command(context, [name])[1])]
    assert len(every) > 50
    without = [w for w in every if f"Example: veneer {' '.join(w)}" not in run(capsys, *w, "--help").out]
    assert without == [("image", "make")]  # its help shows `veneer image` instead


def test_closed_pipe_ends_quietly() -> None:
    code = "from veneer.cli.main import main; main(['base', 'list'])"
    command = f'set -o pipefail; "{sys.executable}" -u -c "{code}" | true'
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in ran.stderr
    assert ran.returncode in (0, 141)


EXITS = {
    2: VeneerError("it broke"),
    3: NoGain("no gain after step 10"),
    70: ZeroDivisionError("oh"),
    130: Interrupted("stopped at step 7"),
    143: Interrupted("stopped at step 7", signal=15),
}


def test_the_table_of_exit_codes_is_complete(
    capsys: Any, command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each code of docs/reference/exit-codes.md happens here, and no other code does."""
    page = (Path(__file__).resolve().parents[2] / "docs/reference/exit-codes.md").read_text(encoding="utf-8")
    seen = {run(capsys, "--version").code}
    for code, error in EXITS.items():
        command.error = error
        seen.add(run(capsys, "probe", code=code).code)
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("VENEER_HOME", str(tmp_path / "file" / "home"))
    seen.add(run(capsys, "doctor", code=1).code)
    reading, writing = os.pipe()
    os.close(reading)  # a pipe without a reader
    piped = [sys.executable, "-u", "-c", "from veneer.cli.main import main; main(['base', 'list'])"]
    seen.add(subprocess.run(piped, stdout=writing, stderr=subprocess.PIPE, check=False).returncode)
    os.close(writing)
    assert sorted(seen) == [int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.M)]
