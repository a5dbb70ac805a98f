"""Helpers for error messages."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.installed import install_record
from veneer.errors import MissingExtraError, install_command, nearest

GIT = {"url": "https://example.org/veneer.git", "vcs_info": {"vcs": "git", "commit_id": "4f1d"}}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The direct_url.json of an installed veneer 9.9, in which pip records the source (PEP 610)."""
    return install_record(tmp_path / "site", monkeypatch) / "direct_url.json"


@pytest.mark.parametrize(
    ("origin", "extras", "bases"),
    [
        ({"url": "file:///a%20b/veneer", "dir_info": {"editable": True}}, '-e "/a b/veneer[serve,s3]"',
         '"/a b/veneer/src/veneer_bases"'),
        ({"url": "file:///a/veneer", "dir_info": {}}, '"/a/veneer[serve,s3]"', '"/a/veneer/src/veneer_bases"'),
        ({"url": "file:///veneer-1/veneer-9.9-py3-none-any.whl", "archive_info": {}},
         '"/veneer-1/veneer-9.9-py3-none-any.whl[serve,s3]"', '"/veneer-1/veneer_bases-9.9-py3-none-any.whl"'),
        (GIT, '"veneer[serve,s3] @ git+https://example.org/veneer.git@4f1d"',
         '"veneer-bases @ git+https://example.org/veneer.git@4f1d#subdirectory=src/veneer_bases"'),
    ],
)  # fmt: skip
def test_install_command_names_the_recorded_source(record: Path, origin: object, extras: str, bases: str) -> None:
    record.write_text(json.dumps(origin))
    assert install_command("serve,s3") == f"pip install {extras}"
    assert install_command(bases=True) == f"pip install {bases}"


def test_install_command_without_a_record_is_a_requirement(record: Path) -> None:
    """It pins the version, so that an extra does not replace veneer by a newer one."""
    wanted = Requirement(shlex.split(install_command("serve,s3"))[-1])
    assert (wanted.name, wanted.extras, str(wanted.specifier)) == ("veneer", {"serve", "s3"}, "==9.9")
    assert Requirement(shlex.split(install_command(bases=True))[-1]).name == "veneer-bases"


def test_missing_extra_in_a_clone_names_the_clone(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.write_text(json.dumps({"url": Path.cwd().as_uri(), "dir_info": {"editable": True}}))
    assert MissingExtraError("serving needs FastAPI", extra="serve").fix == 'pip install -e ".[serve]"'
    clone = Path.cwd()
    monkeypatch.chdir(record.parent)
    command = MissingExtraError("serving needs FastAPI", extra="serve").fix or ""
    assert shlex.split(command)[-1] == f"{clone}[serve]"


@pytest.mark.parametrize(
    ("typed", "known", "meant"),
    [
        ("rnak", ["rows", "rank"], ["rank"]),  # two swapped neighboring letters count as one edit
        ("suport@1", ["support@1", "support@2", "tone@1"], ["support@1", "support@2"]),
        ("Learning_Rte", ["learning_rate"], ["learning_rate"]),
        ("desk.jsonl", ["tests"], []),
        ("nope", ["opt", "home"], []),
        ("lr", ["learning_rate", "r"], []),
        ("", ["a"], []),
    ],
)
def test_nearest_names_are_within_few_edits(typed: str, known: list[str], meant: list[str]) -> None:
    assert nearest(typed, known) == meant


def test_nearest_allows_three_edits_at_most() -> None:
    long = "a-name-of-many-letters"
    assert nearest(f"{long}xyz", [long]) == [long]
    assert nearest(f"{long}wxyz", [long]) == []
