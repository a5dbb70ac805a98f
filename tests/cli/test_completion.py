"""Shell completion: every command and its options, by the protocol of typer's scripts, without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from veneer.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "datasets", "sqlalchemy", "fastapi", "nicegui"}


def complete(**protocol: str) -> list[str]:
    """Return the lines that a shell's script receives, and assert that no heavy package was imported."""
    code = "import sys\nfrom veneer.cli.main import main\ntry:\n    main([])\nfinally:\n"
    code += f"    print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **protocol}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.stderr == "[]\n"
    return ran.stdout.splitlines()


def bash(*words: str) -> list[str]:
    line = {"COMP_WORDS": " ".join(("veneer", *words)), "COMP_CWORD": str(len(words))}
    return complete(_VENEER_COMPLETE="complete_bash", **line)


def test_bash_completes_every_command() -> None:
    assert [line for line in bash("") if line] == bash("")
    assert set(bash("")) == COMMANDS.keys()
    assert bash("ima") == ["image-quickstart", "image"]


@pytest.mark.parametrize(
    ("words", "option"),
    [(("train", "--d"), "--dry-run"), (("serve", "--"), "--studio"), (("image", "make", "--"), "--base"),
     (("quickstart", "--"), "--tickets"), (("tenant", "key", "add", "--"), "--help")],
)  # fmt: skip
def test_bash_completes_options_of_commands_and_subcommands(words: tuple[str, ...], option: str) -> None:
    found = bash(*words)
    assert option in found
    assert all(each.startswith(words[-1]) for each in found)


def test_zsh_and_fish_show_descriptions() -> None:
    typed = {"_TYPER_COMPLETE_ARGS": "veneer library a"}
    (only,) = {line for line in complete(_VENEER_COMPLETE="complete_zsh", **typed) if '"add":' in line}
    assert '"add":"Store an adapter' in only
    fish = complete(_VENEER_COMPLETE="complete_fish", _TYPER_COMPLETE_FISH_ACTION="get-args", **typed)
    names = [line.partition("\t")[0] for line in fish]
    assert "add" in names
    assert all(line.partition("\t")[2] for line in fish if line.partition("\t")[0] == "add")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_for_the_shell(shell: str) -> None:
    """The option detects the shell that calls it; typer's variable names one instead."""
    code = "from veneer.cli.main import main; main(['--show-completion', " + repr(shell) + "])"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    script = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert f"_VENEER_COMPLETE=complete_{shell}" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
