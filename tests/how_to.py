"""The commands of a page of docs/how-to, run as they stand."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

import pytest

from tests.cli.run import run

_BASE = "smollm2-135m"
"""What the pages train; the tiny base takes its place."""


def run_commands(capsys: pytest.CaptureFixture[str], lines: Iterable[str], base: str) -> list[str]:
    """What each `veneer` command told on stderr; every one of them succeeds. Answers of `veneer eval` are short."""
    told = []
    for line in lines:
        words = shlex.split(line.replace(_BASE, base), comments=True)
        if words and words[0] == "veneer":
            ran = run(capsys, *words[1:], *(["--max-new-tokens", "4"] if words[1] == "eval" else []))
            assert ran.code == 0, f"{line}\n{ran.out}{ran.err}"
            told.append(ran.err)
    return told
