"""Run the commands of a page in docs/how-to."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

import pytest

from tests.cli.run import run

_BASE = "smollm2-135m"
"""The base named on the pages; tests replace it with the tiny base."""


def run_commands(capsys: pytest.CaptureFixture[str], lines: Iterable[str], base: str) -> list[str]:
    """Run the `veneer` commands among `lines`; return the stderr of each.

    Every command must succeed. `veneer eval` generates only 4 tokens per answer."""
    outputs = []
    for line in lines:
        words = shlex.split(line.replace(_BASE, base), comments=True)
        if words and words[0] == "veneer":
            ran = run(capsys, *words[1:], *(["--max-new-tokens", "4"] if words[1] == "eval" else []))
            outputs.append(ran.err)
    return outputs
