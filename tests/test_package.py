"""Wheel and sdist can be built, are complete and small, and the wheel works in another environment."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import veneer
from tests.test_readme import roomy, small_config
from tests.tiny_base import tiny_base_dir

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
BASES = ("catalogue-flux", "catalogue-flux-control", "catalogue-sdxl", "catalogue-sdxl-control")


def built(project: Path, folder: Path, *kinds: str) -> list[Path]:
    command = [sys.executable, "-m", "build", "--no-isolation", *kinds, "--outdir", str(folder), str(project)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The wheel and the sdist; the wheel is built from the sdist, as an index's users would."""
    return built(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel(distributions: list[Path]) -> Path:
    return next(path for path in distributions if path.suffix == ".whl")


@pytest.fixture(scope="module")
def sdist(distributions: list[Path]) -> Path:
    return next(path for path in distributions if path.name.endswith(".tar.gz"))


def relative(*patterns: str) -> set[str]:
    """Return the paths under src/ of veneer's files that match."""
    return {p.relative_to(SOURCE).as_posix() for each in patterns for p in (SOURCE / "veneer").rglob(each)}


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return message_from_bytes(archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))))


def strictly_checked(paths: list[Path]) -> None:
    """Run twine's check, as the index does before it accepts an upload."""
    pytest.importorskip("twine", reason="pip install twine")
    ran = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, paths)], capture_output=True)
    assert ran.returncode == 0, ran.stdout.decode() + ran.stderr.decode()


def test_wheel_is_small_and_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licence = archive.read(next(n for n in names if n.endswith("licenses/LICENSE"))).decode()
    data = relative("*.c", "*.h", "*.j2", "*.js", "*.css", "*.json", "*.lua", "py.typed")
    assert {"veneer/py.typed", "veneer/studio/studio.css"} < data
    assert relative("*.py") | data <= names
    assert any(n.startswith("veneer/library/versions/") for n in names), "the library's database migrations"
    about = {n for n in names if n.startswith("veneer-")}
    assert {n.split("/")[0] for n in names - about} == {"veneer"}, "the wheel installs only veneer"
    assert not [n for n in names if "/tests/" in n or "test_" in n.rpartition("/")[2] or n.endswith(".pyc")]
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
    assert wheel.stat().st_size < 3e6, "weights are in veneer-bases"
    strictly_checked([wheel])


def test_wheel_metadata_names_version_and_license(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert metadata["Version"] == veneer.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


def test_wheel_has_what_both_quickstarts_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for folder in ("examples/campaign", "bases/catalogue"):
        files = [p for p in (ROOT / folder).iterdir() if p.is_file()]
        assert {f"veneer/{p.relative_to(ROOT).as_posix()}" for p in files} <= names
    tickets = {f"veneer/examples/tickets/{name}" for name in ("config.yaml", "train.jsonl", "test.jsonl")}
    assert {*tickets, "veneer/examples/quickstart.py"} <= names


def test_sdist_has_sources_and_no_weights(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    assert {f"src/{name}" for name in relative("*.py", "*.c", "*.j2", "*.js", "*.css", "*.json", "py.typed")} <= names
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "PKG-INFO", "bases/catalogue/build.py"} <= names
    assert not [
        n for n in names if n.startswith(("tests/", "src/veneer_bases/")) or n.endswith((".safetensors", ".pyc"))
    ]
    assert sdist.stat().st_size < 3e6
    strictly_checked([sdist])


@pytest.fixture(scope="module")
def bases(wheel: Path) -> list[Path]:
    """The distributions of the image bases, built into the folder of veneer's."""
    return [p for p in built(SOURCE / "veneer_bases", wheel.parent) if p.name.startswith("veneer_bases-")]


@pytest.mark.slow
def test_bases_are_a_distribution_of_their_own(bases: list[Path]) -> None:
    """It has the weights, their cards and their license, and no code of veneer's."""
    paths = bases
    (wheel,) = [path for path in paths if path.suffix == ".whl"]
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith("veneer_bases/")]
        licence = archive.read(next(n for n in archive.namelist() if n.endswith("licenses/LICENSE"))).decode()
    files = [p for name in BASES for p in (SOURCE / "veneer_bases" / name).rglob("*") if p.is_file()]
    assert {p.relative_to(SOURCE).as_posix() for p in files} | {"veneer_bases/__init__.py"} == set(names)
    assert metadata_of(wheel)["License-Expression"] == "CC-BY-4.0"
    assert "Attribution 4.0 International" in licence
    assert all(path.stat().st_size < 45e6 for path in paths)
    strictly_checked(paths)


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an environment with the wheel and this environment's dependencies, but without the checkout."""
    folder = tmp_path_factory.mktemp("elsewhere") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"]
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder


def run(elsewhere: Path, *command: str) -> str:
    argv = [str(elsewhere / "bin" / command[0]), *command[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=elsewhere, env={"HOME": str(elsewhere)})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_imports_in_another_environment(elsewhere: Path) -> None:
    where = run(elsewhere, "python", "-c", "import veneer; print(veneer.__file__); veneer.attach; veneer.train_text")
    assert Path(where.strip()).is_relative_to(elsewhere)


@pytest.mark.slow
def test_command_runs_in_another_environment(elsewhere: Path) -> None:
    for arguments in ([], ["train"], ["generate"], ["eval"], ["adapter"]):
        assert "Usage" in run(elsewhere, "veneer", *arguments, "--help")


@pytest.mark.slow
def test_bases_are_found_after_the_command_that_the_error_names(elsewhere: Path, bases: list[Path]) -> None:
    argv = [str(elsewhere / "bin" / "veneer"), "image-quickstart"]
    refused = subprocess.run(argv, capture_output=True, text=True, cwd=elsewhere, env={"HOME": str(elsewhere)})
    assert refused.returncode == 2, refused.stderr
    (command,) = re.findall(r"fix: (pip install .*)", refused.stderr)
    install = [sys.executable, "-m", "pip", "--python", str(elsewhere / "bin" / "python"), *shlex.split(command)[1:]]
    done = subprocess.run([*install, "--quiet", "--no-index", "--no-deps"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where = run(
        elsewhere, "python", "-c", "from veneer.models import builtin as b; print(b.packaged('catalogue-flux'))"
    )
    assert Path(where.strip()).is_relative_to(elsewhere)


@pytest.mark.slow
def test_quickstart_runs_from_the_wheel(elsewhere: Path, tmp_path: Path) -> None:
    base = roomy(tiny_base_dir(tmp_path))
    (inside,) = elsewhere.glob("lib/python*/site-packages/veneer/examples")
    config = small_config().replace(str(ROOT / "examples"), str(inside))
    (elsewhere / "config.yaml").write_text(config, encoding="utf-8")
    printed = run(elsewhere, "veneer", "quickstart", "--base", str(base), "--config", "config.yaml", "--tickets", "4")
    assert "4 held-out tickets" in printed
    assert str(ROOT) not in printed
