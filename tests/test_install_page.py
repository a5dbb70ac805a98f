"""docs/how-to/install.md and release.md: commands, extras, the lock file and the release workflow."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import veneer
from tests.test_readme import blocks

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/how-to/install.md").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
FROM_INDEX = re.compile(
    r"""\b((pip|pipx|uv\ pip|uv\ tool)\ (install|run)|uv\ add|uvx)\ (-\S+\ )*["']?veneer(\[|==|["'`\s]|$)""", re.VERBOSE
)


@pytest.mark.parametrize(
    "said", ["pip install veneer", "pip install -U 'veneer[serve]'", "uvx veneer", '-m pip install "veneer==1"']
)
def test_an_install_from_the_index_is_recognized(said: str) -> None:
    assert FROM_INDEX.search(said)


def test_nothing_says_to_install_veneer_from_the_index() -> None:
    """veneer is not published: anybody could upload another package under the name."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"]
    for folder in ("docs", "src/veneer", "examples", "deploy", "bases", "benchmarks"):
        files += [p for p in (ROOT / folder).rglob("*") if p.suffix in {".md", ".py", ".yaml", ".toml", ".j2", ".sh"}]
    wrong = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if FROM_INDEX.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def test_page_names_existing_extras_targets_and_wheels() -> None:
    named = {name for row in re.findall(r"^\| (`.*?) \|", PAGE, flags=re.M) for name in re.findall(r"`([\w-]+)`", row)}
    named |= {name for each in re.findall(r"\[([\w,-]+)\]'", PAGE) for name in each.split(",")}
    assert {"serve", "image", "cpu", "cu13"} <= named <= EXTRAS.keys()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert set(re.findall(r"[`\n](?:\w+=\S+ )?make (?:\w+=\S+ )?([a-z-]+)", PAGE)) <= targets
    assert set(re.findall(r"dist/veneer\w*-(\S+?)-py3", PAGE)) == {veneer.__version__}
    assert "src/veneer_bases" in blocks(PAGE)[3]
    assert (ROOT / "src/veneer_bases/pyproject.toml").is_file()


def test_uv_takes_torch_of_cpu_and_cu13_from_its_indexes() -> None:
    """Only torch comes from there, and only for these extras; pip sees plain ranges."""
    uv = PROJECT["tool"]["uv"]
    hosts = {each["name"]: each["url"] for each in uv["index"] if each["explicit"]}
    sources = {each["extra"]: hosts[each["index"]] for each in uv["sources"]["torch"]}
    assert sources == {
        "cpu": "https://download.pytorch.org/whl/cpu",
        "cu13": "https://download.pytorch.org/whl/cu130",
    }
    assert set(uv["sources"]) == {"torch"}
    assert [sorted(each["extra"] for each in group) for group in uv["conflicts"]] == [sorted(sources)]
    for extra in sources:
        (only,) = (Requirement(each) for each in EXTRAS[extra])
        assert (only.name, only.url) == ("torch", None)


@pytest.fixture(scope="module")
def lock() -> dict[str, Any]:
    return tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))


def test_lock_names_no_host_but_the_package_index(lock: dict[str, Any]) -> None:
    text = (ROOT / "uv.lock").read_text(encoding="utf-8")
    assert {urlsplit(url).hostname for url in re.findall(r"\w+://[^\s\"']+", text)} == {
        "pypi.org",
        "files.pythonhosted.org",
    }
    files = [f for package in lock["package"] for f in (*package.get("wheels", ()), package.get("sdist", {})) if f]
    assert len(files) > 1000
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", f["hash"]) for f in files)


def test_lock_has_the_requirements_of_pyproject(lock: dict[str, Any]) -> None:
    """If this fails, run `make lock`."""
    (own,) = (each for each in lock["package"] if each["name"] == "veneer")
    locked = {(each["name"], each.get("specifier", "")) for each in own["metadata"]["requires-dist"]}
    wanted = [Requirement(each) for group in (PROJECT["project"]["dependencies"], *EXTRAS.values()) for each in group]
    missing = {
        str(r)
        for r in wanted
        if r.name != "veneer"
        and not any(n == canonicalize_name(r.name) and set(s.split(",")) == _parts(r) for n, s in locked)
    }
    assert not missing
    assert set(own["metadata"]["provides-extras"]) == EXTRAS.keys()


def _parts(requirement: Requirement) -> set[str]:
    return set(str(requirement.specifier).split(","))


def test_release_workflow_tests_before_it_publishes() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` as true
    jobs = workflow["jobs"]
    ran = [step.get("run", "") for step in jobs["build"]["steps"]]
    order = [
        next(i for i, run in enumerate(ran) if word in run) for word in ("make check test", "-m build", "twine check")
    ]
    assert order == sorted(order)
    assert "--strict" in ran[order[-1]]
    built = {run.split("--outdir dist/")[1].split()[0] for run in ran if "--outdir" in run}
    publish = jobs["publish"]
    assert built == set(publish["strategy"]["matrix"]["project"]) == {"veneer", "veneer-bases"}
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    (action,) = (step for step in publish["steps"] if step["uses"].startswith("pypa/gh-action-pypi-publish@"))
    assert not {"user", "password"} & action["with"].keys(), "trusted publishing stores no secret"
    for name, job in jobs.items():
        assert ("id-token" in job["permissions"]) == (name == "publish")


def test_release_notes_are_the_section_of_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    command = ["make", "-s", "-C", str(ROOT), "--no-print-directory", "release-notes"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.strip()
    head = f"## [{veneer.__version__}]"
    after = changelog[changelog.index(head) :].partition("\n")[2]
    assert printed == re.split(r"^## \[", after, flags=re.M)[0]
    unknown = subprocess.run([*command, "VERSION=9.9.9"], capture_output=True, text=True, check=False)
    assert unknown.returncode
    assert not unknown.stdout
