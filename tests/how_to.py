"""Run the commands of a page of docs/how-to."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

import pytest

from tests.cli.run import run

_BASE = "smollm2-135m"
"""The base of the pages, which the tiny base replaces."""


def run_commands(capsys: pytest.CaptureFixture[str], lines: Iterable[str], base: str) -> list[str]:
    """Run each `veneer` command, which must succeed; return their stderr.

    Shortens the answers of `veneer eval`."""
    outputs = []
    for line in lines:
        words = shlex.split(line.replace(_BASE, base), comments=True)
        if words and words[0] == "veneer":
            ran = run(capsys, *words[1:], *(["--max-new-tokens", "4"] if words[1] == "eval" else []))
            outputs.append(ran.err)
    return outputs
