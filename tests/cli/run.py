"""Run the command line in the test process."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from veneer.cli.main import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int | None = 0) -> Ran:
    """Run a command and assert that it exits with `code`; None accepts any exit code."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    seen = capsys.readouterr()
    ended = int(end.value.code or 0)
    assert code in (None, ended), f"{arguments}: {ended}\n{seen.out}{seen.err}"
    return Ran(ended, seen.out, seen.err)
