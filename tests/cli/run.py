"""Run the command line in the test's process."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from veneer.cli.main import main


@dataclass
class Ran:
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Ran:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    seen = capsys.readouterr()
    return Ran(int(end.value.code or 0), seen.out, seen.err)
